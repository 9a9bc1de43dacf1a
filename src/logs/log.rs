//! One watched path and the generations of its file: "look at it" comes in, its new lines go out in the order they were
//! written, whatever rotation did meanwhile. It does not know patterns, and trusts no event: it looks for itself.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use rustix::fs::OFlags;

use super::generation::{Generation, Identity, Position, Pumped, Tap, WINDOW_BYTES, Window};
use super::locate::locate;
use super::siblings::{self, Absent, Stand};
use super::watch::Watcher;
use super::{LogId, LogInfo, Sink, StampOf, State};
use crate::engine::time::{Span, Timestamp};

/// The most one log may read in a turn, so that one flood does not starve the others.
const TURN_BYTES: usize = 1024 * 1024;
/// Rotated files kept open: each holds a descriptor and, if deleted, its disk space.
const OLD_MAX: usize = 8;
/// How long a rotated file must have been silent before it is let go.
const QUIET: Span = Span::from_seconds(600);
/// Positions of files let go, in case one of them gets its name back.
const KNOWN_MAX: usize = 16;
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
    known: VecDeque<Position>,
    /// The path without links, as it was when `current` was opened.
    real: PathBuf,
    /// Birth of the youngest file that was counted as a generation of this log: only later ones can be unseen. `None`
    /// before the first look.
    newest_ns: Option<i64>,
    /// Siblings not born before `newest_ns` that need no reading (file clocks are coarse: births can be equal).
    settled: Vec<Identity>,
    pub(super) wrong: Option<String>,
    pub(super) same_as: Option<PathBuf>,
    pub(super) polling: Option<String>,
    pub(super) queued: bool,
    pub(super) check_path: bool,
    /// It gave up a file that another log of the same requests may have a name for.
    pub(super) let_others_look: bool,
    more: bool,
    lines_cut: u64,
    bytes: u64,
    rotations: u64,
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

    /// Compares what stands at the path with what is read; true if nothing had to change.
    pub(super) fn look(&mut self, desk: &mut Desk<'_>) -> bool {
        let found = siblings::regular(&self.path).and_then(|stand| {
            let same = self.current.as_ref().is_some_and(|current| current.position.identity == stand.identity);
            if same { Ok(None) } else { siblings::open(&self.path, OFlags::empty()).map(Some) }
        });
        match found {
            Ok(None) => {
                // `wrong` stays: if there is any with an open file, it is about reading it.
                self.watch_files(desk)
            }
            Ok(Some((file, stand))) => {
                self.wrong = None;
                let demoted = self.demote(desk.now);
                self.adopt(file, stand, desk) && !demoted
            }
            Err(absent) => {
                self.wrong = match absent {
                    Absent::Missing => {
                        self.existed = false;
                        None
                    }
                    Absent::Wrong(sentence) => Some(sentence),
                };
                self.same_as = None;
                self.remember_siblings();
                !self.demote(desk.now)
            }
        }
    }

    /// The current file has lost its name; it is read on, for its writer may not know yet.
    fn demote(&mut self, now: Timestamp) -> bool {
        let Some(mut current) = self.current.take() else { return false };
        current.dirty = true;
        current.quiet_since = now;
        self.old.push(current);
        self.let_others_look = true;
        true
    }

    /// Takes a file as the current one; true if it is read by another log of the same requests, so not here.
    fn adopt(&mut self, file: OwnedFd, stand: Stand, desk: &mut Desk<'_>) -> bool {
        let identity = stand.identity;
        let real = std::fs::canonicalize(&self.path).unwrap_or_else(|_| self.path.clone());
        let moved = std::mem::replace(&mut self.real, real) != self.real;
        if let Some(at) = self.old.iter().position(|old| old.position.identity == identity) {
            self.current = Some(self.old.remove(at));
            return false;
        }
        self.same_as = None;
        let mut adopted = match self.take_over(identity, desk) {
            TakenOver::Elsewhere(path) => {
                self.same_as = Some(path);
                self.existed = false;
                return true;
            }
            TakenOver::Generation(generation) => generation,
            TakenOver::Position(position) => Generation::new(file, position),
            TakenOver::Nothing => {
                let mut fresh = Generation::new(file, Position::start_of(identity));
                fresh.unlocated = self.existed.then_some(stand.size);
                fresh
            }
        };
        self.existed = false;
        adopted.dirty = true;
        if !self.old.is_empty() || !self.known.is_empty() {
            self.rotations += 1;
        }
        if moved {
            // Neighbours in another directory or of another name are no generations of ours.
            self.newest_ns = None;
        }
        self.remember_siblings();
        self.current = Some(adopted);
        self.adopt_unseen(&Why::Replaced);
        if identity.born_ns > self.newest_ns.unwrap_or(i64::MIN) {
            self.newest_ns = Some(identity.born_ns);
        }
        self.watch_files(desk);
        false
    }

    /// Whether this file has been read already, by this log or another that serves the same requests (with a glob like
    /// `x.log*` a rotated file only changes from one log to another).
    fn take_over(&mut self, identity: Identity, desk: &mut Desk<'_>) -> TakenOver {
        let same = |position: &Position| position.identity == identity;
        if let Some(at) = self.known.iter().position(same) {
            return self.known.remove(at).map_or(TakenOver::Nothing, TakenOver::Position);
        }
        for other in desk.others.values_mut().flatten() {
            if !self.requests.iter().all(|request| other.requests.contains(request)) {
                continue;
            }
            if other.current.as_ref().is_some_and(|current| same(&current.position)) {
                // It may be about to lose the file to us: then its look at the path wakes this log.
                return TakenOver::Elsewhere(other.path.clone());
            }
            if let Some(at) = other.old.iter().position(|old| same(&old.position)) {
                let generation = other.old.remove(at);
                if let Some(wd) = generation.watch {
                    desk.watcher.pass_on(other.id, self.id, wd);
                }
                return TakenOver::Generation(generation);
            }
            if let Some(at) = other.known.iter().position(same) {
                return other.known.remove(at).map_or(TakenOver::Nothing, TakenOver::Position);
            }
        }
        TakenOver::Nothing
    }

    /// At the first look: whatever lies beside the log now was rotated before our time.
    fn remember_siblings(&mut self) {
        if self.newest_ns.is_some() {
            return;
        }
        let before = siblings::siblings(&self.real);
        self.settled = before.iter().map(|sibling| sibling.stand.identity).collect();
        self.newest_ns = Some(before.last().map_or(i64::MIN, |sibling| sibling.stand.identity.born_ns));
    }

    /// Looks for generations that came and went between two looks and puts them into `old`; true if there were any.
    fn adopt_unseen(&mut self, why: &Why<'_>) -> bool {
        let (Some(current), Some(newest)) = (&self.current, self.newest_ns) else { return false };
        let head = Window::read(&current.file, 0, WINDOW_BYTES);
        let mut youngest = newest;
        let count = self.old.len();
        for sibling in siblings::siblings(&self.real) {
            let identity = sibling.stand.identity;
            if identity.born_ns < newest || sibling.stand.size == 0 || self.knows(identity) {
                continue;
            }
            let Some(file) = sibling.open() else { continue };
            let position = match why {
                Why::Emptied(before) if siblings::is_copy(&file, before) => Position { identity, ..(*before).clone() },
                Why::Emptied(before) if siblings::begins_like(&file, &before.head) => {
                    self.settled.push(identity);
                    continue;
                }
                // A copy being made right now: the log is emptied next, and we come back.
                Why::Emptied(_) | Why::Untouched if siblings::begins_like(&file, &head) => continue,
                _ if self.old.iter().any(|old| siblings::is_copy(&file, &old.position)) => {
                    self.settled.push(identity);
                    continue;
                }
                Why::Emptied(_) | Why::Untouched | Why::Replaced => Position::start_of(identity),
            };
            youngest = youngest.max(identity.born_ns);
            self.settled.push(identity);
            self.old.push(Generation::new(file, position));
        }
        self.newest_ns = Some(youngest);
        self.settled.retain(|settled| settled.born_ns >= youngest);
        self.rotations += (self.old.len() - count) as u64;
        self.old.len() > count
    }

    fn knows(&self, identity: Identity) -> bool {
        self.current.iter().chain(&self.old).any(|generation| generation.position.identity == identity)
            || self.known.iter().any(|position| position.identity == identity)
            || self.settled.contains(&identity)
    }

    /// Makes sure that the open files are watched, or notes why they are polled instead; true if all were before.
    fn watch_files(&mut self, desk: &mut Desk<'_>) -> bool {
        let mut same = true;
        self.polling = None;
        for generation in self.current.iter_mut().chain(&mut self.old) {
            if generation.watch.is_some() || generation.remote {
                continue;
            }
            match desk.watcher.watch_file(self.id, generation.file.as_fd()) {
                Ok(wd) => {
                    generation.watch = Some(wd);
                    // What was written between opening and watching raised no event.
                    generation.dirty = true;
                    same = false;
                }
                Err(errno) => self.polling = Some(super::watch::why_polled(errno)),
            }
        }
        let remote = self.current.as_mut().and_then(|current| {
            let name = siblings::remote(&current.file)?;
            current.remote = true;
            Some(name)
        });
        if let Some(name) = remote {
            self.polling = Some(format!("it lies on {name}, where changes made elsewhere raise no event"));
        }
        same
    }

    /// When the next rotated file may be let go.
    pub(super) fn retire_at(&self) -> Option<Timestamp> {
        self.old.iter().map(|old| old.quiet_since + QUIET).min()
    }

    /// Lets go of rotated files that were silent long enough, and of the oldest if there are too many.
    fn retire(&mut self, desk: &mut Desk<'_>) {
        let mut at = 0;
        while at < self.old.len() {
            let too_many = self.old.len() > OLD_MAX;
            if too_many || self.old[at].quiet_since + QUIET <= desk.now {
                let mut gone = self.old.remove(at);
                let mut tap = Tap { log: self.id, sink: &mut *desk.sink, bytes: 0, lines_cut: 0 };
                let mut unlimited = usize::MAX;
                // Silent by events only; the last look is at the file itself.
                if gone.pump(desk.buffer, &mut tap, &mut unlimited) == Ok(Pumped::Drained) {
                    gone.finish(desk.buffer, &mut tap);
                }
                self.bytes += tap.bytes;
                self.lines_cut += tap.lines_cut;
                self.let_go(gone, desk);
            } else {
                at += 1;
            }
        }
    }

    fn let_go(&mut self, gone: Generation, desk: &mut Desk<'_>) {
        if let Some(wd) = gone.watch {
            desk.watcher.release_file(self.id, wd);
        }
        self.known.push_back(gone.position);
        if self.known.len() > KNOWN_MAX {
            self.known.pop_front();
        }
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

/// On what occasion unseen generations are looked for.
enum Why<'a> {
    /// Another file stands at the path.
    Replaced,
    /// Nothing was read of the current file yet.
    Untouched,
    /// The current file was emptied in place, when it had been read up to here.
    Emptied(&'a Position),
}

enum TakenOver {
    /// Another log is reading it at this moment.
    Elsewhere(PathBuf),
    Generation(Generation),
    Position(Position),
    Nothing,
}
