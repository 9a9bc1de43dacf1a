//! Who is never banned: networks come in, a yes or no per address goes out. Configured networks, those added by hand for a while, and the machine's own addresses.

use std::net::IpAddr;

use ipnet::IpNet;

use super::time::Timestamp;

/// A network on the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The network.
    pub net: IpNet,
    /// When it leaves the list by itself; `None` = never.
    pub until: Option<Timestamp>,
    /// Why it is there, for people.
    pub note: String,
    /// Where it came from.
    pub by: By,
}

/// Where an entry came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum By {
    /// The configuration.
    Configuration,
    /// `banctl allow add`.
    Hand,
    /// The machine's own address, or loopback.
    Own,
}

/// The list, with its networks merged into ranges for the question asked for every failure.
///
/// Invariant: `ranges` are sorted, disjoint, and cover exactly the entries' networks.
#[derive(Clone, Debug, Default)]
pub struct Allowlist {
    entries: Vec<Entry>,
    ranges: Vec<(u128, u128)>,
}

/// Every address as one number: IPv4 inside its mapped range, which no IPv6 address can have here.
fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().to_bits(),
        IpAddr::V6(address) => address.to_bits(),
    }
}

fn range(net: &IpNet) -> (u128, u128) {
    (number(net.network()), number(net.broadcast()))
}

/// Loopback, which is on every list.
fn loopback() -> [IpNet; 2] {
    [
        IpNet::V4(ipnet::Ipv4Net::new_assert(std::net::Ipv4Addr::new(127, 0, 0, 0), 8)),
        IpNet::V6(ipnet::Ipv6Net::new_assert(std::net::Ipv6Addr::LOCALHOST, 128)),
    ]
}

impl Allowlist {
    /// A list of these networks from the configuration, with loopback.
    pub fn new(networks: &[IpNet]) -> Self {
        let mut list = Self::default();
        for net in loopback() {
            list.entries.push(Entry { net, until: None, note: "loopback".to_owned(), by: By::Own });
        }
        for net in networks {
            list.entries.push(Entry { net: *net, until: None, note: String::new(), by: By::Configuration });
        }
        list.rebuild();
        list
    }

    /// Everything on it.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The networks, each once.
    pub fn networks(&self) -> Vec<IpNet> {
        let nets: Vec<IpNet> = self.entries.iter().map(|entry| entry.net).collect();
        IpNet::aggregate(&nets)
    }

    /// Replaces the machine's own addresses; true if that changed anything.
    pub fn set_own(&mut self, addresses: &[IpAddr]) -> bool {
        let before = self.ranges.clone();
        self.entries.retain(|entry| entry.by != By::Own || entry.note == "loopback");
        for address in addresses {
            let net = IpNet::from(address.to_canonical());
            self.entries.push(Entry { net, until: None, note: "own address".to_owned(), by: By::Own });
        }
        self.rebuild();
        before != self.ranges
    }

    /// Puts a network on the list by hand; a second time replaces the first.
    pub fn add(&mut self, net: IpNet, until: Option<Timestamp>, note: String) {
        self.entries.retain(|entry| entry.by != By::Hand || entry.net != net);
        self.entries.push(Entry { net, until, note, by: By::Hand });
        self.rebuild();
    }

    /// Takes a network off the list.
    ///
    /// # Errors
    /// A sentence, when it is not there or is not ours to take away.
    pub fn remove(&mut self, net: IpNet) -> Result<(), String> {
        let shown = super::address::show_net(&net);
        match self.entries.iter().find(|entry| entry.net == net && entry.by == By::Hand) {
            Some(_) => {
                self.entries.retain(|entry| entry.by != By::Hand || entry.net != net);
                self.rebuild();
                Ok(())
            }
            None => Err(match self.entries.iter().find(|entry| entry.net == net) {
                Some(entry) if entry.by == By::Own => {
                    format!("{shown} is this machine's own address and stays allowed")
                }
                Some(_) => {
                    format!("{shown} comes from [allow] in the configuration; take it out there and run banctl reload")
                }
                None => format!("{shown} is not on the allowlist; banctl allow list shows what is"),
            }),
        }
    }

    /// Takes the entries made by hand from another list, as a reload does.
    pub fn keep_hand_made(&mut self, old: &Self) {
        self.entries.extend(old.entries.iter().filter(|entry| entry.by == By::Hand).cloned());
        self.rebuild();
    }

    /// When the next entry leaves the list.
    pub fn poll_timeout(&self) -> Option<Timestamp> {
        self.entries.iter().filter_map(|entry| entry.until).min()
    }

    /// Drops entries that are over; true if there were any.
    pub fn handle_timeout(&mut self, now: Timestamp) -> bool {
        let before = self.entries.len();
        self.entries.retain(|entry| entry.until.is_none_or(|until| until > now));
        if before == self.entries.len() {
            return false;
        }
        self.rebuild();
        true
    }

    /// Is this address never to be banned?
    #[inline]
    pub fn contains(&self, address: IpAddr) -> bool {
        let number = number(address);
        let at = self.ranges.partition_point(|(first, _)| *first <= number);
        at > 0 && self.ranges[at - 1].1 >= number
    }

    /// Is the whole network inside one allowed range?
    pub fn covers(&self, net: &IpNet) -> bool {
        let (first, last) = range(net);
        let at = self.ranges.partition_point(|(start, _)| *start <= first);
        at > 0 && self.ranges[at - 1].1 >= last
    }

    /// Does any allowed address lie in the network?
    pub fn touches(&self, net: &IpNet) -> bool {
        let (first, last) = range(net);
        let at = self.ranges.partition_point(|(start, _)| *start <= last);
        at > 0 && self.ranges[at - 1].1 >= first
    }

    /// The entry that is the reason why `net` must not be banned: it lies in it, or it would shut out this machine.
    pub fn reason_against(&self, net: &IpNet) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.net.contains(net) || (entry.by == By::Own && net.contains(&entry.net)))
    }

    fn rebuild(&mut self) {
        let mut all: Vec<(u128, u128)> = self.entries.iter().map(|entry| range(&entry.net)).collect();
        all.sort_unstable();
        self.ranges.clear();
        for (first, last) in all {
            match self.ranges.last_mut() {
                Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
                _ => self.ranges.push((first, last)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    fn list(nets: &str) -> Allowlist {
        Allowlist::new(&nets.split_whitespace().map(|net| net.parse().unwrap()).collect::<Vec<_>>())
    }

    #[track_caller]
    fn check(list: &Allowlist, address: &str, expect: bool) {
        assert_eq!(list.contains(address.parse().unwrap()), expect, "{address}");
    }

    #[test]
    fn loopback_is_always_allowed_and_edges_count() {
        let list = list("192.168.0.0/16 10.1.2.3/32 2001:db8::/32 192.169.0.0/16");
        for address in
            ["127.0.0.1", "127.255.255.255", "::1", "192.168.0.0", "192.169.255.255", "10.1.2.3", "2001:db8:ffff::1"]
        {
            check(&list, address, true);
        }
        for address in
            ["128.0.0.0", "126.255.255.255", "::2", "192.167.255.255", "192.170.0.0", "10.1.2.4", "2001:db9::"]
        {
            check(&list, address, false);
        }
    }

    #[test]
    fn a_network_that_would_shut_out_this_machine_has_a_reason_against_it() {
        let mut list = list("10.0.0.0/8");
        assert!(list.set_own(&["203.0.113.5".parse().unwrap()]));
        assert!(!list.set_own(&["203.0.113.5".parse().unwrap()]));
        for net in ["203.0.113.0/24", "203.0.113.5/32", "0.0.0.0/0", "10.1.0.0/16", "127.0.0.1/32", "::/0"] {
            assert!(list.reason_against(&net.parse().unwrap()).is_some(), "{net}");
        }
        for net in ["203.0.114.0/24", "8.0.0.0/6", "2001:db8::/32"] {
            assert!(list.reason_against(&net.parse().unwrap()).is_none(), "{net}");
        }
        assert!(list.touches(&"8.0.0.0/6".parse().unwrap()));
    }

    #[test]
    fn an_entry_with_an_end_leaves_by_itself_and_the_configuration_stays() {
        let mut list = list("10.0.0.0/8");
        let net: IpNet = "192.0.2.0/24".parse().unwrap();
        list.add(net, Some(Timestamp(5000)), "visitor".to_owned());
        assert!(list.covers(&net));
        assert_eq!(list.poll_timeout(), Some(Timestamp(5000)));
        assert!(!list.handle_timeout(Timestamp(4999)));
        assert!(list.handle_timeout(Timestamp(5000)));
        assert!(!list.covers(&net));
        assert!(list.remove("10.0.0.0/8".parse().unwrap()).unwrap_err().contains("configuration"));
        assert!(list.remove(net).unwrap_err().contains("not on the allowlist"));
    }
}
