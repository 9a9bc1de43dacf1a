//! The thread that decides: chunks of logs and orders come in, tasks for the enforcer, records for the store and events for watchers go out.
//!
//! From the wake-up by a changed log to the task for the kernel nothing waits: no disk, no lock, no name look-up.

use std::cell::RefCell;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use hashbrown::HashMap;
use ipnet::IpNet;
use jiff::tz::TimeZone;
use rustix::event::{PollFd, PollFlags, poll};
use serde_json::json;
use tokio::sync::mpsc::Sender;

use super::clock::{now, until};
use super::enforcer::{Shared, Task};
use super::evidence::{Evidence, Line};
use super::inbox::{Inbox, Slot};
use super::keeper::Keep;
use super::scopes::Scopes;
use crate::config::Loaded;
use crate::config::schema::{Config, MANUAL, RECIDIVE};
use crate::control::server::Asked;
use crate::enforce::outbox::Key;
use crate::engine::address::{counted_net, show_net};
use crate::engine::allowlist::Allowlist;
use crate::engine::core::{Engine, Failure, Fate, Passed, Reading, Route};
use crate::engine::effect::{Ban, Effect, JailId, Origin};
use crate::engine::filter::matcher::{Filter, LogMatcher, Match};
use crate::engine::filter::prefix::PrefixReader;
use crate::engine::filter::stamp::StampReader;
use crate::engine::time::Timestamp;
use crate::logs::{Chunk, LogId, LogInfo, Request, State, Tailer};
use crate::store::Record;

/// What the deciding thread is told from outside.
pub enum Order {
    /// Somebody asks through the socket.
    Ask(Asked),
    /// A new configuration that was found right; the answer says what changed.
    Reload(Box<Loaded>, Box<dyn FnOnce(String) + Send>),
    /// The machine's own addresses are these now.
    Own(Vec<IpAddr>),
    /// A sign of life is wanted.
    Ping(Box<dyn FnOnce() + Send>),
    /// End, leaving the kernel's bans in place.
    Stop,
}

/// One log being read.
pub(super) struct Source {
    pub(super) info: LogInfo,
    matcher: Arc<LogMatcher>,
    route: Route,
    reader: PrefixReader,
    last: Option<Timestamp>,
    name: Arc<str>,
    pub(super) lines: u64,
    pub(super) failures: HashMap<JailId, u64>,
    pub(super) last_line: Option<Timestamp>,
    pub(super) passed: Passed,
    pub(super) undated: u64,
}

/// A jail as it runs.
pub(super) struct Running {
    pub(super) id: JailId,
    filter: Arc<Filter>,
    timezone: Option<TimeZone>,
    /// Its requests to the tailer, by index.
    pub(super) requests: Vec<usize>,
}

/// Everything but the tailer, so that both can be borrowed in one turn.
pub struct Core {
    pub(super) engine: Engine,
    pub(super) config: Config,
    pub(super) scopes: Scopes,
    pub(super) running: Vec<Running>,
    pub(super) sources: HashMap<LogId, Source>,
    pub(super) evidence: Evidence,
    pub(super) enforcer: Slot<Task>,
    pub(super) standing: Shared,
    pub(super) keep: Keep,
    pub(super) watchers: Vec<Sender<Arc<str>>>,
    /// What watchers will be told once the failures that led to it are.
    events: Vec<serde_json::Value>,
    pub(super) own: Vec<IpAddr>,
    pub(super) started: Instant,
    pub(super) complaints: Vec<String>,
    seen: Instant,
    matches: Vec<Match>,
}

/// The deciding thread.
pub struct Pipeline {
    core: Core,
    tailer: Tailer,
    orders: Inbox<Order>,
}

impl Pipeline {
    /// Makes the engine ready: jails, bans of the last run, own addresses. Nothing is read yet.
    pub fn new(
        loaded: Loaded,
        records: &[Record],
        own: Vec<IpAddr>,
        tailer: Tailer,
        orders: Inbox<Order>,
        (enforcer, standing): (Slot<Task>, Shared),
        keep: Keep,
    ) -> Self {
        let mut allow = Allowlist::new(&loaded.config.allow);
        if loaded.config.ignoreself {
            allow.set_own(&own);
        }
        let engine = Engine::new(loaded.config.tracked_max, allow);
        let scopes = Scopes::new(&loaded.config, Vec::new());
        let core = Core {
            engine,
            config: loaded.config.clone(),
            scopes,
            running: Vec::new(),
            sources: HashMap::new(),
            evidence: Evidence::default(),
            enforcer,
            standing,
            keep,
            watchers: Vec::new(),
            events: Vec::new(),
            own,
            started: Instant::now(),
            complaints: Vec::new(),
            seen: Instant::now(),
            matches: Vec::new(),
        };
        let mut pipeline = Self { core, tailer, orders };
        pipeline.core.set_jails(&loaded);
        pipeline.core.restore(records, now());
        pipeline.core.install();
        pipeline.watch_logs();
        pipeline
    }

    /// Works until it is told to stop.
    pub fn run(mut self) {
        let mut more = true;
        loop {
            if !more {
                self.wait();
            }
            let at = now();
            self.core.seen = Instant::now();
            self.orders.heard();
            while let Some(order) = self.orders.take() {
                match order {
                    Order::Stop => {
                        self.core.flush(at);
                        return;
                    }
                    Order::Reload(loaded, answer) => {
                        let changes = self.reload(*loaded);
                        answer(changes);
                    }
                    Order::Ask(asked) => {
                        self.core.refresh(self.tailer.logs());
                        self.core.answer(asked, at);
                    }
                    Order::Own(addresses) => self.core.set_own(addresses),
                    Order::Ping(answer) => answer(),
                }
            }
            more = self.turn(at);
            self.core.handle_timeout(at);
            self.core.flush(at);
        }
    }

    fn wait(&self) {
        let due = [self.core.engine.poll_timeout(), self.tailer.poll_timeout()];
        let mut descriptors = [
            PollFd::from_borrowed_fd(self.tailer.fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.orders.as_fd(), PollFlags::IN),
        ];
        // A signal that interrupts the wait is as good as any other reason to look.
        let _ = poll(&mut descriptors, until(due.into_iter().flatten().min()).as_ref());
    }

    fn turn(&mut self, at: Timestamp) -> bool {
        let core = RefCell::new(&mut self.core);
        let turn = self.tailer.turn(
            at,
            &mut |log, line| core.borrow_mut().sources.get_mut(&log).and_then(|source| source.stamp_of(line)),
            &mut |chunk| core.borrow_mut().take(&chunk, at),
        );
        if turn.logs_changed {
            self.core.set_sources(self.tailer.logs());
        }
        turn.more || turn.logs_changed
    }

    /// Gives the tailer every jail's logs.
    fn watch_logs(&mut self) {
        let mut requests = Vec::new();
        for running in &mut self.core.running {
            running.requests.clear();
            let Some(jail) =
                self.core.config.jails.iter().find(|jail| self.core.engine.find(&jail.name) == Some(running.id))
            else {
                continue;
            };
            let logs = if jail.logs.is_empty() { &running.filter.definition.logs } else { &jail.logs };
            for pattern in logs {
                running.requests.push(requests.len());
                requests.push(Request { pattern: pattern.clone(), since: jail.policy.findtime });
            }
        }
        let complaints = self.tailer.watch(&requests);
        for complaint in &complaints {
            tracing::warn!("{}: {}", complaint.path, complaint.sentence);
        }
        self.core.complaints =
            complaints.iter().map(|complaint| format!("{}: {}", complaint.path, complaint.sentence)).collect();
        self.core.set_sources(self.tailer.logs());
        for source in self.core.sources.values() {
            if source.info.state == State::Waiting {
                tracing::info!("{} does not exist yet; waiting for it", source.info.path.display());
            }
        }
    }

    fn reload(&mut self, loaded: Loaded) -> String {
        let names = |config: &Config| config.enabled().map(|jail| jail.name.clone()).collect::<Vec<_>>();
        let (before, after) = (names(&self.core.config), names(&loaded.config));
        let mut changes: Vec<String> = Vec::new();
        changes.extend(after.iter().filter(|name| !before.contains(name)).map(|name| format!("jail {name} is on")));
        changes.extend(before.iter().filter(|name| !after.contains(name)).map(|name| format!("jail {name} is off")));
        let policy = |config: &Config, name: &str| {
            config.jails.iter().find(|jail| jail.name == name).map(|jail| jail.policy.clone())
        };
        for name in after.iter().filter(|name| before.contains(name)) {
            if policy(&self.core.config, name) != policy(&loaded.config, name) {
                changes.push(format!("jail {name} judges differently"));
            }
        }
        if self.core.config.allow != loaded.config.allow {
            changes.push("the allowlist is another".to_owned());
        }
        if self.core.config.paths != loaded.config.paths
            || self.core.config.nftables.enabled != loaded.config.nftables.enabled
        {
            changes.push("[paths] and [enforce.nftables] enabled count from the next start".to_owned());
        }
        let mut allow = Allowlist::new(&loaded.config.allow);
        if loaded.config.ignoreself {
            allow.set_own(&self.core.own);
        }
        allow.keep_hand_made(&self.core.engine.allow);
        self.core.engine.allow = allow;
        self.core.config = loaded.config.clone();
        self.core.set_jails(&loaded);
        self.core.engine.lift_allowed();
        self.core.install();
        self.watch_logs();
        if changes.is_empty() {
            "reloaded; nothing changed that the daemon keeps".to_owned()
        } else {
            format!("reloaded: {}", changes.join("; "))
        }
    }
}

impl Source {
    /// The moment of a line, to find where reading starts.
    fn stamp_of(&mut self, line: &[u8]) -> Option<Timestamp> {
        let mut prefixes: Vec<_> = self.matcher.filters().iter().map(|filter| filter.definition.prefix).collect();
        prefixes.dedup();
        prefixes.into_iter().find_map(|prefix| self.reader.read(prefix, line)?.at)
    }
}

impl Core {
    fn set_jails(&mut self, loaded: &Loaded) {
        self.running.clear();
        let mut kept = Vec::new();
        for (jail, filter) in &loaded.jails {
            let id = self.engine.set_jail(&jail.name, jail.policy.clone(), filter.joining);
            kept.push(id);
            self.running.push(Running {
                id,
                filter: Arc::clone(filter),
                timezone: jail.timezone.clone(),
                requests: Vec::new(),
            });
        }
        let recidive = loaded.config.enabled().find(|jail| jail.name == RECIDIVE);
        let recidive = recidive.map(|jail| self.engine.set_jail(&jail.name, jail.policy.clone(), None));
        self.engine.set_recidive(recidive);
        kept.extend(recidive);
        self.engine.intern(MANUAL);
        let gone: Vec<JailId> = self.engine.jails().map(|jail| jail.id).filter(|id| !kept.contains(id)).collect();
        for id in gone {
            self.engine.remove_jail(id);
        }
    }

    /// Takes back what the last run kept.
    fn restore(&mut self, records: &[Record], at: Timestamp) {
        let mut restored = 0usize;
        for record in records {
            match record {
                Record::Ban { jail, net, since, until, failures, count, origin, reason } => {
                    let Ok(net) = net.parse::<IpNet>() else { continue };
                    let id = self.engine.intern(jail);
                    let (since, until) = (Timestamp(*since), until.map(Timestamp));
                    self.engine.forgive(id, net, since);
                    let ban = Ban {
                        jail: id,
                        net,
                        since,
                        until,
                        failures: *failures,
                        count: *count,
                        origin: Origin::read(origin),
                        reason: reason.clone(),
                    };
                    restored += usize::from(self.engine.restore(ban));
                }
                Record::Unban { jail, net, at } => {
                    let Ok(net) = net.parse::<IpNet>() else { continue };
                    let id = self.engine.intern(jail);
                    self.engine.unban(&net, Some(id));
                    self.engine.forgive(id, net, Timestamp(*at));
                }
                Record::Allow { net, until, note } => {
                    let Ok(net) = net.parse::<IpNet>() else { continue };
                    self.engine.allow.add(net, until.map(Timestamp), note.clone());
                }
                Record::Disallow { net } => {
                    // A network that left the list by its end is not there to be taken off.
                    let _ = net.parse::<IpNet>().map(|net| self.engine.allow.remove(net));
                }
            }
        }
        self.engine.handle_timeout(at, &mut |_| {});
        self.engine.lift_allowed();
        while self.engine.poll_effect().is_some() {}
        self.engine.prune_forgiven(at);
        if restored > 0 {
            tracing::info!("{} bans of the last run still stand", self.engine.ledger().len());
        }
        let records = super::keeper::snapshot(&self.engine, at);
        self.keep.compact(records);
    }

    /// Gives the enforcer the layout and everything that is banned.
    pub(super) fn install(&mut self) {
        self.scopes = Scopes::new(&self.config, self.engine.allow.networks());
        let mut wanted: HashMap<Key, Option<Timestamp>> = HashMap::new();
        for ban in self.engine.ledger().iter() {
            let key = (self.scopes.of(self.engine.name(ban.jail)), ban.net);
            let end = wanted.entry(key).or_insert(ban.until);
            *end = later(*end, ban.until);
        }
        self.enforcer.put(Task::Install(self.scopes.layout.clone(), wanted));
    }

    fn set_own(&mut self, addresses: Vec<IpAddr>) {
        self.own = addresses;
        if self.config.ignoreself && self.engine.allow.set_own(&self.own) {
            tracing::info!("this machine's own addresses changed; the allowlist follows");
            self.engine.lift_allowed();
            self.install();
        }
    }

    /// Makes the table of logs follow the tailer's.
    fn set_sources(&mut self, logs: Vec<LogInfo>) {
        let mut old = std::mem::take(&mut self.sources);
        let mut known: Vec<(Vec<usize>, Arc<LogMatcher>, Route)> = Vec::new();
        for info in logs {
            let jails: Vec<usize> = (0..self.running.len())
                .filter(|index| self.running[*index].requests.iter().any(|request| info.requests.contains(request)))
                .collect();
            let (matcher, route) = match known.iter().find(|(others, _, _)| *others == jails) {
                Some((_, matcher, route)) => (Arc::clone(matcher), route.clone()),
                None => match self.matcher_for(&jails) {
                    Ok((matcher, route)) => {
                        known.push((jails.clone(), Arc::clone(&matcher), route.clone()));
                        (matcher, route)
                    }
                    Err(why) => {
                        tracing::error!("{}: {why}; the log is not read", info.path.display());
                        continue;
                    }
                },
            };
            let zone =
                jails.iter().find_map(|index| self.running[*index].timezone.clone()).unwrap_or_else(TimeZone::system);
            let reader = PrefixReader::new(StampReader::new(zone, now()));
            let source = match old.remove(&info.id) {
                Some(known) => Source { info, matcher, route, reader, ..known },
                None => Source {
                    name: Arc::from(info.path.display().to_string()),
                    info,
                    matcher,
                    route,
                    reader,
                    last: None,
                    lines: 0,
                    failures: HashMap::new(),
                    last_line: None,
                    passed: Passed::default(),
                    undated: 0,
                },
            };
            self.sources.insert(source.info.id, source);
        }
    }

    /// How the logs stand, for answers.
    fn refresh(&mut self, logs: Vec<LogInfo>) {
        for info in logs {
            if let Some(source) = self.sources.get_mut(&info.id) {
                source.info = info;
            }
        }
    }

    fn matcher_for(&self, jails: &[usize]) -> Result<(Arc<LogMatcher>, Route), String> {
        let mut filters: Vec<Arc<Filter>> = Vec::new();
        let mut route = Route::default();
        for index in jails {
            let running = &self.running[*index];
            match filters.iter().position(|filter| Arc::ptr_eq(filter, &running.filter)) {
                Some(known) => route.jails[known].push(running.id),
                None => {
                    filters.push(Arc::clone(&running.filter));
                    route.jails.push(vec![running.id]);
                }
            }
        }
        Ok((Arc::new(LogMatcher::new(filters)?), route))
    }

    /// One chunk of one log.
    fn take(&mut self, chunk: &Chunk<'_>, at: Timestamp) {
        let Some(source) = self.sources.get_mut(&chunk.log) else { return };
        source.reader.set_now(at);
        self.matches.clear();
        let scanned = source.matcher.scan(chunk.bytes, &mut source.reader, &mut self.matches);
        source.lines += scanned.lines;
        source.undated += scanned.undated;
        source.last_line = Some(at);
        if self.matches.is_empty() {
            return;
        }
        let reading = if chunk.live { Reading::Live } else { Reading::Backlog };
        let mut noticed: Vec<Failure> = Vec::new();
        let passed = self.engine.handle_matches(
            at,
            reading,
            &source.matcher,
            &source.route,
            &self.matches,
            &mut source.last,
            &mut |failure| noticed.push(*failure),
        );
        source.passed.too_old += passed.too_old;
        source.passed.undated += passed.undated;
        if passed.off > 0 && source.passed.off == 0 {
            tracing::warn!(
                "{}: its stamps are off by more than a minute; they count as now. Check the clock and the jail's timezone",
                source.name
            );
        }
        source.passed.off += passed.off;
        // The kernel first, then what is only for people.
        self.flush_effects(at);
        let Some(source) = self.sources.get_mut(&chunk.log) else { return };
        for failure in &noticed {
            *source.failures.entry(failure.jail).or_default() += 1;
            if matches!(failure.fate, Fate::Allowed | Fate::Forgiven) {
                continue;
            }
            if let Some(found) = &failure.found
                && let Some(line) = chunk.bytes.get(found.line.0 as usize..found.line.1 as usize)
            {
                let prefix = self.engine.jail(failure.jail).map_or(64, |jail| jail.policy.ipv6_prefix);
                let filter = &source.matcher.filters()[usize::from(found.filter)];
                let pattern = filter.pattern(failure.pattern).map_or("", |pattern| pattern.label.as_str());
                let text = String::from_utf8_lossy(line).into_owned();
                let line = Line {
                    at: failure.at,
                    jail: failure.jail,
                    file: Arc::clone(&source.name),
                    pattern: Arc::from(pattern),
                    text,
                };
                self.evidence.note(counted_net(failure.address, prefix), line);
            }
        }
        if !self.watchers.is_empty() {
            for failure in noticed {
                let mut event = json!({
                    "event": "failure", "jail": self.engine.name(failure.jail), "address": failure.address.to_string(),
                    "at": failure.at.to_string(),
                });
                if failure.fate == Fate::Allowed {
                    event["allowed"] = json!(true);
                }
                self.tell(&event);
            }
            self.tell_events();
        }
    }

    fn tell_events(&mut self) {
        for event in std::mem::take(&mut self.events) {
            self.tell(&event);
        }
    }

    fn handle_timeout(&mut self, at: Timestamp) {
        let allowed = self.engine.allow.entries().len();
        self.engine.handle_timeout(at, &mut |_| {});
        if self.engine.allow.entries().len() != allowed {
            // Somebody's stay on the allowlist is over; the kernel's allow sets follow.
            self.flush_effects(at);
            self.install();
        }
    }

    fn flush(&mut self, at: Timestamp) {
        self.flush_effects(at);
        self.tell_events();
        self.keep.flush(|| super::keeper::snapshot(&self.engine, at));
    }

    /// Hands every effect to the enforcer, the store and the watchers.
    pub(super) fn flush_effects(&mut self, at: Timestamp) {
        let mut tasks = Vec::new();
        while let Some(effect) = self.engine.poll_effect() {
            let ban = match &effect {
                Effect::Ban(ban) | Effect::Extend(ban) | Effect::Unban { ban, .. } => ban,
            };
            let name = self.engine.name(ban.jail);
            let key = (self.scopes.of(name), ban.net);
            let standing = self.strongest(&key);
            let expired = matches!(effect, Effect::Unban { expired: true, .. });
            tasks.push(match (standing, expired) {
                (Some(end), false) => Task::Put(key, end, matches!(effect, Effect::Ban(_)).then_some(self.seen)),
                // Another jail of the scope still wants it; the kernel has its end already.
                (Some(_), true) => continue,
                (None, true) => Task::Forget(key),
                (None, false) => Task::Drop(key),
            });
            self.log(&effect, name);
            self.keep.note(&effect, name, at);
            if !self.watchers.is_empty() {
                let mut event = event_of(&effect, at);
                event["jail"] = json!(name);
                self.events.push(event);
            }
        }
        match tasks.len() {
            0 => {}
            1 => tasks.into_iter().for_each(|task| {
                self.enforcer.put(task);
            }),
            _ => {
                self.enforcer.put(Task::Batch(tasks));
            }
        }
    }

    /// The latest end of all bans of this network in jails of this scope; `None` = none stands.
    fn strongest(&self, (scope, net): &Key) -> Option<Option<Timestamp>> {
        let bans = self.engine.bans_of(net).filter(|ban| self.scopes.of(self.engine.name(ban.jail)) == *scope);
        bans.map(|ban| ban.until).reduce(later)
    }

    fn log(&self, effect: &Effect, jail: &str) {
        // A hundred thousand bans at once must not be put into words that nobody reads.
        if !tracing::enabled!(tracing::Level::INFO) {
            return;
        }
        match effect {
            Effect::Ban(ban) => {
                let until = ban.until.map_or("forever".to_owned(), |until| until.to_string());
                tracing::info!(
                    "[{jail}] ban {} until {until} ({} failures, {})",
                    show_net(&ban.net),
                    ban.failures,
                    ban.origin
                );
            }
            Effect::Extend(ban) => {
                let until = ban.until.map_or("forever".to_owned(), |until| until.to_string());
                tracing::info!("[{jail}] {} stays banned until {until}", show_net(&ban.net));
            }
            Effect::Unban { ban, expired } => {
                tracing::info!(
                    "[{jail}] unban {} ({})",
                    show_net(&ban.net),
                    if *expired { "its time is up" } else { "by hand" }
                );
            }
        }
    }

    fn tell(&mut self, event: &serde_json::Value) {
        let line: Arc<str> = Arc::from(event.to_string());
        // A watcher that cannot keep up misses events; one that left is forgotten.
        self.watchers.retain(|watcher| {
            !matches!(watcher.try_send(Arc::clone(&line)), Err(tokio::sync::mpsc::error::TrySendError::Closed(_)))
        });
    }
}

fn later(a: Option<Timestamp>, b: Option<Timestamp>) -> Option<Timestamp> {
    Some(a?.max(b?))
}

fn event_of(effect: &Effect, at: Timestamp) -> serde_json::Value {
    match effect {
        Effect::Ban(ban) | Effect::Extend(ban) => json!({
            "event": if matches!(effect, Effect::Ban(_)) { "ban" } else { "extend" },
            "address": show_net(&ban.net), "at": at.to_string(), "until": ban.until.map(|until| until.to_string()),
            "failures": ban.failures, "count": ban.count, "origin": ban.origin.to_string(), "reason": ban.reason,
        }),
        Effect::Unban { ban, expired } => {
            json!({"event": "unban", "address": show_net(&ban.net), "at": at.to_string(), "expired": expired})
        }
    }
}
