//! Failures still in the window: an address, a jail and a moment come in, "that was one too many" goes out. Time is an argument.
//!
//! The window slides exactly: `maxretry` failures are one too many when the first and the last of them are at most
//! `findtime` apart, **both edges included**. A line that comes up to a minute late counts where it belongs.
//!
//! Memory is bounded: at most `capacity` addresses are remembered (about 100 bytes each for `maxretry` up to 4, 8 more
//! per further failure). A hand goes round and frees what fell out of its window; when everything is still in it, the
//! address with the fewest failures of sixteen looked at, and among those the longest quiet one, is forgotten.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::IpAddr;

use hashbrown::HashTable;
use ipnet::IpNet;
use smallvec::SmallVec;

use super::effect::JailId;
use super::time::{Span, Timestamp};

/// Addresses looked at when one must go.
const EVICTION_LOOK: usize = 16;
/// Lines may come this much later than younger ones and still be counted in their place.
const LATE_MAX: Span = Span::from_seconds(60);
/// Old cells looked at with every new address, so that the hand keeps up with growth.
const SWEEP_STEP: usize = 2;

/// Counts failures per jail and network.
#[derive(Debug)]
pub struct Tally {
    table: HashTable<u32>,
    cells: Vec<Option<Cell>>,
    free: Vec<u32>,
    hand: usize,
    capacity: usize,
    hash4: foldhash::quality::RandomState,
    hash6: RandomState,
    /// Addresses forgotten because the table was full.
    pub evicted: u64,
}

#[derive(Debug)]
struct Cell {
    net: IpNet,
    jail: JailId,
    /// Sorted moments in milliseconds, at most `maxretry`.
    at: SmallVec<[i64; 4]>,
    expires: i64,
}

impl Tally {
    /// A tally for at most `capacity` addresses.
    pub fn new(capacity: usize) -> Self {
        Self {
            table: HashTable::new(),
            cells: Vec::new(),
            free: Vec::new(),
            hand: 0,
            capacity: capacity.clamp(1, u32::MAX as usize),
            hash4: foldhash::quality::RandomState::default(),
            hash6: RandomState::new(),
            evicted: 0,
        }
    }

    /// Addresses remembered now.
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Nothing is remembered.
    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    /// Takes one failure in; the failures in the window if that makes `maxretry`, and then they are forgotten.
    #[inline]
    pub fn hit(&mut self, jail: JailId, net: IpNet, at: Timestamp, maxretry: u32, findtime: Span) -> Option<u32> {
        if maxretry <= 1 {
            return Some(1);
        }
        let hash = self.hash(jail, &net);
        let cells = &self.cells;
        let same = |slot: &u32| matches!(&cells[*slot as usize], Some(cell) if cell.jail == jail && cell.net == net);
        let slot = match self.table.find(hash, same) {
            Some(slot) => *slot,
            None => self.place(hash, jail, net, at),
        };
        let cell = self.cells[slot as usize].as_mut()?;
        let needed = maxretry as usize;
        cell.expires = cell.expires.max(at.0.saturating_add(findtime.0));
        let full = match cell.at.last() {
            // Lines mostly come in order; then only the window that ends here can have become full.
            None => false,
            Some(newest) if *newest <= at.0 => {
                cell.at.push(at.0);
                let length = cell.at.len();
                length >= needed && at.0.saturating_sub(cell.at[length - needed]) <= findtime.0
            }
            Some(_) => {
                let place = cell.at.partition_point(|other| *other <= at.0);
                cell.at.insert(place, at.0);
                cell.at.windows(needed).any(|window| window[needed - 1].saturating_sub(window[0]) <= findtime.0)
            }
        };
        if cell.at.is_empty() {
            cell.at.push(at.0);
        }
        if full {
            self.remove(slot);
            return Some(maxretry);
        }
        let newest = cell.at.last().copied().unwrap_or(at.0);
        let keep_from = newest.saturating_sub(findtime.0).saturating_sub(LATE_MAX.0);
        let most = 2 * needed + 16;
        if cell.at.len() > most || cell.at.first().is_some_and(|oldest| *oldest < keep_from) {
            let outdated = cell.at.partition_point(|other| *other < keep_from).max(cell.at.len().saturating_sub(most));
            cell.at.drain(..outdated);
        }
        None
    }

    /// Failures of `net` in `jail` that are in the window at `now`.
    pub fn count(&self, jail: JailId, net: &IpNet, now: Timestamp, findtime: Span) -> usize {
        let hash = self.hash(jail, net);
        let same =
            |slot: &u32| matches!(&self.cells[*slot as usize], Some(cell) if cell.jail == jail && cell.net == *net);
        let Some(slot) = self.table.find(hash, same) else { return 0 };
        let from = (now - findtime).0;
        self.cells[*slot as usize].as_ref().map_or(0, |cell| cell.at.iter().filter(|at| **at >= from).count())
    }

    /// Forgets the failures of every network that `forget` names, in `jail` or in all.
    pub fn forget(&mut self, jail: Option<JailId>, forget: impl Fn(&IpNet) -> bool) {
        for slot in 0..self.cells.len() {
            let gone = matches!(&self.cells[slot], Some(cell) if jail.is_none_or(|jail| cell.jail == jail) && forget(&cell.net));
            if gone {
                self.remove(slot as u32);
            }
        }
    }

    fn place(&mut self, hash: u64, jail: JailId, net: IpNet, at: Timestamp) -> u32 {
        self.sweep(at);
        if self.table.len() >= self.capacity {
            self.evict();
        }
        let cell = Cell { net, jail, at: SmallVec::new(), expires: at.0 };
        let slot = match self.free.pop() {
            Some(slot) => {
                self.cells[slot as usize] = Some(cell);
                slot
            }
            None => {
                self.cells.push(Some(cell));
                (self.cells.len() - 1) as u32
            }
        };
        let (cells, hash4, hash6) = (&self.cells, &self.hash4, &self.hash6);
        self.table.insert_unique(hash, slot, |slot| match &cells[*slot as usize] {
            Some(cell) => hash_of(hash4, hash6, cell.jail, &cell.net),
            None => 0,
        });
        slot
    }

    fn sweep(&mut self, now: Timestamp) {
        for _ in 0..SWEEP_STEP.min(self.cells.len()) {
            self.hand = (self.hand + 1) % self.cells.len();
            if matches!(&self.cells[self.hand], Some(cell) if cell.expires < now.0) {
                self.remove(self.hand as u32);
            }
        }
    }

    fn evict(&mut self) {
        let mut worst: Option<(usize, i64, usize)> = None;
        let mut looked = 0;
        while looked < EVICTION_LOOK {
            self.hand = (self.hand + 1) % self.cells.len();
            let Some(cell) = &self.cells[self.hand] else { continue };
            looked += 1;
            let rank = (cell.at.len(), cell.expires, self.hand);
            worst = Some(worst.map_or(rank, |other| other.min(rank)));
        }
        if let Some((_, _, slot)) = worst {
            self.remove(slot as u32);
            self.evicted += 1;
        }
    }

    fn remove(&mut self, slot: u32) {
        let Some(cell) = self.cells[slot as usize].take() else { return };
        let hash = self.hash(cell.jail, &cell.net);
        if let Ok(entry) = self.table.find_entry(hash, |other| *other == slot) {
            entry.remove();
        }
        self.free.push(slot);
    }

    #[inline]
    fn hash(&self, jail: JailId, net: &IpNet) -> u64 {
        hash_of(&self.hash4, &self.hash6, jail, net)
    }
}

/// IPv6 addresses are chosen by attackers by the billion, so they get the hash that withstands it.
#[inline]
fn hash_of(hash4: &foldhash::quality::RandomState, hash6: &RandomState, jail: JailId, net: &IpNet) -> u64 {
    match net.addr() {
        IpAddr::V4(address) => {
            let mut hasher = hash4.build_hasher();
            hasher.write_u64(u64::from(address.to_bits()) << 16 | u64::from(jail.0));
            hasher.finish()
        }
        IpAddr::V6(address) => {
            let mut hasher = hash6.build_hasher();
            hasher.write_u128(address.to_bits());
            hasher.write_u16(jail.0);
            hasher.finish()
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    const JAIL: JailId = JailId(0);

    /// The last of these seconds must be one too many, and none before it.
    #[track_caller]
    fn check(seconds: &[i64], maxretry: u32, findtime: i64, expect: bool) {
        let mut tally = Tally::new(100);
        let net: IpNet = "192.0.2.1/32".parse().unwrap();
        let mut last = false;
        for second in seconds {
            assert!(!last, "too early in {seconds:?}");
            let at = Timestamp::from_seconds(*second);
            last = tally.hit(JAIL, net, at, maxretry, Span::from_seconds(findtime)).is_some();
        }
        assert_eq!(last, expect, "{seconds:?}");
    }

    #[test]
    fn the_window_slides_exactly_and_includes_both_edges() {
        check(&[0, 10, 20], 3, 20, true);
        check(&[0, 10, 21], 3, 20, false);
        check(&[0, 10, 21, 30], 3, 20, true);
        check(&[0, 0, 0], 3, 20, true);
        check(&[0], 1, 20, true);
        check(&[0, 100, 200, 300], 2, 99, false);
        check(&[0, 100], 2, 100, true);
    }

    #[test]
    fn lines_that_come_late_count_where_they_belong() {
        check(&[100, 0, 200], 3, 200, true);
        check(&[100, 0, 201], 3, 200, false);
        check(&[100, 150, 50, 45], 3, 60, true);
        check(&[100, 300, 50, 45], 3, 60, false);
    }

    #[test]
    fn it_agrees_with_a_plain_model_on_a_grid_of_edges() {
        let mut seed = 7u64;
        let mut next = |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % below
        };
        for _ in 0..2000 {
            let (maxretry, findtime) = (1 + next(4) as u32, 1 + next(5) as i64);
            let mut tally = Tally::new(10);
            let mut model: Vec<i64> = Vec::new();
            let net: IpNet = "2001:db8::/64".parse().unwrap();
            for _ in 0..20 {
                let second = next(12) as i64;
                model.push(second);
                model.sort_unstable();
                let expect =
                    model.windows(maxretry as usize).any(|window| window[window.len() - 1] - window[0] <= findtime);
                if expect {
                    model.clear();
                }
                let got = tally.hit(JAIL, net, Timestamp::from_seconds(second), maxretry, Span::from_seconds(findtime));
                assert_eq!(got.is_some(), expect, "{model:?} with {maxretry} in {findtime}");
            }
        }
    }

    #[test]
    fn memory_stays_within_the_capacity_and_the_busy_are_kept() {
        let mut tally = Tally::new(1000);
        let busy: IpNet = "198.51.100.1/32".parse().unwrap();
        let span = Span::from_seconds(600);
        for n in 0..100_000u32 {
            let net = IpNet::from(IpAddr::V4(std::net::Ipv4Addr::from(n)));
            assert!(tally.hit(JAIL, net, Timestamp(i64::from(n)), 5, span).is_none());
            if n < 3 {
                assert!(tally.hit(JAIL, busy, Timestamp(i64::from(n)), 5, span).is_none());
            }
            assert!(tally.len() <= 1000);
        }
        assert_eq!(tally.count(JAIL, &busy, Timestamp(100_000), span), 3);
        assert!(tally.evicted > 90_000);
    }

    #[test]
    fn what_fell_out_of_its_window_is_freed_without_a_scan() {
        let mut tally = Tally::new(1_000_000);
        let span = Span::from_seconds(1);
        for n in 0..50_000u32 {
            let net = IpNet::from(IpAddr::V4(std::net::Ipv4Addr::from(n)));
            tally.hit(JAIL, net, Timestamp(i64::from(n) * 10), 5, span);
        }
        assert!(tally.len() < 1000, "{} remembered", tally.len());
    }
}
