//! Lines of one connection joined to attempts: matches come in, failures that count go out. Knows nothing of windows and bans.
//!
//! A session is a process (sshd), or an address with an id in the message (SIP: address and Call-ID). Within it:
//! failure lines count one by one, or once (`once = true`) apart from different `<F-ATTEMPT>`; twin lines (the same
//! attempt in another log or another wording) count only what the failure lines have not; alone lines count once when the
//! session ends with nothing counted; a success forgets what was waiting, and what follows it is no attempt.

use std::collections::VecDeque;
use std::net::IpAddr;

use hashbrown::HashMap;
use smallvec::SmallVec;

use super::definition::{JoinedBy, Joining, Role};
use super::matcher::Match;
use super::prefix::hash_of;
use crate::engine::time::Timestamp;

/// Sessions remembered per jail; beyond it the oldest is closed early (counting what was waiting).
pub const SESSIONS_MAX: usize = 65_536;
/// Different attempts told apart in one session; beyond it every line counts.
const ATTEMPTS_MAX: usize = 64;

/// One failure that counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counted {
    /// Whose.
    pub address: IpAddr,
    /// When.
    pub at: Timestamp,
    /// By which pattern.
    pub pattern: u16,
    /// The line that made it count is also the line that told of it.
    pub at_once: bool,
    /// What the caller marked the line with that told of it.
    pub mark: u64,
}

/// Joins the matches of one jail.
#[derive(Debug)]
pub struct Joiner {
    joining: Option<Joining>,
    sessions: HashMap<u64, Session>,
    order: VecDeque<(Timestamp, u64)>,
}

/// Small on purpose (24 bytes): one is made for nearly every failure, and most of them never need more than the counters.
#[derive(Debug)]
struct Session {
    ends_by: Timestamp,
    counted: u16,
    /// Lines of each series that are only counted.
    lines: [u16; 2],
    succeeded: bool,
    more: Option<Box<More>>,
}

/// What few sessions need.
#[derive(Debug, Default)]
struct More {
    /// Attempts of each series that are told apart.
    attempts: [SmallVec<[u64; 4]>; 2],
    waiting: Option<Counted>,
}

impl Joiner {
    /// A joiner for a filter that joins like this, or not at all.
    pub fn new(joining: Option<Joining>) -> Self {
        Self { joining, sessions: HashMap::new(), order: VecDeque::new() }
    }

    /// How it joins.
    pub fn joining(&self) -> Option<Joining> {
        self.joining
    }

    /// Sessions remembered now.
    pub fn len(&self) -> usize {
        self.sessions.len()
    }

    /// No session is remembered.
    pub fn is_empty(&self) -> bool {
        self.sessions.is_empty()
    }

    /// Takes one match in, marked by the caller; calls `count` for every failure that it makes count.
    #[inline]
    pub fn take(
        &mut self,
        found: &Match,
        (role, ends): (Role, bool),
        at: Timestamp,
        mark: u64,
        mut count: impl FnMut(Counted),
    ) {
        let failure = found.address.map(|address| Counted { address, at, pattern: found.pattern, at_once: true, mark });
        let Some(joining) = self.joining else {
            if let (Some(failure), Role::Failure | Role::Twin | Role::Alone) = (failure, role) {
                count(failure);
            }
            return;
        };
        let Some(key) = key_of(joining, found) else {
            // Without an id nothing can be joined: only what is a failure by itself counts.
            if let (Some(failure), Role::Failure) = (failure, role) {
                count(failure);
            }
            return;
        };
        self.handle_timeout(at, &mut count);
        if self.sessions.len() >= SESSIONS_MAX
            && let Some((_, oldest)) = self.order.pop_front()
        {
            self.close(oldest, &mut count);
        }
        if matches!(role, Role::Success | Role::End) {
            // Nothing to remember of a session in which nothing failed.
            if let Some(session) = self.sessions.get_mut(&key) {
                session.take(joining, found.attempt, role, failure, &mut count);
            }
            if ends {
                self.close(key, &mut count);
            }
            return;
        }
        let order = &mut self.order;
        let session = self.sessions.entry(key).or_insert_with(|| {
            let ends_by = at + joining.window;
            order.push_back((ends_by, key));
            Session { ends_by, counted: 0, lines: [0; 2], succeeded: false, more: None }
        });
        session.take(joining, found.attempt, role, failure, &mut count);
        if ends {
            self.close(key, &mut count);
        }
    }

    /// When `handle_timeout` has something to do.
    pub fn poll_timeout(&self) -> Option<Timestamp> {
        self.order.front().map(|(ends_by, _)| *ends_by)
    }

    /// Closes sessions that are over by `now`.
    pub fn handle_timeout(&mut self, now: Timestamp, mut count: impl FnMut(Counted)) {
        while let Some((ends_by, key)) = self.order.front().copied()
            && ends_by < now
        {
            self.order.pop_front();
            // The number may belong to a later session by now: a pid that was used again.
            if self.sessions.get(&key).is_some_and(|session| session.ends_by <= ends_by) {
                self.close(key, &mut count);
            }
        }
    }

    fn close(&mut self, key: u64, count: &mut impl FnMut(Counted)) {
        if let Some(session) = self.sessions.remove(&key)
            && let Some(waiting) = session.more.and_then(|more| more.waiting)
        {
            count(waiting);
        }
    }

    /// Forgets everything about an address, as an unban asks for.
    pub fn forget(&mut self, forget: impl Fn(IpAddr) -> bool) {
        for session in self.sessions.values_mut() {
            let waiting = session.more.as_ref().and_then(|more| more.waiting);
            if waiting.is_some_and(|waiting| forget(waiting.address)) {
                session.forget_waiting();
            }
        }
    }
}

impl Session {
    fn take(
        &mut self,
        joining: Joining,
        attempt: u64,
        role: Role,
        failure: Option<Counted>,
        count: &mut impl FnMut(Counted),
    ) {
        let series = match role {
            Role::Failure => 0,
            Role::Twin => 1,
            Role::Alone => return self.wait(failure),
            Role::Success => {
                self.forget_waiting();
                self.succeeded = true;
                return;
            }
            Role::End => return,
        };
        let Some(failure) = failure else { return };
        if self.note(series, attempt, joining.once) > self.counted {
            self.counted = self.counted.saturating_add(1);
            self.forget_waiting();
            count(failure);
        }
    }

    fn wait(&mut self, failure: Option<Counted>) {
        if self.counted == 0 && !self.succeeded {
            let more = self.more.get_or_insert_default();
            if more.waiting.is_none() {
                more.waiting = failure.map(|failure| Counted { at_once: false, ..failure });
            }
        }
    }

    fn forget_waiting(&mut self) {
        if let Some(more) = &mut self.more {
            more.waiting = None;
        }
    }

    /// Takes a line of a series in; the number of attempts it tells of so far.
    fn note(&mut self, series: usize, attempt: u64, once: bool) -> u16 {
        if once || attempt != 0 {
            let attempts = &mut self.more.get_or_insert_default().attempts[series];
            if attempts.contains(&attempt) {
                return 0;
            }
            if attempts.len() < ATTEMPTS_MAX {
                attempts.push(attempt);
            } else {
                self.lines[series] = self.lines[series].saturating_add(1);
            }
        } else {
            self.lines[series] = self.lines[series].saturating_add(1);
        }
        let told_apart = self.more.as_ref().map_or(0, |more| more.attempts[series].len());
        self.lines[series].saturating_add(told_apart as u16)
    }
}

/// The session's number; `None` if the line does not say enough.
fn key_of(joining: Joining, found: &Match) -> Option<u64> {
    let session = (found.session != 0).then_some(found.session);
    let address = || {
        Some(match found.address? {
            IpAddr::V4(address) => u128::from(address.to_bits()),
            IpAddr::V6(address) => address.to_bits(),
        })
    };
    match joining.by {
        JoinedBy::Session => session,
        JoinedBy::Address => Some(hash_of(&[&address()?.to_ne_bytes()])),
        JoinedBy::AddressAndSession => Some(hash_of(&[&address()?.to_ne_bytes(), &session?.to_ne_bytes()])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::time::Span;
    use std::net::Ipv4Addr;

    /// Feeds `(role, ends, session, attempt, second)` and gives the seconds that counted.
    #[track_caller]
    fn check(joining: Joining, lines: &[(Role, bool, u64, u64, i64)], expect: &[i64]) {
        let mut joiner = Joiner::new(Some(joining));
        let mut counted = Vec::new();
        for (role, ends, session, attempt, second) in lines {
            let found = Match {
                filter: 0,
                pattern: 0,
                at: None,
                address: Some(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1))),
                session: *session,
                attempt: *attempt,
                line: (0, 0),
                number: 0,
            };
            joiner.take(&found, (*role, *ends), Timestamp::from_seconds(*second), 0, |failure| {
                counted.push(failure.at.seconds())
            });
        }
        joiner.handle_timeout(Timestamp::from_seconds(1_000_000), |failure| counted.push(failure.at.seconds()));
        assert_eq!(counted, expect);
        assert!(joiner.is_empty(), "a session outlived its window");
    }

    const PID: Joining = Joining { window: Span::from_seconds(300), by: JoinedBy::Session, once: false };
    const CALL: Joining = Joining { window: Span::from_seconds(32), by: JoinedBy::AddressAndSession, once: true };

    #[test]
    fn each_failure_line_counts_and_what_surrounds_it_does_not() {
        use Role::{Alone, Failure};
        check(
            PID,
            &[(Alone, false, 7, 0, 1), (Failure, false, 7, 0, 2), (Failure, false, 7, 0, 3), (Alone, true, 7, 0, 4)],
            &[2, 3],
        );
    }

    #[test]
    fn a_session_without_a_failure_counts_once_at_its_end_or_when_it_is_given_up() {
        use Role::{Alone, End, Failure};
        check(PID, &[(Alone, false, 7, 0, 1), (Alone, true, 7, 0, 2)], &[1]);
        check(PID, &[(Alone, false, 7, 0, 1), (End, true, 7, 0, 2), (End, true, 7, 0, 3)], &[1]);
        check(PID, &[(Alone, false, 7, 0, 1)], &[1]);
        check(PID, &[(Alone, false, 7, 0, 1), (Failure, false, 8, 0, 302)], &[1, 302]);
    }

    #[test]
    fn a_success_forgets_what_was_waiting() {
        use Role::{Alone, Success};
        check(PID, &[(Alone, false, 7, 0, 1), (Success, false, 7, 0, 2), (Alone, false, 8, 0, 3)], &[3]);
    }

    #[test]
    fn twins_count_only_what_the_failure_lines_have_not() {
        use Role::{Failure, Twin};
        check(PID, &[(Failure, false, 7, 0, 1), (Twin, false, 7, 0, 2), (Twin, false, 7, 0, 3)], &[1, 3]);
        check(PID, &[(Twin, false, 7, 0, 1), (Failure, false, 7, 0, 2), (Failure, false, 7, 0, 3)], &[1, 3]);
    }

    #[test]
    fn once_means_once_until_the_window_is_over_apart_from_different_attempts() {
        use Role::Failure;
        check(CALL, &[(Failure, false, 7, 0, 1), (Failure, false, 7, 0, 2), (Failure, false, 7, 0, 40)], &[1, 40]);
        check(CALL, &[(Failure, false, 7, 5, 1), (Failure, false, 7, 5, 2), (Failure, false, 7, 6, 3)], &[1, 3]);
    }

    #[test]
    fn a_process_number_used_again_is_another_session() {
        use Role::{Alone, End, Failure};
        check(
            PID,
            &[(Failure, false, 7, 0, 1), (End, true, 7, 0, 2), (Alone, false, 7, 0, 10), (End, true, 7, 0, 11)],
            &[1, 10],
        );
    }
}
