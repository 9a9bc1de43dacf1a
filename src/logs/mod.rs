//! Where lines come from: paths and globs of log files come in, chunks of whole lines go out.
//!
//! What it does not do: it never reads the clock (`now` is an argument), never starts a thread, never blocks, and knows
//! nothing of what a line means. Reading order: `tailer` (all logs, one turn), `log` (one path and its generations),
//! `rotation` (which file is the present one), `generation` (one open file), `siblings` (rotated neighbours), `locate`
//! (where to start), `watch` (inotify), `glob`.

use std::path::PathBuf;

use crate::engine::time::{Span, Timestamp};

mod generation;
mod glob;
mod locate;
mod log;
mod rotation;
mod siblings;
mod tailer;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod torture;
mod watch;

pub use generation::{Identity, Position, Window};
pub use tailer::Tailer;

/// The longest line that is passed on whole, in bytes without its newline; the rest of a longer one is skipped.
pub const LINE_BYTES_MAX: usize = 64 * 1024;

/// The most bytes one chunk holds: large enough that a literal prefilter runs at full speed, small enough for the cache.
pub const CHUNK_BYTES: usize = 256 * 1024;

/// Number of a watched log *file path* (a glob gives several); never used again for another path.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug, Ord, PartialOrd)]
pub struct LogId(pub u32);

/// What one request to watch asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// An absolute path, or one with `*`, `?` or `[…]` in any component (`**` is not known).
    pub pattern: String,
    /// How far back to start in a file that already exists when watching begins.
    pub since: Span,
}

/// Reads the moment of a line (given without its newline); `None` when it has none. Used only to find where to start.
pub type StampOf<'a> = dyn FnMut(LogId, &[u8]) -> Option<Timestamp> + 'a;

/// Takes the chunks of a turn.
pub type Sink<'a> = dyn FnMut(Chunk<'_>) + 'a;

/// Whole lines of one log, borrowed for the time of one call.
#[derive(Clone, Copy, Debug)]
pub struct Chunk<'a> {
    /// Whose lines.
    pub log: LogId,
    /// Whole lines, each with its `\n`; a `\r` before it is kept. Never empty.
    pub bytes: &'a [u8],
    /// Where in its file the first byte stands.
    pub offset: u64,
    /// False for lines that were there before watching began (the backlog).
    pub live: bool,
    /// How many lines of this chunk were cut at [`LINE_BYTES_MAX`].
    pub cut_lines: u32,
}

/// What a turn left behind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Turn {
    /// There is more to read at once: call again without waiting.
    pub more: bool,
    /// [`Tailer::logs`] names other logs than before. A new log is first read in the turn after the one that found it.
    pub logs_changed: bool,
}

/// A path that cannot be watched as asked, and why, in one sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Complaint {
    /// The path or pattern of the request.
    pub path: String,
    /// One sentence, without the path.
    pub sentence: String,
}

/// How a log stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Nothing has that name yet (or any more); the directory is watched.
    Waiting,
    /// Some of what is there has not been read yet.
    Reading,
    /// Everything there has been read.
    CaughtUp,
    /// There is something, but no log can be read from it; the sentence says why. Looked at again when it changes.
    Unreadable(String),
    /// The kernel cannot tell about changes, so the file is looked at every second; the sentence says why.
    Polling(String),
    /// The very file that another log of the same request already reads (a link, for instance); it is read there.
    SameAs(PathBuf),
}

/// One log, for the operator and for the caller's table of which jail reads what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogInfo {
    /// Its number.
    pub id: LogId,
    /// Its path as asked for.
    pub path: PathBuf,
    /// Indices of the requests that name it, ascending.
    pub requests: Vec<usize>,
    /// How it stands.
    pub state: State,
    /// How far the present file has been read, in bytes.
    pub offset: u64,
    /// The present file's size in bytes.
    pub size: u64,
    /// Lines cut at [`LINE_BYTES_MAX`] so far.
    pub lines_cut: u64,
    /// Bytes passed on so far.
    pub bytes: u64,
    /// How often another file, or the same one emptied, took its place.
    pub rotations: u64,
}

/// Why no tailer could be made; everything later is a state of one log, never an error.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not even a placeholder for the notification descriptor could be opened.
    #[error("cannot open a descriptor for file notifications: {0}")]
    Notifications(#[source] std::io::Error),
}
