//! What the table should look like: a layout comes in, sets, chains and rules go out as values. Neither wire nor text form is made here.
//!
//! Bans live in hash sets only, one for each prefix length in use (`ip saddr & 255.255.255.0 == @all-v4-24`): every
//! CIDR has some length, so no interval set is needed. In an interval set each commit costs time in proportion to its
//! size (3.8 ms at 100,000 elements, 95 ms at a million; a hash set 2.4 us at any size), and overlapping bans would have
//! to be resolved by us; in hash sets a /24 and an address in it are two elements that come and go on their own.
//! The price: a packet that is not banned is looked up once for each scope and length in use, about 100 ns each (28 more
//! lengths: 3 us more for each IPv4 packet; 50 scopes: 7 us). So let jails that are enforced alike share a scope.

use std::net::IpAddr;

use hashbrown::HashMap;
use ipnet::IpNet;

use super::{Action, Layout, PortRange, Ports, Protocol};

/// The base chain every packet passes.
pub(super) const BASE_CHAIN: &str = "prerouting";
/// Before connection tracking and routing (`raw`): established connections are cut, containers behind DNAT are
/// covered, and a dropped packet costs half of what it costs in `input`.
pub(super) const BASE_PRIORITY: i32 = -300;
/// The IPv6 length whose set each scope has from the start: the prefix an attacker is counted by.
const USUAL_V6_LENGTH: u8 = 64;

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Family {
    V4,
    V6,
}

impl Family {
    pub fn of(net: &IpNet) -> Self {
        match net {
            IpNet::V4(_) => Self::V4,
            IpNet::V6(_) => Self::V6,
        }
    }

    pub fn bits(self) -> u8 {
        match self {
            Self::V4 => 32,
            Self::V6 => 128,
        }
    }

    /// The bytes of an address.
    pub fn bytes(self) -> usize {
        usize::from(self.bits()) / 8
    }
}

/// The set of one scope for one prefix length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BanSet {
    pub name: String,
    /// The place of the scope in [`Model::scopes`].
    pub scope: usize,
    pub family: Family,
    pub length: u8,
    /// True if its elements count packets.
    pub counted: bool,
    /// True once the kernel has it and its rule.
    pub stands: bool,
}

/// An inclusive range of addresses, as numbers.
pub(super) type Range = (u128, u128);

/// What a packet must be for a rule to apply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Match {
    Anything,
    Loopback,
    /// Router and neighbour solicitations and advertisements, ICMPv6 types 133 to 136.
    NeighbourDiscovery,
    /// The source is in a set, after it was cut to `length`.
    Source {
        family: Family,
        length: u8,
        set: String,
    },
    Tcp,
    Port(PortRange),
    Echo(Family),
}

/// What happens then.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Accept,
    Drop,
    Jump(String),
    TcpReset,
    PortUnreachable,
    Prohibited,
}

/// A rule: one match, one verdict.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    pub chain: String,
    pub on: Match,
    pub verdict: Verdict,
}

/// A scope with the name its sets and its chain are called by.
#[derive(Clone, Debug)]
struct ScopePlan {
    name: String,
    stem: String,
    action: Action,
    ports: Ports,
}

/// Everything the kernel should have in our table except elements of bans.
#[derive(Clone, Debug, Default)]
pub(super) struct Model {
    pub table: String,
    /// What is let through; overlapping and touching ranges are merged, as interval sets demand.
    pub allow4: Vec<Range>,
    pub allow6: Vec<Range>,
    /// Invariant: a set never leaves or changes its place while the model lives.
    pub sets: Vec<BanSet>,
    /// True if sets that are made from now on count packets.
    pub counters: bool,
    scopes: Vec<ScopePlan>,
    scope_at: HashMap<String, usize>,
    set_at: HashMap<(usize, Family, u8), usize>,
}

impl Model {
    /// The sets every layout has: single addresses and IPv6 /64 for each scope.
    pub fn new(layout: &Layout, counters: bool) -> Self {
        let mut model = Self {
            table: layout.table.clone(),
            allow4: merged(&layout.allow, Family::V4),
            allow6: merged(&layout.allow, Family::V6),
            counters,
            ..Self::default()
        };
        for scope in &layout.scopes {
            let at = model.scopes.len();
            model.scope_at.insert(scope.name.clone(), at);
            model.scopes.push(ScopePlan {
                name: scope.name.clone(),
                stem: stem(&scope.name),
                action: scope.action,
                ports: scope.ports.clone(),
            });
            for (family, length) in [(Family::V4, 32), (Family::V6, 128), (Family::V6, USUAL_V6_LENGTH)] {
                model.set_for(at, family, length);
            }
        }
        model
    }

    /// The place of a scope.
    pub fn scope(&self, name: &str) -> Option<usize> {
        self.scope_at.get(name).copied()
    }

    /// The name of the scope at a place.
    pub fn scope_name(&self, scope: usize) -> &str {
        &self.scopes[scope].name
    }

    /// The place of a set, if it is known.
    pub fn find_set(&self, scope: usize, family: Family, length: u8) -> Option<usize> {
        self.set_at.get(&(scope, family, length)).copied()
    }

    /// The place of a set, made up if it is not known yet.
    pub fn set_for(&mut self, scope: usize, family: Family, length: u8) -> usize {
        if let Some(at) = self.find_set(scope, family, length) {
            return at;
        }
        let name = set_name(&self.scopes[scope].stem, family, length);
        let counted = self.counters;
        self.sets.push(BanSet { name, scope, family, length, counted, stands: false });
        self.set_at.insert((scope, family, length), self.sets.len() - 1);
        self.sets.len() - 1
    }

    /// The set of this name, if it says that it is for one of our scopes; it is not taken into the model.
    pub fn set_named(&self, name: &str) -> Option<BanSet> {
        let (stem, family, length) = read_set_name(name)?;
        let scope = self.scopes.iter().position(|scope| scope.stem == stem)?;
        Some(BanSet { name: name.to_owned(), scope, family, length, counted: self.counters, stands: false })
    }

    /// The names of all chains; the base chain comes last because its rules jump to the others.
    pub fn chains(&self) -> Vec<String> {
        let scopes = self.scopes.iter().map(|scope| chain_name(&scope.stem));
        scopes.chain([BASE_CHAIN.to_owned()]).collect()
    }

    /// All rules in their order.
    pub fn rules(&self) -> Vec<Rule> {
        let base = |on, verdict| Rule { chain: BASE_CHAIN.to_owned(), on, verdict };
        let mut rules: Vec<_> = self.scopes.iter().flat_map(scope_rules).collect();
        rules.push(base(Match::Loopback, Verdict::Accept));
        for family in [Family::V4, Family::V6] {
            let set = allow_set_name(family).to_owned();
            rules.push(base(Match::Source { family, length: family.bits(), set }, Verdict::Accept));
        }
        // A ban on our own /64 must not make the router, which may be in it, unreachable.
        rules.push(base(Match::NeighbourDiscovery, Verdict::Accept));
        rules.extend((0..self.sets.len()).map(|set| self.lookup_rule(set)));
        rules
    }

    /// The rule that sends the packets of banned sources to the chain of their scope.
    pub fn lookup_rule(&self, set: usize) -> Rule {
        let BanSet { name, scope, family, length, .. } = &self.sets[set];
        Rule {
            chain: BASE_CHAIN.to_owned(),
            on: Match::Source { family: *family, length: *length, set: name.clone() },
            // Not goto: what the ports of this scope leave open may be meant by the next one.
            verdict: Verdict::Jump(chain_name(&self.scopes[*scope].stem)),
        }
    }
}

fn scope_rules(scope: &ScopePlan) -> Vec<Rule> {
    let rule = |on, verdict| Rule { chain: chain_name(&scope.stem), on, verdict };
    let verdict = |rejection| if scope.action == Action::Drop { Verdict::Drop } else { rejection };
    match &scope.ports {
        Ports::All if scope.action == Action::Drop => vec![rule(Match::Anything, Verdict::Drop)],
        Ports::All => vec![rule(Match::Tcp, Verdict::TcpReset), rule(Match::Anything, Verdict::PortUnreachable)],
        Ports::Some(ranges) => ranges
            .iter()
            .flat_map(|range| match range.protocol {
                Protocol::Icmp => [Family::V4, Family::V6]
                    .map(|family| rule(Match::Echo(family), verdict(Verdict::Prohibited)))
                    .to_vec(),
                Protocol::Tcp => vec![rule(Match::Port(*range), verdict(Verdict::TcpReset))],
                Protocol::Udp | Protocol::Sctp | Protocol::Dccp => {
                    vec![rule(Match::Port(*range), verdict(Verdict::PortUnreachable))]
                }
            })
            .collect(),
    }
}

/// The set of networks that are let through.
pub(super) fn allow_set_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "allow4",
        Family::V6 => "allow6",
    }
}

/// In the nft language a name begins with a letter; `.` cannot occur in the name of a scope, so no two stems are alike.
fn stem(scope: &str) -> String {
    let is_legal = scope.starts_with(|c: char| c.is_ascii_alphabetic());
    if is_legal { scope.to_owned() } else { format!("s.{scope}") }
}

/// The suffix keeps the names apart from the words of the nft language (`all`, `tcp`) and from the base chain.
fn chain_name(stem: &str) -> String {
    format!("{stem}-ban")
}

fn set_name(stem: &str, family: Family, length: u8) -> String {
    let version = if family == Family::V4 { "v4" } else { "v6" };
    if length == family.bits() { format!("{stem}-{version}") } else { format!("{stem}-{version}-{length}") }
}

fn read_set_name(name: &str) -> Option<(&str, Family, u8)> {
    let version_of = |text: &str| match text {
        "v4" => Some(Family::V4),
        "v6" => Some(Family::V6),
        _ => None,
    };
    let (front, last) = name.rsplit_once('-')?;
    if let Some(family) = version_of(last) {
        return Some((front, family, family.bits()));
    }
    let (stem, version) = front.rsplit_once('-')?;
    let (family, length) = (version_of(version)?, last.parse::<u8>().ok()?);
    (length < family.bits() && set_name(stem, family, length) == name).then_some((stem, family, length))
}

/// The networks of one family as ranges that neither overlap nor touch.
fn merged(nets: &[IpNet], family: Family) -> Vec<Range> {
    let mut ranges: Vec<Range> = nets
        .iter()
        .filter(|net| Family::of(net) == family)
        .map(|net| (number(net.network()), number(net.broadcast())))
        .collect();
    ranges.sort_unstable();
    let mut merged: Vec<Range> = Vec::with_capacity(ranges.len());
    for (first, last) in ranges {
        match merged.last_mut() {
            Some(before) if first <= before.1.saturating_add(1) => before.1 = before.1.max(last),
            _ => merged.push((first, last)),
        }
    }
    merged
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(address.to_bits()),
        IpAddr::V6(address) => address.to_bits(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests may fail loudly")]
    use super::*;

    #[track_caller]
    fn check_name(scope: &str, family: Family, length: u8, expect: &str) {
        let stem = stem(scope);
        let name = set_name(&stem, family, length);
        assert_eq!(name, expect);
        assert_eq!(read_set_name(&name), Some((stem.as_str(), family, length)));
    }

    #[test]
    fn the_name_of_a_set_says_what_is_in_it() {
        check_name("all", Family::V4, 32, "all-v4");
        check_name("all", Family::V6, 64, "all-v6-64");
        check_name("all-v4", Family::V4, 24, "all-v4-v4-24");
        check_name("all-v6-64", Family::V6, 128, "all-v6-64-v6");
        check_name("3cx", Family::V4, 0, "s.3cx-v4-0");
        for foreign in ["allow4", "all-v4-32", "all-v4-024", "all-v5", "all-v6-129", "all", ""] {
            assert_eq!(read_set_name(foreign), None, "{foreign}");
        }
    }

    #[track_caller]
    fn check_merged(nets: &[&str], expect: &[(&str, &str)]) {
        let nets: Vec<IpNet> = nets.iter().map(|net| net.parse().unwrap()).collect();
        let expect: Vec<Range> =
            expect.iter().map(|(a, b)| (number(a.parse().unwrap()), number(b.parse().unwrap()))).collect();
        let family = Family::of(&nets[0]);
        assert_eq!(merged(&nets, family), expect, "{nets:?}");
    }

    #[test]
    fn allowed_networks_neither_overlap_nor_touch() {
        check_merged(&["10.0.0.0/8", "10.1.0.0/16", "10.255.255.255/32"], &[("10.0.0.0", "10.255.255.255")]);
        check_merged(&["10.0.1.0/25", "10.0.0.0/24"], &[("10.0.0.0", "10.0.1.127")]);
        check_merged(&["10.0.0.2/32", "10.0.0.0/32"], &[("10.0.0.0", "10.0.0.0"), ("10.0.0.2", "10.0.0.2")]);
        check_merged(&["::/0", "2001:db8::/32"], &[("::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")]);
        check_merged(&["0.0.0.0/0", "255.255.255.255/32"], &[("0.0.0.0", "255.255.255.255")]);
    }
}
