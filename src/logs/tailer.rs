//! All watched logs: requests and the kernel's hints come in, chunks of whole lines go out, one turn at a time.
//!
//! A turn drains the hints, looks again at the patterns whose names changed, and visits each log that may have news
//! once. Nothing here waits: the caller waits for [`Tailer::fd`] or [`Tailer::poll_timeout`], whichever is first.

use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use hashbrown::HashMap;
use rustix::io::Errno;

use super::generation::BUFFER_BYTES;
use super::glob::Pattern;
use super::log::{Desk, Log, Logs};
use super::siblings;
use super::watch::{Hint, Watcher, why_polled};
use super::{Complaint, Error, LogId, LogInfo, Request, Sink, StampOf, Turn};
use crate::engine::time::{Span, Timestamp};

/// How often a log is looked at that raises no events.
const POLL: Span = Span::from_seconds(1);

struct Wanted {
    /// `None` if it could not be understood; then it was complained about and matches nothing.
    pattern: Option<Pattern>,
    since: Span,
    dirty: bool,
    /// Also watch for changed modes, because something of it could not be read.
    attributes: bool,
    /// Why its directories are polled.
    polling: Option<String>,
}

/// Reads every watched log as it grows.
pub struct Tailer {
    watcher: Watcher,
    buffer: Vec<u8>,
    wanted: Vec<Wanted>,
    logs: Logs,
    by_path: HashMap<PathBuf, LogId>,
    next_id: u32,
    /// Logs to visit; a log is in it when its `queued` is set.
    queue: Vec<LogId>,
    /// The queue of the turn before, kept for its memory.
    visiting: Vec<LogId>,
    names_changed: bool,
    logs_changed: bool,
    next_poll: Option<Timestamp>,
    /// The earlier of the next poll and the next rotated file to let go.
    deadline: Option<Timestamp>,
    /// `deadline` may be wrong.
    replan: bool,
}

impl Tailer {
    /// A tailer that watches nothing yet.
    ///
    /// # Errors
    /// When no descriptor can be opened at all. Without inotify it works by polling.
    pub fn new() -> Result<Self, Error> {
        Ok(Self::with(Watcher::new()?))
    }

    pub(super) fn with(watcher: Watcher) -> Self {
        Self {
            watcher,
            buffer: vec![0; BUFFER_BYTES],
            wanted: Vec::new(),
            logs: Logs::new(),
            by_path: HashMap::new(),
            next_id: 0,
            queue: Vec::new(),
            visiting: Vec::new(),
            names_changed: false,
            logs_changed: false,
            next_poll: None,
            deadline: None,
            replan: false,
        }
    }

    /// Becomes readable when something may have happened.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.watcher.fd()
    }

    #[cfg(test)]
    pub(super) fn watcher(&mut self) -> &mut Watcher {
        &mut self.watcher
    }

    /// Replaces the set of watched patterns; logs that are in both keep their positions and numbers. Call
    /// [`Self::turn`] afterwards without waiting: what is there already raises no event.
    pub fn watch(&mut self, requests: &[Request]) -> Vec<Complaint> {
        let mut complaints = Vec::new();
        self.watcher.forget_requests(None);
        self.wanted.clear();
        for log in self.logs.values_mut().flatten() {
            log.requests.clear();
            log.mark_all();
        }
        for request in requests {
            let pattern = Pattern::parse(&request.pattern).map_err(|sentence| {
                complaints.push(Complaint { path: request.pattern.clone(), sentence });
            });
            self.wanted.push(Wanted {
                pattern: pattern.ok(),
                since: request.since,
                dirty: false,
                attributes: false,
                polling: None,
            });
        }
        let newest = self.next_id;
        for index in 0..self.wanted.len() {
            self.survey(index);
        }
        self.drop_unwanted();
        self.watcher.sweep();
        let ids: Vec<LogId> = self.logs.keys().copied().collect();
        for id in ids {
            if id.0 >= newest {
                self.open_first(id);
            }
            self.enqueue(id);
        }
        complaints.extend(self.logs.values().flatten().filter_map(|log| {
            let sentence = log.wrong.clone()?;
            Some(Complaint { path: log.path.display().to_string(), sentence })
        }));
        // The caller asks for the logs after this call anyway.
        self.logs_changed = false;
        complaints
    }

    /// Opens a log of a new request at once, so that nothing rotated away between now and the first turn is missed.
    fn open_first(&mut self, id: LogId) {
        let Some(mut log) = self.logs.get_mut(&id).and_then(Option::take) else { return };
        log.existed = siblings::regular(&log.path).is_ok();
        let mut desk = Desk {
            now: Timestamp(0),
            watcher: &mut self.watcher,
            buffer: &mut self.buffer,
            others: &mut self.logs,
            stamp_of: &mut |_, _| None,
            sink: &mut |_| {},
        };
        log.look(&mut desk);
        self.note_unreadable(&log);
        self.logs.insert(id, Some(log));
    }

    /// All logs, by number.
    pub fn logs(&self) -> Vec<LogInfo> {
        let polling = |log: &Log| {
            log.requests.iter().find_map(|index| self.wanted.get(*index).and_then(|wanted| wanted.polling.as_ref()))
        };
        self.logs.values().flatten().map(|log| log.info(polling(log))).collect()
    }

    /// Takes what the kernel reports, without blocking, and reads what is new, at most about 1 MiB of each log.
    pub fn turn(&mut self, now: Timestamp, stamp_of: &mut StampOf<'_>, sink: &mut Sink<'_>) -> Turn {
        self.take_hints();
        self.take_deadlines(now);
        if self.names_changed {
            self.names_changed = false;
            for index in 0..self.wanted.len() {
                if std::mem::take(&mut self.wanted[index].dirty) {
                    self.watcher.forget_requests(Some(index));
                    self.survey(index);
                }
            }
            self.watcher.sweep();
        }
        if std::mem::take(&mut self.logs_changed) {
            // The caller must know a log before it gets its lines.
            return Turn { more: true, logs_changed: true };
        }
        self.visit_queued(now, stamp_of, sink);
        if self.replan || self.deadline.is_some() {
            self.plan(now);
        }
        let logs_changed = std::mem::take(&mut self.logs_changed);
        Turn { more: !self.queue.is_empty() || self.names_changed, logs_changed }
    }

    fn take_hints(&mut self) {
        let (logs, wanted, queue) = (&mut self.logs, &mut self.wanted, &mut self.queue);
        let names_changed = &mut self.names_changed;
        self.watcher.drain(&mut |hint| {
            let (id, wd) = match hint {
                Hint::Data(id, wd) | Hint::Path(id, wd) | Hint::Lost(id, wd) => (id, wd),
                Hint::Names(index) => {
                    *names_changed = true;
                    if let Some(wanted) = wanted.get_mut(index) {
                        wanted.dirty = true;
                    }
                    return;
                }
                Hint::Everything => {
                    *names_changed = true;
                    wanted.iter_mut().for_each(|wanted| wanted.dirty = true);
                    for log in logs.values_mut().flatten() {
                        log.mark_all();
                        enqueue(queue, log);
                    }
                    return;
                }
            };
            let Some(log) = logs.get_mut(&id).and_then(Option::as_deref_mut) else { return };
            log.mark(wd, matches!(hint, Hint::Lost(..)));
            log.check_path |= !matches!(hint, Hint::Data(..));
            enqueue(queue, log);
        });
    }

    /// What is due without an event: polls, and rotated files to let go.
    fn take_deadlines(&mut self, now: Timestamp) {
        if self.deadline.is_none_or(|deadline| deadline > now) {
            return;
        }
        let poll = self.next_poll.is_some_and(|moment| moment <= now);
        if poll {
            self.next_poll = Some(now + POLL);
            for wanted in self.wanted.iter_mut().filter(|wanted| wanted.polling.is_some()) {
                wanted.dirty = true;
                self.names_changed = true;
            }
        }
        for log in self.logs.values_mut().flatten() {
            if poll && log.polling.is_some() {
                log.mark_all();
                enqueue(&mut self.queue, log);
            }
            if log.retire_at().is_some_and(|moment| moment <= now) {
                enqueue(&mut self.queue, log);
            }
        }
    }

    fn visit_queued(&mut self, now: Timestamp, stamp_of: &mut StampOf<'_>, sink: &mut Sink<'_>) {
        let mut visiting = std::mem::replace(&mut self.queue, std::mem::take(&mut self.visiting));
        for id in visiting.drain(..) {
            let Some(mut log) = self.logs.get_mut(&id).and_then(Option::take) else { continue };
            log.queued = false;
            let more = log.attend(&mut Desk {
                now,
                watcher: &mut self.watcher,
                buffer: &mut self.buffer,
                others: &mut self.logs,
                stamp_of: &mut *stamp_of,
                sink: &mut *sink,
            });
            if more {
                enqueue(&mut self.queue, &mut log);
            }
            self.replan |= log.retire_at().is_some() || log.polling.is_some();
            self.note_unreadable(&log);
            let looks = std::mem::take(&mut log.let_others_look);
            let gone = log.is_gone() && !self.wanted_by_name(&log);
            if gone {
                log.release(&mut self.watcher);
                self.by_path.remove(&log.path);
                self.logs.remove(&id);
                self.logs_changed = true;
            } else if let Some(place) = self.logs.get_mut(&id) {
                *place = Some(log);
            }
            if looks {
                self.wake_twins();
            }
        }
        self.visiting = visiting;
    }

    /// Logs that leave their file to another log look again, for that one has given up a file.
    fn wake_twins(&mut self) {
        for log in self.logs.values_mut().flatten().filter(|log| log.same_as.is_some()) {
            log.check_path = true;
            enqueue(&mut self.queue, log);
        }
    }

    fn wanted_by_name(&self, log: &Log) -> bool {
        let by_name = |pattern: &Pattern| !pattern.wild;
        log.requests.iter().any(|index| self.wanted[*index].pattern.as_ref().is_some_and(by_name))
    }

    /// A changed mode raises an event only if it is watched for; that costs wake-ups, so only while it is needed.
    fn note_unreadable(&mut self, log: &Log) {
        if log.wrong.is_some() {
            for index in &log.requests {
                let wanted = &mut self.wanted[*index];
                if !wanted.attributes {
                    wanted.attributes = true;
                    wanted.dirty = true;
                    self.names_changed = true;
                }
            }
        }
    }

    /// When to call [`Self::turn`] even without an event: to poll, or to let go of a rotated file. A moment long past
    /// means at once, `None` that only events matter.
    pub fn poll_timeout(&self) -> Option<Timestamp> {
        if self.queue.is_empty() && !self.names_changed && !self.logs_changed {
            self.deadline
        } else {
            Some(Timestamp(0))
        }
    }

    fn plan(&mut self, now: Timestamp) {
        self.replan = false;
        let polls = self.wanted.iter().any(|wanted| wanted.polling.is_some())
            || self.logs.values().flatten().any(|log| log.polling.is_some());
        // The clock may have been set back: never later than one period from now.
        let next = self.next_poll.unwrap_or(now + POLL).min(now + POLL);
        self.next_poll = polls.then_some(next);
        let retire = self.logs.values().flatten().filter_map(|log| log.retire_at()).min();
        self.deadline = [self.next_poll, retire].into_iter().flatten().min();
    }

    /// Looks which paths a request means now, watching all directories on the way.
    fn survey(&mut self, index: usize) {
        let wanted = &mut self.wanted[index];
        let Some(pattern) = &wanted.pattern else { return };
        let (attributes, since) = (wanted.attributes, wanted.since);
        let (watcher, mut failed) = (&mut self.watcher, None);
        let paths = pattern.walk(&mut |directory, interest| {
            match watcher.watch_directory(index, directory, interest, attributes) {
                // Gone again or not to be entered: its own directory is watched for that.
                Ok(()) | Err(Errno::NOENT | Errno::NOTDIR | Errno::ACCESS | Errno::LOOP) => {}
                Err(errno) => failed = Some(why_polled(errno)),
            }
        });
        wanted.polling = failed;
        self.replan = true;
        // A log of a glob that has no name just now (in the middle of a rotation) is the same log when it is back.
        let covered: Vec<PathBuf> = self.by_path.keys().filter(|path| pattern.covers(path)).cloned().collect();
        for path in &paths {
            let id = self.log_at(path);
            self.ask_for(id, index, since);
        }
        for path in covered {
            if let Some(id) = self.by_path.get(&path).copied() {
                self.ask_for(id, index, since);
            }
        }
    }

    fn log_at(&mut self, path: &Path) -> LogId {
        if let Some(id) = self.by_path.get(path) {
            return *id;
        }
        let id = LogId(self.next_id);
        self.next_id += 1;
        self.by_path.insert(path.to_owned(), id);
        self.logs.insert(id, Some(Box::new(Log::new(id, path.to_owned()))));
        self.logs_changed = true;
        id
    }

    fn ask_for(&mut self, id: LogId, index: usize, since: Span) {
        let Some(log) = self.logs.get_mut(&id).and_then(Option::as_deref_mut) else { return };
        if let Err(at) = log.requests.binary_search(&index) {
            log.requests.insert(at, index);
        }
        log.since = log.since.max(since);
        log.check_path = true;
        enqueue(&mut self.queue, log);
    }

    fn enqueue(&mut self, id: LogId) {
        if let Some(log) = self.logs.get_mut(&id).and_then(Option::as_deref_mut) {
            enqueue(&mut self.queue, log);
        }
    }

    fn drop_unwanted(&mut self) {
        let (watcher, by_path) = (&mut self.watcher, &mut self.by_path);
        self.logs.retain(|_, place| {
            let Some(log) = place.as_mut().filter(|log| log.requests.is_empty()) else { return true };
            log.release(watcher);
            by_path.remove(&log.path);
            false
        });
    }
}

fn enqueue(queue: &mut Vec<LogId>, log: &mut Log) {
    if !log.queued {
        log.queued = true;
        queue.push(log.id);
    }
}
