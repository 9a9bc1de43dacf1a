//! Rotation of one log: what now stands at its path comes in, its generations are put in order. Here it is decided which
//! open file is the present one, which are read on until they fall silent, and which came and went behind our back.
//!
//! Identity decides, never a name and never an event: the same events come from a truncation and from an append, and a
//! rename over the log raises neither a creation nor a deletion of its name. It reads no lines itself.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use rustix::fs::OFlags;

use super::generation::{Generation, Identity, Position, Pumped, Tap, WINDOW_BYTES, Window};
use super::log::{Desk, Log};
use super::siblings::{self, Absent, Stand};
use crate::engine::time::{Span, Timestamp};

/// Rotated files kept open: each holds a descriptor and, if deleted, its disk space.
const OLD_MAX: usize = 8;
/// How long a rotated file must have been silent before it is let go.
const QUIET: Span = Span::from_seconds(600);
/// Positions of files let go, in case one of them gets its name back.
const KNOWN_MAX: usize = 16;

impl Log {
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
    pub(super) fn adopt_unseen(&mut self, why: &Why<'_>) -> bool {
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
    pub(super) fn retire(&mut self, desk: &mut Desk<'_>) {
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

    pub(super) fn let_go(&mut self, gone: Generation, desk: &mut Desk<'_>) {
        if let Some(wd) = gone.watch {
            desk.watcher.release_file(self.id, wd);
        }
        self.known.push_back(gone.position);
        if self.known.len() > KNOWN_MAX {
            self.known.pop_front();
        }
    }
}

/// On what occasion unseen generations are looked for.
pub(super) enum Why<'a> {
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
