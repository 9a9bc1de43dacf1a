//! The engine: matches and commands come in, each with its moment; notices to look at and effects to carry out go out.
//!
//! Invariant: it never asks for the time, a file or a socket; the daemon and the replay run this very same code.

use std::net::IpAddr;
use std::sync::Arc;

use hashbrown::HashMap;
use ipnet::IpNet;

use super::address::{counted_net, show_net};
use super::allowlist::{Allowlist, By};
use super::effect::{Ban, Effect, JailId, Origin};
use super::filter::definition::Joining;
use super::filter::matcher::{LogMatcher, Match};
use super::filter::session::{Counted, Joiner};
use super::jail::{Jail, Policy};
use super::ledger::{Ledger, ban_span};
use super::tally::Tally;
use super::time::{Span, Timestamp};

/// A stamp this far ahead of the clock is a wrong clock or zone, and counts as now.
pub const AHEAD_MAX: Span = Span::from_seconds(60);
/// A line without a date gets the last one's, if that is not older.
const UNDATED_MAX: Span = Span::from_seconds(60);

/// How the moments of lines are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// Lines written just now: a stamp off by more than the window means a wrong clock or zone, and counts as now.
    Live,
    /// Lines of before, read while catching up: older than the window does not count.
    Backlog,
    /// Somebody asks what would have been: the log's own time is the time.
    Replay,
}

/// A failure that counted, for whoever watches.
#[derive(Clone, Copy, Debug)]
pub struct Failure {
    /// In which jail.
    pub jail: JailId,
    /// Whose.
    pub address: IpAddr,
    /// When.
    pub at: Timestamp,
    /// By which pattern of the jail's filter.
    pub pattern: u16,
    /// The match whose line made it count; `None` when a session ended without a line.
    pub found: Option<Match>,
    /// What became of it.
    pub fate: Fate,
}

/// What became of a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is in the window.
    Counted,
    /// It was one too many.
    Banned,
    /// The address is never banned.
    Allowed,
    /// The address is banned in this jail already.
    AlreadyBanned,
    /// It was answered already: before a ban that a restart remembers, or before somebody let the address in again.
    Forgiven,
}

/// Lines that were not counted, and why.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Passed {
    /// Older than the window when first read.
    pub too_old: u64,
    /// Without a date, and none near enough before them.
    pub undated: u64,
    /// Stamps that were replaced by now: the log's clock or zone is off.
    pub off: u64,
}

/// Which jails look at which filter of a log.
#[derive(Clone, Debug, Default)]
pub struct Route {
    /// For each filter number of the log's matcher, the jails.
    pub jails: Vec<Vec<JailId>>,
}

/// All decisions.
#[derive(Debug)]
pub struct Engine {
    /// By number; numbers of names that are no jail (any more) are empty.
    jails: Vec<Option<Jail>>,
    names: HashMap<Arc<str>, JailId>,
    by_id: Vec<Arc<str>>,
    /// Never banned.
    pub allow: Allowlist,
    tally: Tally,
    ledger: Ledger,
    late: Vec<(JailId, Counted)>,
    forgiven: HashMap<(JailId, IpNet), Timestamp>,
    recidive: Option<JailId>,
}

impl Engine {
    /// An engine that remembers at most `capacity` addresses with failures.
    pub fn new(capacity: usize, allow: Allowlist) -> Self {
        Self {
            jails: Vec::new(),
            names: HashMap::new(),
            by_id: Vec::new(),
            allow,
            tally: Tally::new(capacity),
            ledger: Ledger::default(),
            late: Vec::new(),
            forgiven: HashMap::new(),
            recidive: None,
        }
    }

    /// The number of a jail's name; the first time, it gets one.
    pub fn intern(&mut self, name: &str) -> JailId {
        if let Some(id) = self.names.get(name) {
            return *id;
        }
        let id = JailId(u16::try_from(self.by_id.len()).unwrap_or(u16::MAX));
        let name: Arc<str> = Arc::from(name);
        self.by_id.push(Arc::clone(&name));
        self.names.insert(name, id);
        id
    }

    /// The number of a name that is known.
    pub fn find(&self, name: &str) -> Option<JailId> {
        self.names.get(name).copied()
    }

    /// The name of a jail.
    pub fn name(&self, id: JailId) -> &str {
        self.by_id.get(usize::from(id.0)).map_or("?", |name| name)
    }

    /// Puts a jail in, or gives one that is there a new policy; its window and bans stay.
    pub fn set_jail(&mut self, name: &str, policy: Policy, joining: Option<Joining>) -> JailId {
        let id = self.intern(name);
        let name = Arc::clone(&self.by_id[usize::from(id.0)]);
        let place = usize::from(id.0);
        if self.jails.len() <= place {
            self.jails.resize_with(place + 1, || None);
        }
        match &mut self.jails[place] {
            Some(jail) => {
                jail.policy = policy;
                if jail.joiner.joining() != joining {
                    jail.joiner = Joiner::new(joining);
                }
            }
            slot => *slot = Some(Jail { id, name, policy, joiner: Joiner::new(joining), failures: 0 }),
        }
        id
    }

    /// Takes a jail out: its window is forgotten, its bans stand until they end.
    pub fn remove_jail(&mut self, id: JailId) {
        if let Some(slot) = self.jails.get_mut(usize::from(id.0)) {
            *slot = None;
        }
        self.tally.forget(Some(id), |_| true);
    }

    /// The jails, in order of their numbers.
    pub fn jails(&self) -> impl Iterator<Item = &Jail> {
        self.jails.iter().flatten()
    }

    /// A jail.
    pub fn jail(&self, id: JailId) -> Option<&Jail> {
        self.jails.get(usize::from(id.0))?.as_ref()
    }

    /// Addresses with failures in a window.
    pub fn tracked(&self) -> usize {
        self.tally.len()
    }

    /// Bans that stand.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// All bans of exactly this network, whatever the jail.
    pub fn bans_of<'a>(&'a self, net: &'a IpNet) -> impl Iterator<Item = &'a Ban> + 'a {
        (0..self.by_id.len()).filter_map(|number| self.ledger.get(JailId(u16::try_from(number).ok()?), net))
    }

    /// Failures of a network in a jail's window at `now`.
    pub fn failures_in_window(&self, jail: JailId, net: &IpNet, now: Timestamp) -> usize {
        self.jail(jail).map_or(0, |known| self.tally.count(jail, net, now, known.policy.findtime))
    }

    /// Takes in what a chunk of one log gave. `last` is the log's last moment, for lines without a date.
    #[expect(clippy::too_many_arguments, reason = "one call per chunk; a struct would only be taken apart again")]
    pub fn handle_matches(
        &mut self,
        now: Timestamp,
        reading: Reading,
        matcher: &LogMatcher,
        route: &Route,
        matches: &[Match],
        last: &mut Option<Timestamp>,
        notice: &mut dyn FnMut(&Failure),
    ) -> Passed {
        let mut passed = Passed::default();
        for found in matches {
            let Some(filter) = matcher.filters().get(usize::from(found.filter)) else { continue };
            let Some(pattern) = filter.pattern(found.pattern) else { continue };
            let jails = route.jails.get(usize::from(found.filter)).map_or(&[][..], Vec::as_slice);
            if found.at.is_some() {
                *last = found.at;
            }
            for id in jails {
                let Some(Some(jail)) = self.jails.get_mut(usize::from(id.0)) else { continue };
                let Some(at) = moment(found.at, now, reading, *last, jail.policy.findtime, &mut passed) else {
                    continue;
                };
                if reading == Reading::Replay {
                    self.ledger.handle_timeout(at);
                }
                let late = &mut self.late;
                jail.joiner.take(found, (pattern.role, pattern.ends), at, 0, |counted| late.push((*id, counted)));
                if late.is_empty() {
                    continue;
                }
                let starts = if reading == Reading::Replay { at } else { now };
                self.count_late(starts, Some(*found), notice);
            }
        }
        passed
    }

    /// Ends what is over: bans, sessions without a last line, allowlist entries.
    pub fn handle_timeout(&mut self, now: Timestamp, notice: &mut dyn FnMut(&Failure)) {
        self.ledger.handle_timeout(now);
        self.allow.handle_timeout(now);
        self.close_sessions(now, now, notice);
    }

    /// Closes every session that is over by `by`, counting what waited in it as of `now`; bans are left as they stand.
    pub fn close_sessions(&mut self, by: Timestamp, now: Timestamp, notice: &mut dyn FnMut(&Failure)) {
        for jail in self.jails.iter_mut().flatten() {
            let (late, id) = (&mut self.late, jail.id);
            jail.joiner.handle_timeout(by, |counted| late.push((id, counted)));
        }
        self.late.sort_unstable_by_key(|(id, counted)| (counted.at, *id, counted.address));
        self.count_late(now, None, notice);
    }

    /// When `handle_timeout` has something to do.
    pub fn poll_timeout(&self) -> Option<Timestamp> {
        let sessions = self.jails.iter().flatten().filter_map(|jail| jail.joiner.poll_timeout()).min();
        [self.ledger.poll_timeout(), self.allow.poll_timeout(), sessions.map(|end| end + Span(1))]
            .into_iter()
            .flatten()
            .min()
    }

    /// The next thing to be done in the world.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        self.ledger.poll_effect()
    }

    fn count_late(&mut self, now: Timestamp, found: Option<Match>, notice: &mut dyn FnMut(&Failure)) {
        let mut late = std::mem::take(&mut self.late);
        for (id, counted) in late.drain(..) {
            let fate = self.count(id, &counted, now);
            let found = found.filter(|_| counted.at_once);
            let Counted { address, at, pattern, .. } = counted;
            notice(&Failure { jail: id, address, at, pattern, found, fate });
        }
        self.late = late;
    }

    /// One failure: into the window, and over the edge if it is one too many.
    fn count(&mut self, id: JailId, counted: &Counted, now: Timestamp) -> Fate {
        let Some(Some(jail)) = self.jails.get_mut(usize::from(id.0)) else { return Fate::Allowed };
        jail.failures += 1;
        if self.allow.contains(counted.address) {
            return Fate::Allowed;
        }
        let mut net = counted_net(counted.address, jail.policy.ipv6_prefix);
        // A whole prefix must not take an allowed neighbour with it.
        if net.prefix_len() != net.max_prefix_len() && self.allow.touches(&net) {
            net = IpNet::from(counted.address);
        }
        if self.ledger.get(id, &net).is_some() {
            return Fate::AlreadyBanned;
        }
        if !self.forgiven.is_empty() && self.forgiven.get(&(id, net)).is_some_and(|up_to| counted.at <= *up_to) {
            return Fate::Forgiven;
        }
        let policy = &jail.policy;
        let Some(failures) = self.tally.hit(id, net, counted.at, policy.maxretry, policy.findtime) else {
            return Fate::Counted;
        };
        let count = 1 + self.ledger.times_before(id, &net, now, policy.growth.map(|growth| growth.forget));
        let until = ban_span(policy.bantime, policy.growth, count).map(|span| now + span);
        let ban = Ban { jail: id, net, since: now, until, failures, count, origin: Origin::Log, reason: String::new() };
        self.ledger.ban(ban, false);
        // Who is banned again and again is a failure of the jail that counts bans.
        if let Some(recidive) = self.recidive
            && recidive != id
        {
            self.count(recidive, &Counted { at: now, ..*counted }, now);
        }
        Fate::Banned
    }

    /// Bans by hand, or because another host says so.
    ///
    /// # Errors
    /// A sentence, when the allowlist or this machine's own address forbids it.
    pub fn ban(&mut self, ban: Ban, replace: bool) -> Result<(), String> {
        if let Some(entry) = self.allow.reason_against(&ban.net) {
            let (net, on) = (show_net(&ban.net), show_net(&entry.net));
            return Err(match entry.by {
                By::Own => {
                    format!("{net} was not banned: it would shut out this machine itself ({on}, {})", entry.note)
                }
                By::Configuration => {
                    format!("{net} was not banned: {on} is on the allowlist ([allow] in the configuration)")
                }
                By::Hand => {
                    format!("{net} was not banned: {on} is on the allowlist; banctl allow remove {on} takes it off")
                }
            });
        }
        let count = 1 + self.ledger.times_before(ban.jail, &ban.net, ban.since, None);
        self.ledger.ban(Ban { count, ..ban }, replace);
        Ok(())
    }

    /// Failures of a network up to a moment do not count any more: they led to a ban, or somebody let it in again.
    pub fn forgive(&mut self, jail: JailId, net: IpNet, up_to: Timestamp) {
        let known = self.forgiven.entry((jail, net)).or_insert(up_to);
        *known = up_to.max(*known);
    }

    /// Forgiveness that no window reaches back to is forgotten.
    pub fn prune_forgiven(&mut self, now: Timestamp) {
        let jails = &self.jails;
        self.forgiven.retain(|(id, _), up_to| {
            let jail = jails.get(usize::from(id.0)).and_then(Option::as_ref);
            jail.is_some_and(|jail| *up_to + jail.policy.findtime >= now)
        });
    }

    /// What is forgiven: jail, network, up to when.
    pub fn forgiven(&self) -> impl Iterator<Item = (JailId, IpNet, Timestamp)> {
        self.forgiven.iter().map(|((jail, net), up_to)| (*jail, *net, *up_to))
    }

    /// Bans that are over but still matter at `at`: for longer bans later, or because a window reaches back to them.
    pub fn past_bans(&self, at: Timestamp) -> Vec<Ban> {
        self.ledger.past(|jail, end| {
            let Some(jail) = self.jail(jail) else { return false };
            let matters =
                jail.policy.growth.map_or(jail.policy.findtime, |growth| growth.forget.max(jail.policy.findtime));
            end + matters >= at
        })
    }

    /// The jail that counts bans instead of lines; `None` = there is none.
    pub fn set_recidive(&mut self, jail: Option<JailId>) {
        self.recidive = jail;
    }

    /// Takes back a ban an earlier run saved, unless it is allowed by now.
    pub fn restore(&mut self, ban: Ban) -> bool {
        if self.allow.reason_against(&ban.net).is_some() {
            return false;
        }
        self.ledger.restore(ban);
        true
    }

    /// Lets in again everything that lies in `net` (or contains it, if it is one address), and forgets the failures, too.
    pub fn unban(&mut self, net: &IpNet, jail: Option<JailId>) -> Vec<Ban> {
        let meant = |other: &IpNet| net.contains(other) || other.contains(net);
        let wanted: Vec<(JailId, IpNet)> = self
            .ledger
            .iter()
            .filter(|ban| jail.is_none_or(|jail| jail == ban.jail) && meant(&ban.net))
            .map(|ban| (ban.jail, ban.net))
            .collect();
        self.forget(jail, meant);
        self.lift(wanted)
    }

    /// Lets everybody in again.
    pub fn unban_all(&mut self, jail: Option<JailId>) -> Vec<Ban> {
        let wanted: Vec<(JailId, IpNet)> = self
            .ledger
            .iter()
            .filter(|ban| jail.is_none_or(|jail| jail == ban.jail))
            .map(|ban| (ban.jail, ban.net))
            .collect();
        self.forget(jail, |_| true);
        self.lift(wanted)
    }

    /// Lifts every ban the allowlist now forbids.
    pub fn lift_allowed(&mut self) -> Vec<Ban> {
        let wanted: Vec<(JailId, IpNet)> = self
            .ledger
            .iter()
            .filter(|ban| self.allow.reason_against(&ban.net).is_some())
            .map(|ban| (ban.jail, ban.net))
            .collect();
        self.lift(wanted)
    }

    /// How often a network was banned in a jail before.
    pub fn times_banned(&self, jail: JailId, net: &IpNet, now: Timestamp) -> u32 {
        self.ledger.times_before(jail, net, now, None)
    }

    fn lift(&mut self, mut wanted: Vec<(JailId, IpNet)>) -> Vec<Ban> {
        wanted.sort_unstable();
        wanted.iter().filter_map(|(jail, net)| self.ledger.unban(*jail, net)).collect()
    }

    fn forget(&mut self, jail: Option<JailId>, meant: impl Fn(&IpNet) -> bool) {
        self.tally.forget(jail, &meant);
        for known in self.jails.iter_mut().flatten() {
            if jail.is_none_or(|jail| jail == known.id) {
                known.joiner.forget(|address| meant(&IpNet::from(address)));
            }
        }
    }
}

/// The moment a line counts at; `None` = it does not count.
fn moment(
    written: Option<Timestamp>,
    now: Timestamp,
    reading: Reading,
    last: Option<Timestamp>,
    findtime: Span,
    passed: &mut Passed,
) -> Option<Timestamp> {
    let Some(at) = written else {
        let near = last.filter(|last| reading == Reading::Replay || now - *last <= UNDATED_MAX);
        return match (near, reading) {
            (Some(last), _) => Some(last),
            (None, Reading::Live) => Some(now),
            (None, Reading::Backlog | Reading::Replay) => {
                passed.undated += 1;
                None
            }
        };
    };
    if reading == Reading::Replay {
        return Some(at);
    }
    let old = at < now - findtime;
    if at > now + AHEAD_MAX || (old && reading == Reading::Live) {
        passed.off += 1;
        return Some(now);
    }
    if old {
        passed.too_old += 1;
        return None;
    }
    Some(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(written: Option<i64>, reading: Reading, last: Option<i64>, expect: Option<i64>) {
        let at = |seconds: i64| Timestamp::from_seconds(seconds);
        let mut passed = Passed::default();
        let got = moment(written.map(at), at(10_000), reading, last.map(at), Span::from_seconds(600), &mut passed);
        assert_eq!(got.map(Timestamp::seconds), expect, "{written:?} {reading:?}");
    }

    #[test]
    fn moments_count_as_documented() {
        use Reading::{Backlog, Live, Replay};
        check(Some(9_990), Live, None, Some(9_990));
        check(Some(9_400), Live, None, Some(9_400));
        check(Some(9_399), Live, None, Some(10_000));
        check(Some(9_399), Backlog, None, None);
        check(Some(9_400), Backlog, None, Some(9_400));
        check(Some(10_060), Live, None, Some(10_060));
        check(Some(10_061), Live, None, Some(10_000));
        check(Some(10_061), Backlog, None, Some(10_000));
        check(Some(5), Replay, None, Some(5));
        check(None, Live, None, Some(10_000));
        check(None, Live, Some(9_950), Some(9_950));
        check(None, Backlog, None, None);
        check(None, Backlog, Some(9_930), None);
        check(None, Replay, Some(5), Some(5));
    }
}
