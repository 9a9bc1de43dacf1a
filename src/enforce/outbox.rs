//! What one target should hold and what of it is still to be sent: wishes come in, batches go out. No clock, no socket.
//!
//! Per network the last wish wins, so however long a target is away, what waits is bounded by what it should hold.
//!
//! Invariant: `wanted` is what the target should hold; `waiting` are the networks whose last wish it has not confirmed.

use hashbrown::{HashMap, HashSet};
use ipnet::IpNet;

use crate::engine::time::{Span, Timestamp};

/// What is meant: a network in a scope.
pub type Key = (std::sync::Arc<str>, IpNet);

/// Waits between tries: doubled each time, from the first to the last.
const BACKOFF_FIRST: Span = Span(50);
/// The longest wait between tries.
const BACKOFF_LAST: Span = Span(10_000);

/// One target's state.
#[derive(Debug, Default)]
pub struct Outbox {
    wanted: HashMap<Key, Option<Timestamp>>,
    waiting: HashSet<Key>,
    failures: u32,
    retry_at: Option<Timestamp>,
}

/// One thing to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Send {
    /// Hold this until then.
    Put(Key, Option<Timestamp>),
    /// Hold it no longer.
    Drop(Key),
}

impl Outbox {
    /// Should be held until `until`; `None` = forever.
    pub fn put(&mut self, key: Key, until: Option<Timestamp>) {
        self.wanted.insert(key.clone(), until);
        self.waiting.insert(key);
    }

    /// Should be held no longer.
    pub fn drop(&mut self, key: Key) {
        self.wanted.remove(&key);
        self.waiting.insert(key);
    }

    /// Its time is up; a target that keeps time has let it go by itself.
    pub fn forget(&mut self, key: &Key) {
        self.wanted.remove(key);
        self.waiting.remove(key);
    }

    /// Replaces everything that should be held; what is new or different is to be sent.
    pub fn replace(&mut self, wanted: HashMap<Key, Option<Timestamp>>) {
        for key in self.wanted.keys() {
            if !wanted.contains_key(key) {
                self.waiting.insert(key.clone());
            }
        }
        for (key, until) in &wanted {
            if self.wanted.get(key) != Some(until) {
                self.waiting.insert(key.clone());
            }
        }
        self.wanted = wanted;
    }

    /// The target lost everything: all of it is to be sent again.
    pub fn resend(&mut self) {
        self.waiting.extend(self.wanted.keys().cloned());
    }

    /// These are to be sent again.
    pub fn resend_some(&mut self, keys: impl IntoIterator<Item = Key>) {
        self.waiting.extend(keys);
    }

    /// Everything that should be held.
    pub fn wanted(&self) -> &HashMap<Key, Option<Timestamp>> {
        &self.wanted
    }

    /// How much is still to be sent.
    pub fn pending(&self) -> usize {
        self.waiting.len()
    }

    /// What is to be sent now; nothing while the wait after a failure lasts. What is over by `now` is left out.
    pub fn batch(&mut self, now: Timestamp) -> Vec<Send> {
        if self.retry_at.is_some_and(|at| at > now) {
            return Vec::new();
        }
        let wanted = &mut self.wanted;
        self.waiting
            .drain()
            .filter_map(|key| match wanted.get(&key).copied() {
                Some(Some(until)) if until <= now => {
                    wanted.remove(&key);
                    None
                }
                Some(until) => Some(Send::Put(key, until)),
                None => Some(Send::Drop(key)),
            })
            .collect()
    }

    /// The whole batch is in force.
    pub fn confirmed(&mut self) {
        self.failures = 0;
        self.retry_at = None;
    }

    /// These were refused; they are tried again after a wait that doubles.
    pub fn refused(&mut self, now: Timestamp, keys: impl IntoIterator<Item = Key>) {
        self.waiting.extend(keys);
        let wait = BACKOFF_FIRST.0.saturating_mul(1 << self.failures.min(20)).min(BACKOFF_LAST.0);
        self.failures = self.failures.saturating_add(1);
        self.retry_at = Some(now + Span(wait));
    }

    /// When the next try is due, if anything waits.
    pub fn poll_timeout(&self) -> Option<Timestamp> {
        if self.waiting.is_empty() { None } else { Some(self.retry_at.unwrap_or(Timestamp(i64::MIN))) }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    fn key(last: u8) -> Key {
        ("all".into(), format!("192.0.2.{last}/32").parse().unwrap())
    }

    #[test]
    fn the_last_wish_per_network_is_sent_once() {
        let mut outbox = Outbox::default();
        outbox.put(key(1), Some(Timestamp(5000)));
        outbox.put(key(1), Some(Timestamp(9000)));
        outbox.put(key(2), Some(Timestamp(9000)));
        outbox.drop(key(2));
        let mut batch = outbox.batch(Timestamp(0));
        batch.sort_by_key(|send| matches!(send, Send::Drop(_)));
        assert_eq!(batch, [Send::Put(key(1), Some(Timestamp(9000))), Send::Drop(key(2))]);
        assert!(outbox.batch(Timestamp(0)).is_empty() && outbox.poll_timeout().is_none());
    }

    #[test]
    fn what_was_refused_is_tried_again_after_a_wait_that_doubles_and_what_is_over_is_not() {
        let mut outbox = Outbox::default();
        outbox.put(key(1), Some(Timestamp(500)));
        assert_eq!(outbox.batch(Timestamp(0)).len(), 1);
        outbox.refused(Timestamp(0), [key(1)]);
        assert!(outbox.batch(Timestamp(49)).is_empty());
        assert_eq!(outbox.poll_timeout(), Some(Timestamp(50)));
        assert_eq!(outbox.batch(Timestamp(50)).len(), 1);
        outbox.refused(Timestamp(50), [key(1)]);
        assert_eq!(outbox.poll_timeout(), Some(Timestamp(150)));
        assert!(outbox.batch(Timestamp(500)).is_empty());
        assert!(outbox.wanted().is_empty() && outbox.pending() == 0);
    }

    #[test]
    fn a_target_that_lost_everything_gets_everything_again() {
        let mut outbox = Outbox::default();
        outbox.put(key(1), None);
        outbox.put(key(2), None);
        outbox.batch(Timestamp(0));
        outbox.resend();
        assert_eq!(outbox.batch(Timestamp(0)).len(), 2);
        outbox.replace([(key(2), None), (key(3), None)].into_iter().collect());
        let mut batch = outbox.batch(Timestamp(0));
        batch.sort_by_key(|send| matches!(send, Send::Drop(_)));
        assert_eq!(batch, [Send::Put(key(3), None), Send::Drop(key(1))]);
    }
}
