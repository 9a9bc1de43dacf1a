//! Bans as elements of sets: ops come in, transactions go out, and what the kernel holds is read back. Makes no chains; keeps no list of bans.

use std::net::{Ipv4Addr, Ipv6Addr};

use hashbrown::HashSet;
use ipnet::IpNet;
use rustix::io::Errno;

use super::kernel::{Kernel, cannot_ask};
use super::model::{Family, Model};
use super::rules::{self, ELEMENTS_PER_MESSAGE};
use super::seen::SET_COUNT;
use super::wire::{Attributes, Batch, DUMP, attributes, kind};
use super::{Error, Held, Op};
use crate::engine::time::{SPAN_MAX, Span};

/// Transactions of this many elements are the fastest for each element (0.5 us; 1.5 us in one of 100,000), and the
/// longest a packet or another writer waits is some milliseconds.
const ELEMENTS_PER_TRANSACTION: usize = 2000;
/// A refused transaction costs 8 ms of the kernel's time; after so many in one call the rest is not tried any more.
const REFUSALS_MAX: u32 = 64;
/// How often a list is read again because it changed while it was read.
const DUMPS_MAX: u32 = 20;

/// An op as the kernel needs it; sorted by set, then by key, then by age.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Task {
    set: usize,
    key: [u8; 16],
    /// The place of the op in what the caller gave.
    op: usize,
    /// Milliseconds, 0 for ever; `None` for an unban.
    ban: Option<u64>,
}

/// Why a transaction did not take place.
struct Void {
    errno: Errno,
    /// The sets the kernel does not have.
    gone: Vec<usize>,
}

impl Kernel {
    /// Puts ops into force, 2000 to a transaction; gives those that could not be done, by their place in `ops`.
    ///
    /// The last op for a scope and network wins, the ones before it are not sent. A refused transaction is halved until
    /// what the kernel does not like stands alone; everything else goes through. [`Error::Gone`]: install, then try again.
    pub fn apply(&mut self, ops: &[Op]) -> Vec<(usize, Error)> {
        let mut failed = Vec::new();
        let tasks = self.sorted(ops, &mut failed);
        let mut refusals = 0;
        let rules_before = self.sets_standing();
        for tasks in tasks.chunks(ELEMENTS_PER_TRANSACTION) {
            self.carry_out(tasks, &mut failed, &mut refusals);
        }
        if self.sets_standing() != rules_before {
            // If the kernel does not tell, is_intact() will not agree and the caller installs anew: safe.
            let _ = self.remember_rules();
        }
        failed.sort_unstable_by_key(|(op, _)| *op);
        failed
    }

    fn sets_standing(&self) -> usize {
        self.model.sets.iter().filter(|set| set.stands).count()
    }

    /// Ops that mean nothing to the kernel are left out: superseded ones, and unbans of lengths it has no set for.
    fn sorted(&mut self, ops: &[Op], failed: &mut Vec<(usize, Error)>) -> Vec<Task> {
        let mut tasks = Vec::with_capacity(ops.len());
        for (index, op) in ops.iter().enumerate() {
            let (Op::Ban { scope, net, .. } | Op::Unban { scope, net }) = op;
            let Some(at) = self.model.scope(scope) else {
                failed.push((index, Error::UnknownScope(scope.clone())));
                continue;
            };
            let (family, length) = (Family::of(net), net.prefix_len());
            let ban = match op {
                Op::Ban { timeout, .. } => Some(timeout.map_or(0, milliseconds)),
                Op::Unban { .. } => None,
            };
            let set = match ban {
                Some(_) => Some(self.model.set_for(at, family, length)),
                None => self.model.find_set(at, family, length),
            };
            tasks.extend(set.map(|set| Task { set, key: key(net), op: index, ban }));
        }
        if tasks.len() > 1 {
            tasks.sort_unstable();
            // dedup keeps the first of equal ones, so the latest is put there.
            tasks.dedup_by(|later, kept| {
                let is_same = (later.set, later.key) == (kept.set, kept.key);
                if is_same {
                    *kept = *later;
                }
                is_same
            });
        }
        tasks
    }

    fn carry_out(&mut self, tasks: &[Task], failed: &mut Vec<(usize, Error)>, refusals: &mut u32) {
        let Err(void) = self.commit(tasks) else { return };
        *refusals += 1;
        let fail =
            |tasks: &[Task], error: &Error| tasks.iter().map(|task| (task.op, error.clone())).collect::<Vec<_>>();
        if !void.gone.is_empty() {
            let (gone, rest): (Vec<Task>, Vec<Task>) = tasks.iter().partition(|task| void.gone.contains(&task.set));
            failed.extend(fail(&gone, &Error::Gone(self.model.table.clone())));
            if !rest.is_empty() {
                self.carry_out(&rest, failed, refusals);
            }
            return;
        }
        if void.errno == Errno::PERM {
            let table = self.model.table.clone();
            let why = self.why_forbidden(&table);
            return failed.extend(fail(tasks, &why));
        }
        if tasks.len() == 1 || *refusals >= REFUSALS_MAX {
            return failed.extend(fail(tasks, &Error::Kernel { doing: "changing bans", errno: void.errno }));
        }
        let (left, right) = tasks.split_at(tasks.len() / 2);
        self.carry_out(left, failed, refusals);
        self.carry_out(right, failed, refusals);
    }

    /// One transaction; `tasks` are sorted by set and no element occurs twice.
    fn commit(&mut self, tasks: &[Task]) -> Result<(), Void> {
        let model = &mut self.model;
        let b = &mut self.batch;
        // The last message written for each set, to know which set a refusal is about.
        let mut last_message = Vec::new();
        b.begin(None);
        for tasks in tasks.chunk_by(|a, b| a.set == b.set) {
            let Some(set) = tasks.first().map(|task| task.set) else { continue };
            if !model.sets[set].stands {
                rules::put_ban_set(b, &model.table, &model.sets[set]);
                rules::put_rule(b, &model.table, &model.lookup_rule(set));
            }
            let last =
                tasks.chunks(ELEMENTS_PER_MESSAGE).map(|tasks| put_tasks(b, model, set, tasks, self.destroys)).last();
            last_message.push((last.unwrap_or_default(), set));
        }
        let refusals = self.link.commit(b).map_err(|errno| Void { errno, gone: Vec::new() })?;
        let Some(first) = refusals.first() else {
            for (_, set) in last_message {
                model.sets[set].stands = true;
            }
            return Ok(());
        };
        // Deleting never fails here, so "no such thing" is about a table, set or chain, and "exists" about a set of
        // another kind in the place of ours: an install puts both right.
        let gone = refusals
            .iter()
            .filter(|refusal| matches!(refusal.errno, Errno::NOENT | Errno::EXIST))
            .filter_map(|refusal| {
                last_message.iter().find(|(last, _)| refusal.seq.wrapping_sub(*last).cast_signed() <= 0)
            })
            .map(|(_, set)| *set)
            .collect();
        Err(Void { errno: first.errno, gone })
    }

    /// Every ban the kernel holds, each once, in no order. Do not apply anything meanwhile.
    ///
    /// Costs 0.2 s for 100,000 elements and, as the kernel starts its walk anew for each part, 20 s for a million.
    ///
    /// # Errors
    /// [`Error::Gone`] if a set is missing; [`Error::Kernel`] if the sets keep changing while they are read.
    pub fn dump(&mut self) -> Result<Vec<Held>, Error> {
        let mut held = Vec::new();
        for set in 0..self.model.sets.len() {
            if self.model.sets[set].stands {
                held.append(&mut self.dump_set(set)?);
            }
        }
        Ok(held)
    }

    /// The kernel grows a table in the background for some time after many bans, and who walks it meanwhile sees some
    /// elements twice and others not at all, without any sign (7 % of 100,000 were missing). So a list counts as whole if
    /// it is as long as the kernel says (from 6.18 on), or if it has everything the list before it had.
    fn dump_set(&mut self, set: usize) -> Result<Vec<Held>, Error> {
        let mut before: Option<HashSet<IpNet>> = None;
        for _ in 0..DUMPS_MAX {
            let generation = self.generation()?;
            let (held, interrupted) = self.walk_set(set)?;
            let expected = self.set_count(set)?;
            if expected.is_some_and(|expected| expected as usize == held.len()) {
                return Ok(held);
            }
            if interrupted || self.generation()? != generation {
                before = None;
                continue;
            }
            let nets: HashSet<IpNet> = held.iter().map(|held| held.net).collect();
            if before.is_some_and(|before| before.is_subset(&nets)) {
                return Ok(held);
            }
            before = Some(nets);
        }
        Err(Error::Kernel { doing: "listing bans while they keep changing", errno: Errno::INTR })
    }

    /// One walk through a set, each element once; true if the kernel says that it changed meanwhile.
    fn walk_set(&mut self, set: usize) -> Result<(Vec<Held>, bool), Error> {
        let (model, mut held, mut seen) = (&self.model, Vec::new(), HashSet::new());
        self.batch.question(kind::GETSETELEM, DUMP, |b| {
            b.text(1, &model.table);
            b.text(2, &model.sets[set].name);
        });
        let answered = self.link.ask(&self.batch, |message| {
            let elements = message.attributes().within(3).filter(|(kind, _)| *kind == 1);
            for (_, element) in elements {
                let element = read_element(attributes(element), set, model);
                held.extend(element.filter(|element| seen.insert(element.net)));
            }
        });
        match answered {
            Ok(interrupted) => Ok((held, interrupted)),
            Err(Errno::INTR) => Ok((held, true)),
            Err(Errno::NOENT) => Err(Error::Gone(model.table.clone())),
            Err(errno) => Err(cannot_ask("listing bans", errno)),
        }
    }

    /// The ban of exactly this network, if the kernel holds it.
    ///
    /// # Errors
    /// [`Error::UnknownScope`], [`Error::Gone`] or the kernel's answer.
    pub fn held(&mut self, scope: &str, net: &IpNet) -> Result<Option<Held>, Error> {
        let at = self.model.scope(scope).ok_or_else(|| Error::UnknownScope(scope.to_owned()))?;
        let set = self.model.find_set(at, Family::of(net), net.prefix_len());
        let Some(set) = set.filter(|set| self.model.sets[*set].stands) else { return Ok(None) };
        let model = &self.model;
        let bytes = model.sets[set].family.bytes();
        self.batch.question(kind::GETSETELEM, 0, |b| {
            b.text(1, &model.table);
            b.text(2, &model.sets[set].name);
            b.nest(3, |b| b.nest(1, |b| rules::put_key(b, &key(net)[..bytes])));
        });
        let mut found = None;
        let answered = self.link.ask(&self.batch, |message| {
            found = read_element(message.attributes().within(3).within(1), set, model);
        });
        match answered {
            Ok(_) => Ok(found),
            // The element is missing, or all of the set.
            Err(Errno::NOENT) => self.set_count(set).map(|_| None),
            Err(errno) => Err(cannot_ask("looking for a ban", errno)),
        }
    }

    /// How many elements a set has, if the kernel tells.
    fn set_count(&mut self, set: usize) -> Result<Option<u32>, Error> {
        let (model, mut count) = (&self.model, None);
        self.batch.question(kind::GETSET, 0, |b| {
            b.text(1, &model.table);
            b.text(2, &model.sets[set].name);
        });
        match self.link.ask(&self.batch, |message| count = message.attributes().u32(SET_COUNT)) {
            Ok(_) => Ok(count),
            Err(Errno::NOENT) => Err(Error::Gone(model.table.clone())),
            Err(errno) => Err(cannot_ask("looking for a set", errno)),
        }
    }
}

/// Destroy and add; before 6.3 add, delete and add.
///
/// To add what exists changes its timeout on no kernel before 6.12, so the old element has to go first; to delete what
/// does not exist makes the whole transaction void, so where `destroy` is unknown an add makes the delete legal. Packets
/// see the state before or the state after, never the middle.
fn put_tasks(b: &mut Batch, model: &Model, set: usize, tasks: &[Task], destroys: bool) -> u32 {
    let (table, set) = (&model.table, &model.sets[set]);
    let bytes = set.family.bytes();
    let put_key = |b: &mut Batch, task: &Task| rules::put_key(b, &task.key[..bytes]);
    let last = if destroys {
        rules::put_elements(b, kind::DESTROYSETELEM, table, &set.name, tasks, put_key)
    } else {
        rules::put_elements(b, kind::NEWSETELEM, table, &set.name, tasks, put_key);
        rules::put_elements(b, kind::DELSETELEM, table, &set.name, tasks, put_key)
    };
    if tasks.iter().all(|task| task.ban.is_none()) {
        return last;
    }
    let bans: Vec<(&[u8], u64)> = tasks.iter().filter_map(|task| Some((&task.key[..bytes], task.ban?))).collect();
    rules::put_elements(b, kind::NEWSETELEM, table, &set.name, &bans, |b, (key, timeout)| {
        rules::put_key(b, key);
        if *timeout != 0 {
            b.u64(4, *timeout);
        }
    })
}

/// A timeout as the kernel takes it: 0 would mean for ever, more than some centuries is refused.
fn milliseconds(span: Span) -> u64 {
    span.0.clamp(1, SPAN_MAX.0).cast_unsigned()
}

fn key(net: &IpNet) -> [u8; 16] {
    let mut key = [0; 16];
    match net {
        IpNet::V4(net) => key[..4].copy_from_slice(&net.network().octets()),
        IpNet::V6(net) => key = net.network().octets(),
    }
    key
}

fn read_element(element: Attributes<'_>, set: usize, model: &Model) -> Option<Held> {
    let set = &model.sets[set];
    let value = element.within(1).value(1)?;
    let address = match set.family {
        Family::V4 => Ipv4Addr::from(*value.first_chunk::<4>()?).into(),
        Family::V6 => Ipv6Addr::from(*value.first_chunk::<16>()?).into(),
    };
    // Without a timeout an element is for ever; with one, it says what is left.
    let timeout = element.u64(4).filter(|timeout| *timeout != 0);
    let left = timeout.map(|timeout| element.u64(5).unwrap_or(timeout));
    let counter = element.within(7).within(2);
    Some(Held {
        scope: model.scope_name(set.scope).to_owned(),
        net: IpNet::new(address, set.length).ok()?,
        expires: left.map(|left| Span(i64::try_from(left).unwrap_or(i64::MAX))),
        packets: counter.u64(2).unwrap_or_default(),
        bytes: counter.u64(1).unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests may fail loudly")]
    use super::*;

    #[track_caller]
    fn check(span: i64, expect: u64) {
        assert_eq!(milliseconds(Span(span)), expect, "{span}");
    }

    #[test]
    fn a_timeout_is_never_taken_for_ever_and_never_too_long() {
        check(1500, 1500);
        check(0, 1);
        check(-5, 1);
        check(i64::MAX, SPAN_MAX.0.cast_unsigned());
    }
}
