//! Bans that stand: verdicts and commands come in, effects go out. The truth of which every enforcer holds a copy.
//!
//! Ends are kept in an ordered queue; nothing is ever scanned to find what is over.

use std::collections::{BTreeSet, VecDeque};
use std::hash::{Hash, Hasher};
use std::net::IpAddr;

use hashbrown::HashMap;
use ipnet::IpNet;

use super::effect::{Ban, Effect, JailId, Origin};
use super::time::{Span, Timestamp};

/// Networks whose earlier bans are remembered; beyond it the oldest are forgotten.
pub const HISTORY_MAX: usize = 1_000_000;

/// How bans get longer for those who come back.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Growth {
    /// The nth ban is `bantime` times this to the power of n-1.
    pub factor: f64,
    /// But never longer than this.
    pub max: Span,
    /// Bans that ended longer ago do not count any more.
    pub forget: Span,
}

/// Length of the `count`th ban (from 1); `None` = forever.
pub fn ban_span(bantime: Option<Span>, growth: Option<Growth>, count: u32) -> Option<Span> {
    let bantime = bantime?;
    let Some(growth) = growth else { return Some(bantime) };
    let exponent = i32::try_from(count.saturating_sub(1)).unwrap_or(i32::MAX);
    #[expect(clippy::cast_precision_loss, reason = "milliseconds of a ban fit a double exactly")]
    let grown = bantime.0 as f64 * growth.factor.powi(exponent);
    #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, reason = "compared with max first")]
    let span = if grown >= growth.max.0 as f64 { growth.max } else { Span(grown as i64) };
    Some(span.max(bantime.min(growth.max)))
}

#[derive(Clone, Copy, Debug)]
struct Past {
    count: u32,
    since: Timestamp,
    last_end: Timestamp,
}

/// A network in a jail, hashed as one number: the question "is it banned?" is asked for every failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Key(IpNet, JailId);

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let address = match self.0.addr() {
            IpAddr::V4(address) => u128::from(address.to_bits()),
            IpAddr::V6(address) => address.to_bits(),
        };
        state.write_u128(address);
        state.write_u32(u32::from(self.1.0) << 8 | u32::from(self.0.prefix_len()));
    }
}

/// All bans, by network and jail.
///
/// Invariant: `next_end` is the earliest of `ends`, or the largest moment there is.
#[derive(Debug)]
pub struct Ledger {
    /// Boxed, so that the table itself stays small enough for the cache.
    bans: HashMap<Key, Box<Ban>>,
    ends: BTreeSet<(Timestamp, IpNet, JailId)>,
    next_end: Timestamp,
    /// Bans that stand, by the jail's number.
    standing: Vec<usize>,
    history: HashMap<Key, Past>,
    history_order: VecDeque<Key>,
    effects: VecDeque<Effect>,
}

impl Default for Ledger {
    fn default() -> Self {
        Self {
            bans: HashMap::new(),
            ends: BTreeSet::new(),
            next_end: Timestamp(i64::MAX),
            standing: Vec::new(),
            history: HashMap::new(),
            history_order: VecDeque::new(),
            effects: VecDeque::new(),
        }
    }
}

impl Ledger {
    /// Bans that stand.
    pub fn len(&self) -> usize {
        self.bans.len()
    }

    /// Bans that stand in one jail.
    pub fn standing(&self, jail: JailId) -> usize {
        self.standing.get(usize::from(jail.0)).copied().unwrap_or(0)
    }

    /// Nobody is banned.
    pub fn is_empty(&self) -> bool {
        self.bans.is_empty()
    }

    /// The ban of exactly this network in this jail.
    #[inline]
    pub fn get(&self, jail: JailId, net: &IpNet) -> Option<&Ban> {
        self.bans.get(&Key(*net, jail)).map(AsRef::as_ref)
    }

    /// All bans, in order of network and jail.
    pub fn bans(&self) -> Vec<&Ban> {
        let mut all: Vec<&Ban> = self.bans.values().map(AsRef::as_ref).collect();
        all.sort_unstable_by_key(|ban| (ban.net, ban.jail));
        all
    }

    /// All bans, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &Ban> {
        self.bans.values().map(AsRef::as_ref)
    }

    /// How often this network was banned in this jail before, as far as it still counts at `now`.
    pub fn times_before(&self, jail: JailId, net: &IpNet, now: Timestamp, forget: Option<Span>) -> u32 {
        match self.history.get(&Key(*net, jail)) {
            Some(past) if forget.is_none_or(|forget| past.last_end + forget >= now) => past.count,
            _ => 0,
        }
    }

    /// Bans that are over, as far as `counts` wants them by jail and end.
    pub fn past(&self, counts: impl Fn(JailId, Timestamp) -> bool) -> Vec<Ban> {
        let over =
            self.history.iter().filter(|(key, past)| !self.bans.contains_key(*key) && counts(key.1, past.last_end));
        over.map(|(Key(net, jail), past)| Ban {
            count: past.count,
            ..plain_ban(*jail, *net, past.since, Some(past.last_end))
        })
        .collect()
    }

    /// Puts a ban in. One that stands already gets the later end (or, `replace`, the new one).
    pub fn ban(&mut self, ban: Ban, replace: bool) {
        let key = Key(ban.net, ban.jail);
        let later = |a: Option<Timestamp>, b: Option<Timestamp>| Some(a?.max(b?));
        if let Some(standing) = self.bans.get_mut(&key) {
            let until = if replace { ban.until } else { later(standing.until, ban.until) };
            let before = standing.until;
            if until == before {
                return;
            }
            standing.until = until;
            standing.reason = ban.reason;
            standing.origin = ban.origin;
            let extended = Ban::clone(standing);
            if let Some(end) = before {
                self.remove_end((end, ban.net, ban.jail));
            }
            if let Some(end) = until {
                self.add_end((end, ban.net, ban.jail));
            }
            self.remember(&extended);
            self.effects.push_back(Effect::Extend(extended));
            return;
        }
        if let Some(end) = ban.until {
            self.add_end((end, ban.net, ban.jail));
        }
        self.remember(&ban);
        self.insert(ban.clone());
        self.effects.push_back(Effect::Ban(ban));
    }

    /// Takes a ban back that was saved by an earlier run: it stands, but it is not new.
    pub fn restore(&mut self, ban: Ban) {
        if let Some(end) = ban.until {
            self.add_end((end, ban.net, ban.jail));
        }
        self.remember(&ban);
        self.insert(ban);
    }

    fn remember(&mut self, ban: &Ban) {
        let key = Key(ban.net, ban.jail);
        let past = Past { count: ban.count, since: ban.since, last_end: ban.until.unwrap_or(Timestamp(i64::MAX / 2)) };
        if self.history.insert(key, past).is_none() {
            self.history_order.push_back(key);
            if self.history_order.len() > HISTORY_MAX
                && let Some(oldest) = self.history_order.pop_front()
            {
                self.history.remove(&oldest);
            }
        }
    }

    /// Lets a network in again in one jail; the ban that stood.
    pub fn unban(&mut self, jail: JailId, net: &IpNet) -> Option<Ban> {
        let ban = self.take(jail, net)?;
        self.effects.push_back(Effect::Unban { ban: ban.clone(), expired: false });
        Some(ban)
    }

    fn take(&mut self, jail: JailId, net: &IpNet) -> Option<Ban> {
        let ban = self.bans.remove(&Key(*net, jail))?;
        self.standing[usize::from(jail.0)] -= 1;
        if let Some(end) = ban.until {
            self.remove_end((end, ban.net, ban.jail));
        }
        Some(*ban)
    }

    /// When the next ban is over.
    #[inline]
    pub fn poll_timeout(&self) -> Option<Timestamp> {
        self.ends.first().map(|(end, _, _)| *end)
    }

    /// Ends every ban whose time is up at `now`.
    #[inline]
    pub fn handle_timeout(&mut self, now: Timestamp) {
        if self.next_end <= now {
            self.end_until(now);
        }
    }

    fn end_until(&mut self, now: Timestamp) {
        while let Some((end, net, jail)) = self.ends.first().copied()
            && end <= now
        {
            self.remove_end((end, net, jail));
            if let Some(ban) = self.take(jail, &net) {
                self.effects.push_back(Effect::Unban { ban, expired: true });
            }
        }
    }

    fn insert(&mut self, ban: Ban) {
        let jail = usize::from(ban.jail.0);
        if self.standing.len() <= jail {
            self.standing.resize(jail + 1, 0);
        }
        if self.bans.insert(Key(ban.net, ban.jail), Box::new(ban)).is_none() {
            self.standing[jail] += 1;
        }
    }

    fn add_end(&mut self, end: (Timestamp, IpNet, JailId)) {
        self.next_end = self.next_end.min(end.0);
        self.ends.insert(end);
    }

    fn remove_end(&mut self, end: (Timestamp, IpNet, JailId)) {
        self.ends.remove(&end);
        self.next_end = self.ends.first().map_or(Timestamp(i64::MAX), |(first, _, _)| *first);
    }

    /// The next thing to be done.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }
}

/// A ban without anything special about it.
pub fn plain_ban(jail: JailId, net: IpNet, since: Timestamp, until: Option<Timestamp>) -> Ban {
    Ban { jail, net, since, until, failures: 0, count: 1, origin: Origin::Log, reason: String::new() }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    const JAIL: JailId = JailId(1);

    fn net() -> IpNet {
        "192.0.2.1/32".parse().unwrap()
    }

    fn ban(since: i64, until: Option<i64>) -> Ban {
        plain_ban(JAIL, net(), Timestamp::from_seconds(since), until.map(Timestamp::from_seconds))
    }

    fn drain(ledger: &mut Ledger) -> String {
        let mut out = String::new();
        while let Some(effect) = ledger.poll_effect() {
            let end = |ban: &Ban| ban.until.map_or("forever".to_owned(), |until| until.seconds().to_string());
            out += &match effect {
                Effect::Ban(ban) => format!("ban {} ", end(&ban)),
                Effect::Extend(ban) => format!("extend {} ", end(&ban)),
                Effect::Unban { expired, .. } => format!("unban{} ", if expired { " expired" } else { "" }),
            };
        }
        out.trim_end().to_owned()
    }

    #[test]
    fn bans_end_in_order_at_their_moment_and_not_before() {
        let mut ledger = Ledger::default();
        ledger.ban(ban(0, Some(10)), false);
        assert_eq!(ledger.poll_timeout(), Some(Timestamp::from_seconds(10)));
        ledger.handle_timeout(Timestamp(9_999));
        assert_eq!(drain(&mut ledger), "ban 10");
        ledger.handle_timeout(Timestamp(10_000));
        assert_eq!(drain(&mut ledger), "unban expired");
        assert!(ledger.is_empty() && ledger.poll_timeout().is_none());
        assert_eq!(ledger.standing(JAIL), 0);
    }

    #[test]
    fn a_standing_ban_gets_the_later_end_and_only_a_command_shortens_it() {
        let mut ledger = Ledger::default();
        ledger.ban(ban(0, Some(10)), false);
        ledger.ban(ban(1, Some(5)), false);
        ledger.ban(ban(1, Some(20)), false);
        assert_eq!(drain(&mut ledger), "ban 10 extend 20");
        ledger.handle_timeout(Timestamp::from_seconds(10));
        assert_eq!((ledger.len(), ledger.standing(JAIL)), (1, 1));
        ledger.ban(ban(1, None), false);
        ledger.ban(ban(1, Some(30)), false);
        ledger.ban(ban(1, Some(15)), true);
        assert_eq!(drain(&mut ledger), "extend forever extend 15");
        assert!(ledger.unban(JAIL, &net()).is_some() && ledger.unban(JAIL, &net()).is_none());
        assert_eq!(drain(&mut ledger), "unban");
    }

    #[test]
    fn the_nth_ban_is_longer_and_old_ones_are_forgiven() {
        let growth = Some(Growth { factor: 2.0, max: Span::from_seconds(100), forget: Span::from_seconds(1000) });
        let spans: Vec<i64> =
            (1..=6).map(|count| ban_span(Some(Span::from_seconds(10)), growth, count).unwrap().seconds()).collect();
        assert_eq!(spans, [10, 20, 40, 80, 100, 100]);
        assert_eq!(ban_span(Some(Span::from_seconds(10)), growth, u32::MAX).unwrap().seconds(), 100);
        assert_eq!(ban_span(Some(Span::from_seconds(10)), None, 5).unwrap().seconds(), 10);
        assert_eq!(ban_span(None, growth, 5), None);
        let mut ledger = Ledger::default();
        ledger.ban(ban(0, Some(10)), false);
        let forget = Some(Span::from_seconds(1000));
        assert_eq!(ledger.times_before(JAIL, &net(), Timestamp::from_seconds(1010), forget), 1);
        assert_eq!(ledger.times_before(JAIL, &net(), Timestamp::from_seconds(1011), forget), 0);
    }
}
