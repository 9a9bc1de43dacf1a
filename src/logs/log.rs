//! One watched path and the generations of its file: "look at it" comes in, its new lines go out in the order they were
//! written, whatever rotation did meanwhile. It does not know patterns, and trusts no event: it looks for itself.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;

use super::generation::{Generation, Identity, Position, Pumped, Tap};
use super::locate::locate;
use super::rotation::Why;
use super::siblings::Stand;
use super::watch::Watcher;
use super::{LogId, LogInfo, Sink, StampOf, State};
use crate::engine::time::{Span, Timestamp};

/// The most one log may read in a turn, so that one flood does not starve the others.
const TURN_BYTES: usize = 1024 * 1024;
/// Logs are only nearly sorted by date: start this much earlier.
const MARGIN: Span = Span::from_seconds(60);
/// How often a path may be replaced under our eyes before the other logs get their turn.
const ROUNDS_MAX: usize = 16;

/// All logs; one is taken out of its place while it is looked at, so that it can see the others.
pub(super) type Logs = BTreeMap<LogId, Option<Box<Log>>>;

/// What one look at a log may use.
pub(super) struct Desk<'a> {
    pub(super) now: Timestamp,
    pub(super) watcher: &'a mut Watcher,
    pub(super) buffer: &'a mut [u8],
    pub(super) others: &'a mut Logs,
    pub(super) stamp_of: &'a mut StampOf<'a>,
    pub(super) sink: &'a mut Sink<'a>,
}

/// One path. Invariant: `old` is in the order of writing and is read before `current`; no file is in both.
pub(super) struct Log {
    pub(super) id: LogId,
    pub(super) path: PathBuf,
    pub(super) requests: Vec<usize>,
    pub(super) since: Span,
    /// Something stood at the path when watching began, so its lines so far are backlog.
    pub(super) existed: bool,
    pub(super) current: Option<Generation>,
    pub(super) old: Vec<Generation>,
    pub(super) known: VecDeque<Position>,
    /// The path without links, as it was when `current` was opened.
    pub(super) real: PathBuf,
    /// Birth of the youngest file that was counted as a generation of this log: only later ones can be unseen. `None`
    /// before the first look.
    pub(super) newest_ns: Option<i64>,
    /// Siblings not born before `newest_ns` that need no reading (file clocks are coarse: births can be equal).
    pub(super) settled: Vec<Identity>,
    pub(super) wrong: Option<String>,
    pub(super) same_as: Option<PathBuf>,
    pub(super) polling: Option<String>,
    pub(super) queued: bool,
    pub(super) check_path: bool,
    /// It gave up a file that another log of the same requests may have a name for.
    pub(super) let_others_look: bool,
    more: bool,
    pub(super) lines_cut: u64,
    pub(super) bytes: u64,
    pub(super) rotations: u64,
}

impl Log {
    pub(super) fn new(id: LogId, path: PathBuf) -> Self {
        Self {
            id,
            real: path.clone(),
            path,
            requests: Vec::new(),
            since: Span(0),
            existed: false,
            current: None,
            old: Vec::new(),
            known: VecDeque::new(),
            newest_ns: None,
            settled: Vec::new(),
            wrong: None,
            same_as: None,
            polling: None,
            queued: false,
            check_path: true,
            let_others_look: false,
            more: false,
            lines_cut: 0,
            bytes: 0,
            rotations: 0,
        }
    }

    /// Reads what is new; true if there is more at once.
    pub(super) fn attend(&mut self, desk: &mut Desk<'_>) -> bool {
        let mut budget = TURN_BYTES;
        self.more = false;
        for _ in 0..ROUNDS_MAX {
            if !self.read(desk, &mut budget) {
                self.more = true;
                return true;
            }
            // The path is looked at after everything known was read, and again until it stays the same.
            if !self.check_path || self.look(desk) {
                self.check_path = false;
                self.retire(desk);
                return false;
            }
        }
        self.more = true;
        true
    }

    /// Reads the generations in order; false if the budget ended before the data.
    fn read(&mut self, desk: &mut Desk<'_>, budget: &mut usize) -> bool {
        loop {
            let mut at = 0;
            while at < self.old.len() {
                let before = self.old[at].position.offset;
                match self.old[at].dirty.then(|| self.pump(Some(at), desk, budget)) {
                    Some(Ok(Pumped::More)) => return false,
                    Some(Ok(Pumped::Broken) | Err(_)) => {
                        // Rewritten after it was rotated away: its new content is no log of ours.
                        let gone = self.old.remove(at);
                        self.let_go(gone, desk);
                        continue;
                    }
                    Some(Ok(Pumped::Drained)) | None => {}
                }
                if self.old[at].position.offset != before {
                    self.old[at].quiet_since = desk.now;
                }
                at += 1;
            }
            if !self.current.as_ref().is_some_and(|current| current.dirty) {
                return true;
            }
            self.locate(desk);
            // Nothing read of this one yet: its first lines may already be in a copy (`copytruncate`) we have not seen.
            let untouched = self.current.as_ref().is_some_and(|current| current.position.offset == 0);
            if untouched && self.adopt_unseen(&Why::Untouched) {
                continue;
            }
            match self.pump(None, desk, budget) {
                Ok(Pumped::Drained) => {
                    self.wrong = None;
                    return true;
                }
                Ok(Pumped::More) => return false,
                Ok(Pumped::Broken) => self.start_again(),
                Err(errno) => {
                    self.wrong = Some(format!("cannot be read: {errno}"));
                    if let Some(current) = &mut self.current {
                        current.dirty = false;
                    }
                    return true;
                }
            }
        }
    }

    fn pump(
        &mut self,
        old: Option<usize>,
        desk: &mut Desk<'_>,
        budget: &mut usize,
    ) -> Result<Pumped, rustix::io::Errno> {
        let generation = match old {
            Some(at) => self.old.get_mut(at),
            None => self.current.as_mut(),
        };
        let Some(generation) = generation else { return Ok(Pumped::Drained) };
        let mut tap = Tap { log: self.id, sink: &mut *desk.sink, bytes: 0, lines_cut: 0 };
        let pumped = generation.pump(desk.buffer, &mut tap, budget);
        self.bytes += tap.bytes;
        self.lines_cut += tap.lines_cut;
        pumped
    }

    /// Finds where to start in a file that was there before us.
    fn locate(&mut self, desk: &mut Desk<'_>) {
        let Some(current) = &mut self.current else { return };
        let Some(size) = current.unlocated.take() else { return };
        let target = desk.now - self.since - MARGIN;
        let id = self.id;
        let start = locate(&current.file, size, target, &mut |line| (desk.stamp_of)(id, line));
        current.position = Position::within(current.position.identity, &current.file, start.offset, start.inside_line);
        current.backlog_end = start.end;
    }

    /// The current file was emptied or rewritten in place: what we had not read of it may be in a copy.
    fn start_again(&mut self) {
        let Some(current) = &mut self.current else { return };
        let start = Position::start_of(current.position.identity);
        let before = std::mem::replace(&mut current.position, start);
        current.backlog_end = 0;
        current.dirty = true;
        self.rotations += 1;
        self.adopt_unseen(&Why::Emptied(&before));
    }

    /// Ends all watches of this log.
    pub(super) fn release(&mut self, watcher: &mut Watcher) {
        for wd in self.current.iter().chain(&self.old).filter_map(|generation| generation.watch) {
            watcher.release_file(self.id, wd);
        }
    }

    /// Marks the generation behind a watch as worth reading; `lost` if the watch is gone.
    pub(super) fn mark(&mut self, wd: i32, lost: bool) {
        for generation in self.current.iter_mut().chain(&mut self.old).filter(|one| one.watch == Some(wd)) {
            generation.dirty = true;
            if lost {
                generation.watch = None;
            }
        }
    }

    /// Marks everything as worth looking at.
    pub(super) fn mark_all(&mut self) {
        self.check_path = true;
        for generation in self.current.iter_mut().chain(&mut self.old) {
            generation.dirty = true;
        }
    }

    /// Nothing is left of it: no file, no old ones, nothing amiss.
    pub(super) fn is_gone(&self) -> bool {
        self.current.is_none() && self.old.is_empty() && self.wrong.is_none() && self.same_as.is_none()
    }

    /// How it stands; `polling` is the reason if its directories are polled.
    pub(super) fn info(&self, polling: Option<&String>) -> LogInfo {
        let state = match (&self.wrong, &self.same_as, &self.current) {
            (Some(sentence), _, _) => State::Unreadable(sentence.clone()),
            (None, Some(path), _) => State::SameAs(path.clone()),
            (None, None, None) => State::Waiting,
            (None, None, Some(current)) => match self.polling.as_ref().or(polling) {
                Some(sentence) => State::Polling(sentence.clone()),
                None if self.more || self.queued || current.dirty => State::Reading,
                None => State::CaughtUp,
            },
        };
        LogInfo {
            id: self.id,
            path: self.path.clone(),
            requests: self.requests.clone(),
            state,
            offset: self.current.as_ref().map_or(0, |current| current.position.offset),
            size: self.current.as_ref().and_then(|current| Stand::of(&current.file).ok()).map_or(0, |stand| stand.size),
            lines_cut: self.lines_cut,
            bytes: self.bytes,
            rotations: self.rotations,
        }
    }
}
