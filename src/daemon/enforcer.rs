//! The thread that owns the kernel's sets: tasks come in, the kernel is changed, confirmations go out. Decides nothing.
//!
//! One batch is everything that waits; while the kernel works on it, the next one gathers.

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use hashbrown::HashMap;
use hdrhistogram::Histogram;
use ipnet::IpNet;
use rustix::event::{PollFd, PollFlags, poll};

use super::clock::{now, until};
use super::inbox::Inbox;
use crate::enforce::nftables::{Error, Held, Kernel, Layout, Monitor, Op, describe};
use crate::enforce::outbox::{Key, Outbox, Send};
use crate::engine::time::{Span, Timestamp};

/// Repairs within `REPAIR_WINDOW` before band waits between them: somebody is fighting for the table.
const REPAIRS_MAX: usize = 20;
/// The time those are counted in.
const REPAIR_WINDOW: Span = Span::from_seconds(10);
/// Up to so many bans are compared one by one with the kernel after every foreign change; beyond, once a second at most.
const COMPARE_AT_ONCE: usize = 5_000;

/// Told once everything before it is in force, or what is in the way.
pub type Confirm = Box<dyn FnOnce(Result<(), String>) + std::marker::Send>;

/// What the enforcer is asked to do, in order.
pub enum Task {
    /// The kernel shall hold this layout and exactly these bans.
    Install(Layout, HashMap<Key, Option<Timestamp>>),
    /// Shut out until then.
    Put(Key, Option<Timestamp>, Option<Instant>),
    /// Let in.
    Drop(Key),
    /// Its time is up; the kernel has let it in by itself.
    Forget(Key),
    /// Call this once everything before it is in force, or with what is in the way.
    Confirm(Confirm),
    /// What does the kernel hold of these?
    Ask(Vec<Key>, Box<dyn FnOnce(Vec<Option<Held>>) + std::marker::Send>),
    /// The rules as text.
    Describe(Box<dyn FnOnce(String) + std::marker::Send>),
    /// These, in order; a flood of bans rings the bell once.
    Batch(Vec<Task>),
    /// Send what waits and end.
    Stop,
}

/// How the kernel stands, for `banctl status`.
#[derive(Debug)]
pub struct Standing {
    /// Bans are put into force.
    pub on: bool,
    /// What is in the way, if anything.
    pub error: Option<String>,
    /// Changes not confirmed yet.
    pub pending: usize,
    /// Elements that should be there.
    pub held: usize,
    /// How often somebody else's change was repaired, and who made the last one.
    pub repairs: u64,
    /// The program that made the last foreign change that had to be repaired.
    pub repaired_after: String,
    /// From reading the deciding line to the kernel's confirmation, in microseconds.
    pub latency: Histogram<u64>,
}

impl Default for Standing {
    fn default() -> Self {
        // Three digits up to a minute; these bounds are always legal, and another histogram would serve, too.
        let latency = Histogram::new_with_bounds(1, 60_000_000, 3)
            .unwrap_or_else(|_| Histogram::new(1).unwrap_or_else(|_| unreachable!("one significant digit is legal")));
        Self { on: true, error: None, pending: 0, held: 0, repairs: 0, repaired_after: String::new(), latency }
    }
}

/// What others may look at.
pub type Shared = Arc<Mutex<Standing>>;

/// The thread's state.
pub struct Enforcer {
    inbox: Inbox<Task>,
    kernel: Option<Kernel>,
    monitor: Option<Monitor>,
    layout: Option<Layout>,
    outbox: Outbox,
    seen: Vec<Instant>,
    confirms: Vec<Confirm>,
    shared: Shared,
    repairs: Vec<Timestamp>,
    reinstall_at: Option<Timestamp>,
    compare_at: Option<Timestamp>,
    compared: Timestamp,
    foreign: String,
    last_error: Option<String>,
    stopping: bool,
}

impl Enforcer {
    /// An enforcer for `kernel`; without one, bans are only kept.
    pub fn new(inbox: Inbox<Task>, kernel: Option<(Kernel, Option<Monitor>)>, shared: Shared) -> Self {
        let (kernel, monitor) = match kernel {
            Some((kernel, monitor)) => (Some(kernel), monitor),
            None => (None, None),
        };
        Self {
            inbox,
            kernel,
            monitor,
            layout: None,
            outbox: Outbox::default(),
            seen: Vec::new(),
            confirms: Vec::new(),
            shared,
            repairs: Vec::new(),
            reinstall_at: None,
            compare_at: None,
            compared: Timestamp(i64::MIN),
            foreign: String::new(),
            last_error: None,
            stopping: false,
        }
    }

    /// Works until it is told to stop.
    pub fn run(mut self) {
        while !self.stopping {
            self.wait();
            self.inbox.heard();
            while let Some(task) = self.inbox.take() {
                self.take(task);
            }
            self.notice_changes();
            self.work();
        }
    }

    fn wait(&self) {
        let due = [self.outbox.poll_timeout(), self.reinstall_at, self.compare_at].into_iter().flatten().min();
        let mut descriptors = vec![PollFd::new(&self.inbox, PollFlags::IN)];
        if let Some(monitor) = &self.monitor {
            descriptors.push(PollFd::from_borrowed_fd(monitor.as_fd(), PollFlags::IN));
        }
        // A signal that interrupts the wait is as good as any other reason to look.
        let _ = poll(&mut descriptors, until(due).as_ref());
    }

    fn take(&mut self, task: Task) {
        match task {
            Task::Install(layout, wanted) => {
                self.outbox.replace(wanted);
                self.layout = Some(layout);
                self.install();
            }
            Task::Put(key, end, seen) => {
                self.outbox.put(key, end);
                self.seen.extend(seen);
            }
            Task::Drop(key) => self.outbox.drop(key),
            Task::Forget(key) => self.outbox.forget(&key),
            Task::Confirm(confirm) => self.confirms.push(confirm),
            Task::Ask(keys, reply) => {
                self.work();
                reply(keys.iter().map(|key| self.held(key)).collect());
            }
            Task::Describe(reply) => reply(match (&self.kernel, &self.layout) {
                (Some(kernel), _) => kernel.describe(),
                (None, Some(layout)) => describe(layout),
                (None, None) => String::new(),
            }),
            Task::Batch(tasks) => tasks.into_iter().for_each(|task| self.take(task)),
            Task::Stop => self.stopping = true,
        }
    }

    fn held(&mut self, (scope, net): &Key) -> Option<Held> {
        self.kernel.as_mut()?.held(scope, net).ok().flatten()
    }

    /// Puts tables, sets and rules in, and then everything that should be banned.
    fn install(&mut self) {
        self.reinstall_at = None;
        let (Some(kernel), Some(layout)) = (&mut self.kernel, &self.layout) else { return };
        match kernel.install(layout) {
            Ok(()) => {
                self.last_error = None;
                self.outbox.resend();
            }
            Err(error) => {
                tracing::error!(%error, "the rules could not be put into the kernel; trying again in a second");
                self.last_error = Some(error.to_string());
                self.reinstall_at = Some(now() + Span::from_seconds(1));
            }
        }
    }

    /// Did somebody else change the packet filter, and is ours still whole?
    fn notice_changes(&mut self) {
        let (Some(monitor), Some(kernel)) = (&mut self.monitor, &mut self.kernel) else { return };
        let own = kernel.port_id();
        let mut foreign = None;
        while let Some(change) = monitor.next() {
            if change.overflow || change.port_id != own {
                foreign = Some(if change.overflow {
                    "somebody".to_owned()
                } else {
                    format!("{} (thread {})", change.name, change.pid)
                });
            }
        }
        let at = now();
        if let Some(who) = foreign {
            self.foreign = who;
            match kernel.is_intact() {
                Ok(true) => {
                    let soon = if self.outbox.wanted().len() <= COMPARE_AT_ONCE {
                        at
                    } else {
                        self.compared + Span::from_seconds(1)
                    };
                    self.compare_at = Some(soon.max(at));
                }
                Ok(false) | Err(_) => self.repair(at),
            }
        }
        if self.compare_at.is_some_and(|due| due <= at) {
            self.compare_at = None;
            self.compared = at;
            self.compare(at);
        }
    }

    /// Elements somebody else deleted are put back.
    fn compare(&mut self, at: Timestamp) {
        let Some(kernel) = &mut self.kernel else { return };
        let Ok(held) = kernel.dump() else { return self.repair(at) };
        let there: hashbrown::HashSet<(&str, IpNet)> =
            held.iter().map(|held| (held.scope.as_str(), held.net)).collect();
        let over = |end: &Option<Timestamp>| end.is_some_and(|end| end <= at);
        let missing: Vec<Key> = self
            .outbox
            .wanted()
            .iter()
            .filter(|((scope, net), end)| !over(end) && !there.contains(&(&**scope, *net)))
            .map(|(key, _)| key.clone())
            .collect();
        let unwanted: Vec<Key> = held
            .iter()
            .map(|held| (Arc::from(held.scope.as_str()), held.net))
            .filter(|key: &Key| !self.outbox.wanted().contains_key(key))
            .collect();
        if missing.is_empty() && unwanted.is_empty() {
            return;
        }
        tracing::warn!(missing = missing.len(), unwanted = unwanted.len(), by = %self.foreign, "bans in the kernel were changed by somebody else; repaired");
        self.count_repair();
        self.outbox.resend_some(missing);
        self.outbox.resend_some(unwanted);
    }

    fn repair(&mut self, at: Timestamp) {
        self.repairs.retain(|repaired| *repaired + REPAIR_WINDOW >= at);
        if self.repairs.len() >= REPAIRS_MAX {
            tracing::error!(by = %self.foreign, "the rules are changed by somebody else again and again; repairing once a second");
            self.reinstall_at = Some(at + Span::from_seconds(1));
            self.repairs.clear();
            return;
        }
        if self.reinstall_at.is_some_and(|due| due > at) {
            return;
        }
        self.repairs.push(at);
        tracing::warn!(by = %self.foreign, "band's table in the kernel was changed by somebody else; putting it back");
        self.count_repair();
        self.install();
    }

    fn count_repair(&mut self) {
        if let Ok(mut shared) = self.shared.lock() {
            shared.repairs += 1;
            shared.repaired_after = self.foreign.clone();
        }
    }

    /// Sends what waits.
    fn work(&mut self) {
        if self.reinstall_at.is_some_and(|due| due <= now()) {
            self.install();
        }
        let at = now();
        let batch = self.outbox.batch(at);
        if !batch.is_empty() {
            self.send(batch, at);
        }
        self.answer();
    }

    fn send(&mut self, batch: Vec<Send>, at: Timestamp) {
        let Some(kernel) = &mut self.kernel else {
            self.seen.clear();
            return;
        };
        let ops: Vec<Op> = batch
            .iter()
            .map(|send| match send {
                Send::Put((scope, net), end) => {
                    let timeout = end.map(|end| Span((end - at).0.max(1)));
                    Op::Ban { scope: scope.to_string(), net: *net, timeout }
                }
                Send::Drop((scope, net)) => Op::Unban { scope: scope.to_string(), net: *net },
            })
            .collect();
        let refused = kernel.apply(&ops);
        let confirmed = Instant::now();
        if refused.is_empty() {
            self.outbox.confirmed();
            self.last_error = None;
            let latencies: Vec<u64> = self
                .seen
                .drain(..)
                .map(|seen| u64::try_from(confirmed.duration_since(seen).as_micros()).unwrap_or(u64::MAX))
                .collect();
            if let Ok(mut shared) = self.shared.lock() {
                for micros in latencies {
                    shared.latency.saturating_record(micros.max(1));
                }
            }
            return;
        }
        self.seen.clear();
        let gone = refused.iter().any(|(_, error)| matches!(error, Error::Gone(_)));
        let (mut again, mut hopeless) = (Vec::new(), 0usize);
        for (index, error) in &refused {
            let key = match &batch[*index] {
                Send::Put(key, _) | Send::Drop(key) => key.clone(),
            };
            // A scope that is not installed any more has no elements to let go.
            if matches!((error, &batch[*index]), (Error::UnknownScope(_), Send::Drop(_))) {
                hopeless += 1;
                continue;
            }
            again.push(key);
        }
        if let Some((_, error)) = refused.first()
            && hopeless < refused.len()
        {
            tracing::warn!(%error, refused = refused.len(), "the kernel refused a part of a batch; it will be tried again");
            self.last_error = Some(error.to_string());
            self.outbox.refused(at, again);
        }
        if gone {
            self.repair(at);
        }
    }

    /// Tells those who wait for what is in force now.
    fn answer(&mut self) {
        let pending = self.outbox.pending();
        let answer = match (&self.last_error, pending) {
            (None, 0) => Ok(()),
            (error, _) => Err(error.clone().unwrap_or_else(|| "the kernel has not confirmed it yet".to_owned())),
        };
        for confirm in self.confirms.drain(..) {
            confirm(answer.clone());
        }
        if let Ok(mut shared) = self.shared.lock() {
            shared.on = self.kernel.is_some();
            shared.pending = pending;
            shared.error = self.last_error.clone();
            shared.held = self.outbox.wanted().len();
        }
    }
}
