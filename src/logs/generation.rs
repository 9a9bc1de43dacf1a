//! One open file of a log: its bytes come in, whole lines go out in chunks, and a [`Position`] says how far it was read.
//!
//! One `pread` does it all: it starts up to 512 bytes *before* the offset. If these bytes are not what we remember, the
//! file was emptied or rewritten, even when it has grown past the offset since; what follows them is new. It does not
//! know paths or rotation.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::SeekFrom;
use rustix::io::{Errno, pread, retry_on_intr};

use super::siblings::Stand;
use super::{CHUNK_BYTES, Chunk, LINE_BYTES_MAX, LogId, Sink};
use crate::engine::time::Timestamp;

/// Long enough that two different places of a log are never equal by chance, short enough to cost 0.06 us (measured).
pub(super) const WINDOW_BYTES: usize = 512;

/// The buffer a pump reads into: the window, the new bytes, and a newline for a last line without one.
pub(super) const BUFFER_BYTES: usize = WINDOW_BYTES + CHUNK_BYTES + 1;

/// Which file this is, whatever its name. The birth time is needed because ext4 gives a deleted inode's number to the
/// very next file.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Identity {
    /// Device number, major above minor.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
    /// Birth time in nanoseconds since 1970; 0 where the file system keeps none.
    pub born_ns: i64,
}

/// Up to 512 bytes of a file, remembered to recognize it by.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Window {
    bytes: [u8; WINDOW_BYTES],
    length: usize,
}

impl Window {
    const EMPTY: Self = Self { bytes: [0; WINDOW_BYTES], length: 0 };
    const NULS: Self = Self { bytes: [0; WINDOW_BYTES], length: WINDOW_BYTES };

    /// The bytes remembered.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    pub(super) fn len(&self) -> usize {
        self.length
    }

    /// Remembers the last 512 bytes of `bytes`.
    fn set_tail(&mut self, bytes: &[u8]) {
        let bytes = &bytes[bytes.len().saturating_sub(WINDOW_BYTES)..];
        self.bytes[..bytes.len()].copy_from_slice(bytes);
        self.length = bytes.len();
    }

    /// Reads a window of a file; shorter at its end, empty on an error.
    pub(super) fn read(file: impl AsFd, offset: u64, length: usize) -> Self {
        let mut window = Self::EMPTY;
        let wanted = length.min(WINDOW_BYTES);
        window.length = retry_on_intr(|| pread(&file, &mut window.bytes[..wanted], offset)).unwrap_or(0);
        window
    }
}

/// Whether a file holds exactly `window` at `offset`.
pub(super) fn same_at(file: impl AsFd, offset: u64, window: &Window) -> bool {
    Window::read(file, offset, window.len()).bytes() == window.bytes()
}

/// How far a file has been read: all that a later run needs to go on where this one stopped.
///
/// Invariant: `tail` is the `min(512, offset)` bytes before `offset`. `offset` is the start of a line unless `skipping`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Position {
    /// Which file.
    pub identity: Identity,
    /// Everything before this byte has been passed on (or skipped as part of a line too long).
    pub offset: u64,
    /// The first bytes of the file, as far as they have been read.
    pub head: Window,
    /// The bytes before the offset.
    pub tail: Window,
    /// The offset is inside a line that was cut; what follows up to its newline is not passed on.
    pub skipping: bool,
}

impl Position {
    /// The beginning of a file.
    pub fn start_of(identity: Identity) -> Self {
        Self { identity, offset: 0, head: Window::EMPTY, tail: Window::EMPTY, skipping: false }
    }

    /// A place in the middle of a file, with what surrounds it.
    pub(super) fn within(identity: Identity, file: impl AsFd, offset: u64, skipping: bool) -> Self {
        let (near, length) = (offset.saturating_sub(WINDOW_BYTES as u64), offset.min(WINDOW_BYTES as u64) as usize);
        let tail = Window::read(&file, near, length);
        Self { identity, offset, head: Window::read(&file, 0, length), tail, skipping }
    }

    /// Takes over what was read: `buffer` starts with the tail, followed by `consumed` bytes behind the offset.
    fn advance(&mut self, buffer: &[u8], consumed: usize) {
        let end = self.tail.len() + consumed;
        let from_start = self.tail.len() as u64 == self.offset;
        // The tail covers the whole file until the head is full, so the head is in the buffer without another read.
        if from_start && self.head.len() < WINDOW_BYTES {
            let head = &buffer[..end.min(WINDOW_BYTES)];
            self.head.set_tail(head);
        }
        self.tail.set_tail(&buffer[..end]);
        self.offset += consumed as u64;
    }
}

/// How a pump ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pumped {
    /// Everything up to the end was read, but for an unfinished last line.
    Drained,
    /// The budget is used up.
    More,
    /// What was there before the offset has changed: the file was emptied or rewritten.
    Broken,
}

/// Where chunks go, and what is counted on the way.
pub(super) struct Tap<'a> {
    pub(super) log: LogId,
    pub(super) sink: &'a mut Sink<'a>,
    pub(super) bytes: u64,
    pub(super) lines_cut: u64,
}

impl Tap<'_> {
    /// Passes whole lines on: without the NULs in front of a line (a hole left by a writer who went on at his old
    /// offset after a truncation, or by a power cut), and backlog apart from what is live.
    fn emit(&mut self, mut bytes: &[u8], mut offset: u64, backlog_end: u64, cut_lines: u32) {
        let mut searched = 0;
        while let Some(found) = memchr::memchr(0, &bytes[searched..]) {
            let nul = searched + found;
            let length = bytes[nul..].iter().take_while(|byte| **byte == 0).count();
            if nul == 0 || bytes[nul - 1] == b'\n' {
                self.pass(&bytes[..nul], offset, backlog_end, 0);
                offset += (nul + length) as u64;
                bytes = &bytes[nul + length..];
                searched = 0;
            } else {
                searched = nul + length;
            }
        }
        self.pass(bytes, offset, backlog_end, cut_lines);
    }

    fn pass(&mut self, bytes: &[u8], offset: u64, backlog_end: u64, cut_lines: u32) {
        // A line is backlog if it starts before the end of what was there at first sight.
        let old = usize::try_from(backlog_end.saturating_sub(offset)).unwrap_or(usize::MAX).min(bytes.len());
        let split = match old.checked_sub(1) {
            None => 0,
            Some(last) => memchr::memchr(b'\n', &bytes[last..]).map_or(bytes.len(), |newline| last + newline + 1),
        };
        let (backlog, live) = bytes.split_at(split);
        for (bytes, offset, live, last) in
            [(backlog, offset, false, live.is_empty()), (live, offset + split as u64, true, true)]
        {
            if !bytes.is_empty() {
                let cut_lines = if last { cut_lines } else { 0 };
                self.bytes += bytes.len() as u64;
                self.lines_cut += u64::from(cut_lines);
                (self.sink)(Chunk { log: self.log, bytes, offset, live, cut_lines });
            }
        }
    }
}

/// One open file.
pub(super) struct Generation {
    pub(super) file: OwnedFd,
    pub(super) position: Position,
    /// Its inotify watch, if it has one.
    pub(super) watch: Option<i32>,
    /// There may be something to read.
    pub(super) dirty: bool,
    /// It was there before watching began, this long, and where to start has not been looked up yet.
    pub(super) unlocated: Option<u64>,
    /// Lines that start before this offset are backlog.
    pub(super) backlog_end: u64,
    /// On a file system of another machine: no events, and reads may come back short.
    pub(super) remote: bool,
    /// Since when nothing has been read from it (set when it is rotated away).
    pub(super) quiet_since: Timestamp,
}

impl Generation {
    pub(super) fn new(file: OwnedFd, position: Position) -> Self {
        Self {
            file,
            position,
            watch: None,
            dirty: true,
            unlocated: None,
            backlog_end: 0,
            remote: false,
            quiet_since: Timestamp(0),
        }
    }

    /// Reads what is new, at most about `budget` bytes, which it reduces.
    pub(super) fn pump(&mut self, buffer: &mut [u8], tap: &mut Tap<'_>, budget: &mut usize) -> Result<Pumped, Errno> {
        loop {
            let keep = self.position.tail.len();
            let wanted = keep + CHUNK_BYTES;
            let start = self.position.offset - keep as u64;
            let length = retry_on_intr(|| pread(&self.file, &mut buffer[..wanted], start))?;
            if length < keep || buffer[..keep] != *self.position.tail.bytes() {
                return Ok(Pumped::Broken);
            }
            let consumed = self.deliver(buffer, keep, length, tap);
            self.position.advance(buffer, consumed);
            *budget = budget.saturating_sub(consumed);
            let ended = if self.remote { consumed == 0 } else { length < wanted };
            if ended || (consumed == 0 && !self.leap()) {
                self.dirty = false;
                return Ok(Pumped::Drained);
            }
            if *budget == 0 {
                return Ok(Pumped::More);
            }
        }
    }

    /// Passes on the whole lines in `buffer[keep..length]`; returns how many bytes are done with. NULs at the end are
    /// space reserved in advance, so they count as not there yet.
    fn deliver(&mut self, buffer: &mut [u8], keep: usize, length: usize, tap: &mut Tap<'_>) -> usize {
        let end = buffer[keep..length].iter().rposition(|byte| *byte != 0).map_or(keep, |last| keep + last + 1);
        let start = self.position.offset - keep as u64;
        let mut from = keep;
        if self.position.skipping {
            match memchr::memchr(b'\n', &buffer[from..end]) {
                Some(newline) => from += newline + 1,
                None => return end - keep,
            }
            self.position.skipping = false;
        }
        // Whole lines not yet passed on: buffer[from..to]. `to` is always the start of a line.
        let mut to = from;
        while to < end {
            if buffer[to] == 0 {
                tap.emit(&buffer[from..to], start + from as u64, self.backlog_end, 0);
                to += buffer[to..end].iter().take_while(|byte| **byte == 0).count();
                from = to;
                continue;
            }
            // From the far end: a whole block of lines is accepted with one short search.
            let limit = end.min(to + LINE_BYTES_MAX + 1);
            if let Some(newline) = memchr::memrchr(b'\n', &buffer[to..limit]) {
                to += newline + 1;
                continue;
            }
            if limit - to <= LINE_BYTES_MAX {
                break;
            }
            let cut = to + LINE_BYTES_MAX;
            let covered = std::mem::replace(&mut buffer[cut], b'\n');
            tap.emit(&buffer[from..=cut], start + from as u64, self.backlog_end, 1);
            buffer[cut] = covered;
            match memchr::memchr(b'\n', &buffer[cut..end]) {
                Some(newline) => to = cut + newline + 1,
                None => {
                    self.position.skipping = true;
                    return end - keep;
                }
            }
            from = to;
        }
        tap.emit(&buffer[from..to], start + from as u64, self.backlog_end, 0);
        to - keep
    }

    /// After a whole chunk of NULs: goes on behind them if they are a hole in the middle; false if they are reserved
    /// space at the end.
    fn leap(&mut self) -> bool {
        let behind = self.position.offset + CHUNK_BYTES as u64;
        let next = match rustix::fs::seek(&self.file, SeekFrom::Data(behind)) {
            Ok(data) => data,
            Err(Errno::NXIO) => return false,
            Err(_) => behind,
        };
        // Zeros written out look like data; what the last byte is tells reserved space from a gap.
        let Ok(stand) = Stand::of(&self.file) else { return false };
        let last = Window::read(&self.file, stand.size.saturating_sub(1), 1);
        if next == behind && last.bytes() == [0] {
            return false;
        }
        if self.position.offset < WINDOW_BYTES as u64 && self.position.head.len() == 0 {
            self.position.head = Window::NULS;
        }
        self.position.tail = Window::NULS;
        self.position.offset = next;
        true
    }

    /// Passes on the unfinished last line of a file that will not be read any more.
    pub(super) fn finish(&mut self, buffer: &mut [u8], tap: &mut Tap<'_>) {
        let keep = self.position.tail.len();
        let start = self.position.offset - keep as u64;
        let wanted = keep + LINE_BYTES_MAX;
        let Ok(length) = retry_on_intr(|| pread(&self.file, &mut buffer[..wanted], start)) else { return };
        if self.position.skipping || length < keep || buffer[..keep] != *self.position.tail.bytes() {
            return;
        }
        let line = &buffer[keep..length];
        let Some(first) = line.iter().position(|byte| *byte != 0) else { return };
        let end = line.iter().rposition(|byte| *byte != 0).map_or(keep, |last| keep + last + 1);
        buffer[end] = b'\n';
        tap.emit(&buffer[keep + first..=end], self.position.offset + first as u64, self.backlog_end, 0);
        self.position.advance(buffer, end - keep);
    }
}
