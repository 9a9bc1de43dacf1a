//! The one inotify descriptor of the daemon: paths and open files to watch come in, hints which log to look at go out.
//!
//! A hint is never the truth, only a reason to look: the truth comes from `statx` and `pread`. Hence nothing is lost
//! when the queue overflows, and nothing is believed when a watch reports a name that is no longer right.
//!
//! Why not the crate `notify`: measured, its latency is the same (10-20 us) at twice the CPU time, and it hides what
//! we need: it keeps reporting the old path of a renamed file, shows a queue overflow only as a flag that may come
//! without a path, starts a thread, and cannot watch the inode that is *already open*. We watch `/proc/self/fd/N`, so
//! "open A, rename A, watch B" cannot happen.

use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use hashbrown::HashMap;
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;

use super::glob::Interest;
use super::{Error, LogId};

/// Never IN_OPEN, IN_ACCESS or IN_CLOSE_NOWRITE: our own reads would wake us. No DELETE_SELF: it cannot come while the
/// file is held open (a deleted log shows as IN_ATTRIB, its link count fell to 0).
const FILE: WatchFlags =
    WatchFlags::MODIFY.union(WatchFlags::ATTRIB).union(WatchFlags::CLOSE_WRITE).union(WatchFlags::MOVE_SELF);
/// For a directory of which only its own fate matters: no wake-ups for what others do in `/tmp` or `/`.
const DIRECTORY: WatchFlags = WatchFlags::DELETE_SELF.union(WatchFlags::MOVE_SELF).union(WatchFlags::ONLYDIR);
const NAMES: WatchFlags =
    WatchFlags::CREATE.union(WatchFlags::MOVED_TO).union(WatchFlags::MOVED_FROM).union(WatchFlags::DELETE);

/// Length of the fixed part of `struct inotify_event`: wd, mask, cookie, len, four bytes each (inotify(7)).
const HEADER_BYTES: usize = 16;
/// Longest name in an event, with its NUL (`NAME_MAX + 1`).
const NAME_BYTES_MAX: usize = 256;
const BUFFER_BYTES: usize = 64 * 1024;
/// So that a writer who is faster than we cannot keep us from reading files: the queue's length by default, times 16.
const READS_MAX: usize = 64;

/// A reason to look at something.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Hint {
    /// The file behind this watch may have grown, shrunk or been rewritten.
    Data(LogId, i32),
    /// The file behind this watch was moved, deleted or changed its mode: look at the path too.
    Path(LogId, i32),
    /// The kernel has removed this watch.
    Lost(LogId, i32),
    /// Names this request depends on have changed.
    Names(usize),
    /// The kernel's queue overflowed: anything may have changed.
    Everything,
}

#[derive(Debug)]
enum Owner {
    Log(LogId),
    Request { index: usize, interest: Interest },
}

/// All watches. Invariant: an inode has one watch descriptor however many names lead to it, so each descriptor has a
/// list of owners, and the watch is removed with the last of them.
pub(super) struct Watcher {
    fd: OwnedFd,
    buffer: Vec<u8>,
    owners: HashMap<i32, Vec<Owner>>,
    /// Why there is no inotify at all; then `fd` is a descriptor that never becomes readable.
    absent: Option<Errno>,
    #[cfg(test)]
    pub(super) watches_max: Option<usize>,
}

impl Watcher {
    pub(super) fn new() -> Result<Self, Error> {
        Self::with(inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK))
    }

    /// Instances are few (128 for each user by default): without one the daemon still works, by polling.
    pub(super) fn with(inotify: Result<OwnedFd, Errno>) -> Result<Self, Error> {
        let (fd, absent) = match inotify {
            Ok(fd) => (fd, None),
            Err(errno) => {
                let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
                let placeholder =
                    rustix::event::eventfd(0, flags).map_err(|errno| Error::Notifications(errno.into()))?;
                (placeholder, Some(errno))
            }
        };
        Ok(Self {
            fd,
            buffer: vec![0; BUFFER_BYTES],
            owners: HashMap::new(),
            absent,
            #[cfg(test)]
            watches_max: None,
        })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Watches the inode behind an open file.
    pub(super) fn watch_file(&mut self, log: LogId, file: BorrowedFd<'_>) -> Result<i32, Errno> {
        let wd = self.add(Path::new(&format!("/proc/self/fd/{}", file.as_raw_fd())), FILE)?;
        self.owners.entry(wd).or_default().push(Owner::Log(log));
        Ok(wd)
    }

    /// Watches a directory for one request; `attributes` also reports changed modes of what is in it.
    pub(super) fn watch_directory(
        &mut self,
        index: usize,
        directory: &Path,
        interest: Interest,
        attributes: bool,
    ) -> Result<(), Errno> {
        let mut mask = DIRECTORY | WatchFlags::MASK_ADD;
        if interest != Interest::Itself {
            mask |= NAMES;
            if attributes {
                mask |= WatchFlags::ATTRIB;
            }
        }
        let wd = self.add(directory, mask)?;
        self.owners.entry(wd).or_default().push(Owner::Request { index, interest });
        Ok(())
    }

    fn add(&self, path: &Path, mask: WatchFlags) -> Result<i32, Errno> {
        if let Some(errno) = self.absent {
            return Err(errno);
        }
        #[cfg(test)]
        if self.watches_max.is_some_and(|most| self.owners.len() >= most) {
            return Err(Errno::NOSPC);
        }
        inotify::add_watch(&self.fd, path, mask)
    }

    /// Ends one log's interest in an inode.
    pub(super) fn release_file(&mut self, log: LogId, wd: i32) {
        let Some(owners) = self.owners.get_mut(&wd) else { return };
        if let Some(at) = owners.iter().position(|owner| matches!(owner, Owner::Log(id) if *id == log)) {
            owners.swap_remove(at);
        }
        if owners.is_empty() {
            self.owners.remove(&wd);
            // Fails only when the kernel removed it already.
            let _ = inotify::remove_watch(&self.fd, wd);
        }
    }

    /// Hands a watch from one log to another.
    pub(super) fn pass_on(&mut self, from: LogId, to: LogId, wd: i32) {
        for owner in self.owners.get_mut(&wd).into_iter().flatten() {
            match owner {
                Owner::Log(id) if *id == from => {
                    *id = to;
                    return;
                }
                Owner::Log(_) | Owner::Request { .. } => {}
            }
        }
    }

    /// Forgets what a request (or, with `None`, every request) watched; the watches stay until [`Self::sweep`], so that
    /// those which are wanted again miss nothing.
    pub(super) fn forget_requests(&mut self, which: Option<usize>) {
        for owners in self.owners.values_mut() {
            owners.retain(|owner| match owner {
                Owner::Log(_) => true,
                Owner::Request { index, .. } => which.is_some_and(|which| which != *index),
            });
        }
    }

    /// Removes the watches nobody owns any more.
    pub(super) fn sweep(&mut self) {
        let fd = &self.fd;
        self.owners.retain(|wd, owners| {
            if owners.is_empty() {
                let _ = inotify::remove_watch(fd, *wd);
            }
            !owners.is_empty()
        });
    }

    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.owners.len()
    }

    /// Takes all events there are, without blocking, and turns them into hints.
    pub(super) fn drain(&mut self, hint: &mut dyn FnMut(Hint)) {
        if self.absent.is_some() {
            return;
        }
        for _ in 0..READS_MAX {
            let length = match rustix::io::retry_on_intr(|| rustix::io::read(&self.fd, self.buffer.as_mut_slice())) {
                Ok(length) => length,
                Err(_) => return,
            };
            let mut rest = &self.buffer[..length];
            while let Some((event, behind)) = split_event(rest) {
                if tell(&self.owners, &event, hint) {
                    self.owners.remove(&event.wd);
                }
                rest = behind;
            }
            // A read that left room for one more event has emptied the queue: saves the read that says EAGAIN.
            if length + HEADER_BYTES + NAME_BYTES_MAX <= BUFFER_BYTES {
                return;
            }
        }
    }
}

/// Why something is polled, for the operator.
pub(super) fn why_polled(errno: Errno) -> String {
    match errno {
        Errno::NOSPC => "no inotify watch is left; raise the sysctl fs.inotify.max_user_watches".to_owned(),
        Errno::MFILE => "no inotify instance is left; raise the sysctl fs.inotify.max_user_instances".to_owned(),
        other => format!("inotify refuses to watch it: {other}"),
    }
}

struct Event<'a> {
    wd: i32,
    flags: ReadFlags,
    name: &'a OsStr,
}

/// Takes `struct inotify_event` apart (inotify(7)); a name is padded with NULs.
fn split_event(bytes: &[u8]) -> Option<(Event<'_>, &[u8])> {
    let word = |at: usize| bytes.get(at..at + 4).and_then(|word| <[u8; 4]>::try_from(word).ok());
    let wd = i32::from_ne_bytes(word(0)?);
    let flags = ReadFlags::from_bits_retain(u32::from_ne_bytes(word(4)?));
    let end = HEADER_BYTES + usize::try_from(u32::from_ne_bytes(word(12)?)).ok()?;
    let padded = bytes.get(HEADER_BYTES..end)?;
    let name = &padded[..memchr::memchr(0, padded).unwrap_or(padded.len())];
    Some((Event { wd, flags, name: OsStr::from_bytes(name) }, &bytes[end..]))
}

/// Gives an event to the owners of its watch; true if the kernel has removed that watch. Events of watches we have
/// removed arrive late and find no owner.
fn tell(owners: &HashMap<i32, Vec<Owner>>, event: &Event<'_>, hint: &mut dyn FnMut(Hint)) -> bool {
    if event.flags.contains(ReadFlags::QUEUE_OVERFLOW) {
        hint(Hint::Everything);
        return false;
    }
    let lost = event.flags.contains(ReadFlags::IGNORED);
    for owner in owners.get(&event.wd).into_iter().flatten() {
        match owner {
            Owner::Log(id) if lost => hint(Hint::Lost(*id, event.wd)),
            Owner::Log(id) if event.flags.intersects(ReadFlags::MODIFY | ReadFlags::CLOSE_WRITE) => {
                hint(Hint::Data(*id, event.wd));
            }
            Owner::Log(id) => hint(Hint::Path(*id, event.wd)),
            Owner::Request { index, interest } => {
                if event.name.is_empty() || interest.covers(event.name) {
                    hint(Hint::Names(*index));
                }
            }
        }
    }
    lost
}
