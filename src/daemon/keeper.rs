//! What is kept on disk, off the deciding thread: effects come in as records, a thread of its own writes them.
//!
//! Records are gathered for a tenth of a second and written in one go; a disk that refuses is tried again, and bans go on.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::engine::allowlist::By;
use crate::engine::core::Engine;
use crate::engine::effect::{Ban, Effect};
use crate::engine::time::Timestamp;
use crate::store::{Record, Store};

/// Changes written one after the other before the log is written anew.
const RECORDS_MAX: usize = 500_000;
/// How long records gather.
const GATHER: Duration = Duration::from_millis(100);
/// How long to wait before a disk that refused is tried again.
const RETRY: Duration = Duration::from_secs(5);

enum Work {
    Append(Vec<Record>),
    Compact(Vec<Record>),
}

/// The deciding thread's end.
pub struct Keep {
    send: Option<Sender<Work>>,
    thread: Option<JoinHandle<()>>,
    since_compact: usize,
    /// Records of this round, sent together at its end.
    gathered: Vec<Record>,
}

impl Keep {
    /// Keeps records in `store`; without one, nothing is kept.
    pub fn new(store: Option<Store>) -> Self {
        let Some(store) = store else {
            return Self { send: None, thread: None, since_compact: 0, gathered: Vec::new() };
        };
        let (send, receive) = channel();
        let thread = std::thread::Builder::new().name("band-store".into()).spawn(move || write(store, &receive)).ok();
        Self { send: Some(send), thread, since_compact: 0, gathered: Vec::new() }
    }

    /// An effect that must survive.
    pub fn note(&mut self, effect: &Effect, jail: &str, at: Timestamp) {
        match effect {
            Effect::Ban(ban) | Effect::Extend(ban) => self.record(record_of(ban, jail)),
            // A ban that ended by itself says so by its end.
            Effect::Unban { expired: true, .. } => {}
            Effect::Unban { ban, expired: false } => {
                self.record(Record::Unban { jail: jail.to_owned(), net: ban.net.to_string(), at: at.0 });
            }
        }
    }

    /// A change that must survive.
    pub fn record(&mut self, record: Record) {
        if self.send.is_some() {
            self.gathered.push(record);
        }
    }

    /// Writes the log anew with only this.
    pub fn compact(&mut self, records: Vec<Record>) {
        self.gathered.clear();
        self.since_compact = 0;
        if let Some(send) = &self.send {
            let _ = send.send(Work::Compact(records));
        }
    }

    /// Hands over what this round gathered, and has the log written anew if it has grown long.
    pub fn flush(&mut self, snapshot: impl FnOnce() -> Vec<Record>) {
        self.hand_over();
        if self.since_compact >= RECORDS_MAX {
            self.compact(snapshot());
        }
    }
}

impl Keep {
    fn hand_over(&mut self) {
        if self.gathered.is_empty() {
            return;
        }
        self.since_compact += self.gathered.len();
        if let Some(send) = &self.send {
            // If the writer is gone, its last words said why.
            let _ = send.send(Work::Append(std::mem::take(&mut self.gathered)));
        }
    }
}

impl Drop for Keep {
    /// Waits until everything is written.
    fn drop(&mut self) {
        self.hand_over();
        self.send = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn record_of(ban: &Ban, jail: &str) -> Record {
    Record::Ban {
        jail: jail.to_owned(),
        net: ban.net.to_string(),
        since: ban.since.0,
        until: ban.until.map(|until| until.0),
        failures: ban.failures,
        count: ban.count,
        origin: ban.origin.to_string(),
        reason: ban.reason.clone(),
    }
}

/// Everything that stands at `at`, and what of the past still counts.
pub fn snapshot(engine: &Engine, at: Timestamp) -> Vec<Record> {
    let hand_made = engine.allow.entries().iter().filter(|entry| entry.by == By::Hand);
    let mut records: Vec<Record> = hand_made
        .map(|entry| Record::Allow {
            net: entry.net.to_string(),
            until: entry.until.map(|until| until.0),
            note: entry.note.clone(),
        })
        .collect();
    records.extend(engine.past_bans(at).iter().map(|ban| record_of(ban, engine.name(ban.jail))));
    records.extend(engine.forgiven().map(|(jail, net, at)| Record::Unban {
        jail: engine.name(jail).to_owned(),
        net: net.to_string(),
        at: at.0,
    }));
    records.extend(engine.ledger().iter().map(|ban| record_of(ban, engine.name(ban.jail))));
    records
}

fn write(mut store: Store, receive: &Receiver<Work>) {
    let mut pending: Vec<Record> = Vec::new();
    let (mut refused, mut over) = (false, false);
    while !over {
        let wait = if pending.is_empty() { None } else { Some(RETRY) };
        over = !gather(&mut store, receive, &mut pending, wait);
        let until = Instant::now() + GATHER;
        while !over && Instant::now() < until {
            over = !gather(&mut store, receive, &mut pending, Some(until.saturating_duration_since(Instant::now())));
        }
        if pending.is_empty() {
            continue;
        }
        match store.append(&pending) {
            Ok(()) => {
                if refused {
                    tracing::info!("the state can be written again; nothing was lost");
                }
                refused = false;
                pending.clear();
            }
            Err(error) => {
                if !refused {
                    tracing::error!(%error, pending = pending.len(), "bans cannot be written to disk; they stand in the kernel, and writing is tried again");
                }
                refused = true;
            }
        }
    }
}

/// Takes one piece of work, waiting for it at most so long; false when there will be no more.
fn gather(store: &mut Store, receive: &Receiver<Work>, pending: &mut Vec<Record>, wait: Option<Duration>) -> bool {
    let work = match wait {
        None => receive.recv().map_err(|_| RecvTimeoutError::Disconnected),
        Some(wait) => receive.recv_timeout(wait),
    };
    match work {
        Ok(Work::Append(mut records)) => pending.append(&mut records),
        Ok(Work::Compact(records)) => match store.compact(&records) {
            Ok(()) => pending.clear(),
            Err(error) => tracing::error!(%error, "the state could not be written anew"),
        },
        Err(RecvTimeoutError::Timeout) => {}
        Err(RecvTimeoutError::Disconnected) => return false,
    }
    true
}
