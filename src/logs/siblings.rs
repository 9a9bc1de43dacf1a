//! What stands at a path and beside it: a path comes in, an opened regular file or one sentence comes out, or the
//! rotated neighbours of a log in the order they were born. It reads no contents beyond two windows.

use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, Statx, StatxFlags, statx};
use rustix::io::Errno;

use super::generation::{Identity, Position, Window, same_at};

/// What `statx` knows about a file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stand {
    pub(super) identity: Identity,
    pub(super) size: u64,
    pub(super) modified_ns: i64,
    pub(super) kind: FileType,
}

impl Stand {
    fn new(stat: &Statx) -> Self {
        let ns = |seconds: i64, rest: u32| seconds.saturating_mul(1_000_000_000).saturating_add(i64::from(rest));
        // 0 where the file system does not tell; then device and inode must do.
        let born = stat.stx_mask & StatxFlags::BTIME.bits() != 0;
        Self {
            identity: Identity {
                device: u64::from(stat.stx_dev_major) << 32 | u64::from(stat.stx_dev_minor),
                inode: stat.stx_ino,
                born_ns: if born { ns(stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec) } else { 0 },
            },
            size: stat.stx_size,
            modified_ns: ns(stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec),
            kind: FileType::from_raw_mode(stat.stx_mode.into()),
        }
    }

    /// Of an open file.
    pub(super) fn of(file: impl AsFd) -> Result<Self, Errno> {
        Ok(Self::new(&statx(file, c"", AtFlags::EMPTY_PATH, WANTED)?))
    }

    /// Of what a path leads to.
    pub(super) fn at(path: &Path) -> Result<Self, Errno> {
        Ok(Self::new(&statx(CWD, path, AtFlags::empty(), WANTED)?))
    }
}

const WANTED: StatxFlags = StatxFlags::BASIC_STATS.union(StatxFlags::BTIME);

/// What a name is, links not followed.
pub(super) fn kind_of(path: &Path) -> Option<FileType> {
    let stat = statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::TYPE).ok()?;
    Some(FileType::from_raw_mode(stat.stx_mode.into()))
}

/// Why a path gives no log.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Absent {
    /// Nothing is there.
    Missing,
    /// Something is there; one sentence says what is wrong with it.
    Wrong(String),
}

impl From<Errno> for Absent {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::NOENT | Errno::NOTDIR => Self::Missing,
            Errno::ACCESS | Errno::PERM => {
                Self::Wrong("may not be read: permission denied for it or a directory above it".to_owned())
            }
            Errno::LOOP => Self::Wrong("is a symbolic link that leads back to itself".to_owned()),
            other => Self::Wrong(format!("cannot be opened: {other}")),
        }
    }
}

/// What a path leads to, if that is a regular file; nothing is opened, for opening a FIFO would disturb its writer.
pub(super) fn regular(path: &Path) -> Result<Stand, Absent> {
    let stand = Stand::at(path)?;
    let what = match stand.kind {
        FileType::RegularFile => return Ok(stand),
        FileType::Directory => "is a directory, not a log file; write the file's path or a glob such as \"/dir/*.log\"",
        FileType::Fifo => "is a FIFO, not a regular file; let the writer write a file",
        FileType::Socket => "is a socket, not a regular file; let the writer write a file",
        _ => "is a device, not a regular file",
    };
    Err(Absent::Wrong(what.to_owned()))
}

/// Opens a regular file for reading and says what was really opened: the path may have changed since [`regular`].
pub(super) fn open(path: &Path, more: OFlags) -> Result<(OwnedFd, Stand), Absent> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY | more;
    let file = rustix::fs::open(path, flags, Mode::empty())?;
    let stand = Stand::of(&file)?;
    if stand.kind == FileType::RegularFile {
        Ok((file, stand))
    } else {
        Err(Absent::Wrong("is not a regular file".to_owned()))
    }
}

/// The name of the network or user-space file system a file lies on, whose changes from elsewhere raise no events
/// (magic numbers: statfs(2)).
pub(super) fn remote(file: impl AsFd) -> Option<&'static str> {
    // The kernel's magic numbers have 32 bits; some of them are negative in its signed field.
    match rustix::fs::fstatfs(file).ok()?.f_type as u32 {
        0x6969 => Some("NFS"),
        0xFF53_4D42 | 0xFE53_4D42 | 0x517B => Some("an SMB share"),
        0x6573_5546 => Some("a FUSE file system"),
        0x0102_1997 => Some("a 9p share"),
        0x00C3_6400 => Some("a Ceph file system"),
        _ => None,
    }
}

/// A file beside a log whose name says that it may have been that log.
#[derive(Debug)]
pub(super) struct Sibling {
    pub(super) path: PathBuf,
    pub(super) stand: Stand,
}

impl Sibling {
    /// Opens it, unless it has become another file since the listing.
    pub(super) fn open(&self) -> Option<OwnedFd> {
        let (file, stand) = open(&self.path, OFlags::NOFOLLOW).ok()?;
        (stand.identity == self.stand.identity).then_some(file)
    }
}

/// The rotated neighbours of the log at `real` (a path without links), the earliest born first; compressed ones are
/// left out. Names decide only between files of the same clock tick: a rename keeps the births, but not the names.
pub(super) fn siblings(real: &Path) -> Vec<Sibling> {
    let (Some(directory), Some(base)) = (real.parent(), real.file_name()) else { return Vec::new() };
    let mut found: Vec<Sibling> = std::fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| looks_rotated(base, &entry.file_name()))
        .filter_map(|entry| {
            let stat = statx(CWD, entry.path(), AtFlags::SYMLINK_NOFOLLOW, WANTED).ok()?;
            let stand = Stand::new(&stat);
            (stand.kind == FileType::RegularFile).then(|| Sibling { path: entry.path(), stand })
        })
        .collect();
    found.sort_by_key(|sibling| {
        let stand = &sibling.stand;
        (stand.identity.born_ns, stand.modified_ns, order_by_name(base, &sibling.path))
    });
    found
}

/// A rotated file's number counts backwards (`.2` is older than `.1`), a date (six digits or more) forwards.
fn order_by_name(base: &OsStr, path: &Path) -> i64 {
    let name = path.file_name().unwrap_or_default().as_bytes();
    let same = name.iter().zip(base.as_bytes()).take_while(|(a, b)| a == b).count();
    let digits: Vec<u8> =
        name[same..].iter().copied().skip_while(|byte| !byte.is_ascii_digit()).take_while(u8::is_ascii_digit).collect();
    let number = std::str::from_utf8(&digits).ok().and_then(|digits| digits.parse().ok()).unwrap_or(0i64);
    if digits.len() < 6 { -number } else { number }
}

/// `auth.log` rotates to `auth.log.1`, `auth.log-20251121`, `auth.log.old`, `auth-20251121.log`, `auth.1.log`; but
/// `auth.log_ssl` or `auth.log.errors` is another log, and reading it as ours would be worse than losing lines.
fn looks_rotated(base: &OsStr, name: &OsStr) -> bool {
    let (base, name) = (base.as_bytes(), name.as_bytes());
    if [&b".gz"[..], b".xz", b".bz2", b".zst", b".lz4"].iter().any(|packed| name.ends_with(packed)) {
        return false;
    }
    let numbered = |rest: &[u8]| match rest {
        [b'.' | b'-' | b'_', rest @ ..] => rest.first().is_some_and(u8::is_ascii_digit),
        _ => false,
    };
    if let Some(rest) = name.strip_prefix(base) {
        return numbered(rest) || rest == b".old" || rest == b"~";
    }
    let Some(dot) = memchr::memrchr(b'.', base) else { return false };
    let (stem, extension) = base.split_at(dot);
    name.strip_prefix(stem).and_then(|rest| rest.strip_suffix(extension)).is_some_and(numbered)
}

/// Whether `file` holds, up to `position`, the same bytes as the file the position was taken in: its head and the
/// bytes before the offset are equal. A head alone proves nothing (many logs start with the same header).
pub(super) fn is_copy(file: impl AsFd, position: &Position) -> bool {
    position.offset > 0
        && same_at(&file, 0, &position.head)
        && same_at(&file, position.offset.saturating_sub(position.tail.len() as u64), &position.tail)
}

/// Whether two files begin alike, as far as both go; nothing can be said of an empty one.
pub(super) fn begins_like(file: impl AsFd, head: &Window) -> bool {
    let own = Window::read(file, 0, super::generation::WINDOW_BYTES);
    let both = own.len().min(head.len());
    both > 0 && own.bytes()[..both] == head.bytes()[..both]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(base: &str, name: &str, expect: bool) {
        assert_eq!(looks_rotated(OsStr::new(base), OsStr::new(name)), expect, "{base} {name}");
    }

    #[test]
    fn rotated_names_are_told_from_other_logs() {
        for name in ["auth.log.1", "auth.log-20251121", "auth.log.old", "auth-20251121.log", "auth.1.log"] {
            check("auth.log", name, true);
        }
        for name in ["auth.log", "auth.log.1.gz", "auth.log_ssl", "auth.log.errors", "auth2.log", "author.log"] {
            check("auth.log", name, false);
        }
        check("secure", "secure-20251121", true);
        check("secure", "secure2", false);
    }
}
