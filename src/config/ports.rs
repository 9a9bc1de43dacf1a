//! Ports and services: `"22/tcp"`, `"10000-10800/udp"`, `"80,443/tcp"`, `"ssh"` come in, ranges go out.

use std::collections::BTreeMap;

/// What a port belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
    /// ICMP echo requests of both families; has no ports.
    Icmp,
}

/// Ports of one protocol, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortRange {
    /// TCP, UDP, …
    pub protocol: Protocol,
    /// First port; 0 with ICMP.
    pub first: u16,
    /// Last port; 0 with ICMP.
    pub last: u16,
}

/// What a jail shuts out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ports {
    /// Everything.
    All,
    /// Only these, sorted and without overlaps.
    Some(Vec<PortRange>),
}

/// The services that exist without being configured: name and ports.
pub const SERVICES: &[(&str, &[&str])] = &[
    ("sip", &["5060/udp", "5060/tcp", "5061/tcp", "10000-10800/udp"]),
    ("iax", &["4569/udp"]),
    ("web", &["80,443/tcp"]),
    ("ssh", &["22/tcp"]),
    ("ami", &["5038/tcp"]),
    ("ajam", &["8088,8089/tcp"]),
    ("icmp", &["echo-request"]),
    ("cticlient", &["4222,8222/tcp"]),
];

/// Services by name.
pub type Services = BTreeMap<String, Vec<PortRange>>;

/// The services that are always there.
pub fn built_in_services() -> Services {
    let parse = |texts: &[&str]| texts.iter().filter_map(|text| parse_ports(text).ok()).flatten().collect();
    SERVICES.iter().map(|(name, texts)| ((*name).to_owned(), parse(texts))).collect()
}

/// Reads `22/tcp`, `80,443/tcp`, `10000-10800/udp`, `echo-request`.
///
/// # Errors
/// A sentence that says what would be right.
pub fn parse_ports(text: &str) -> Result<Vec<PortRange>, String> {
    let trimmed = text.trim();
    if matches!(trimmed, "echo-request" | "icmp") {
        return Ok(vec![PortRange { protocol: Protocol::Icmp, first: 0, last: 0 }]);
    }
    let wrong = |why: &str| Err(format!("\"{text}\" {why}; write \"22/tcp\", \"80,443/tcp\" or \"10000-10800/udp\""));
    let Some((numbers, protocol)) = trimmed.split_once('/') else {
        return wrong("is neither a service nor ports with a protocol");
    };
    let protocol = match protocol.trim().to_ascii_lowercase().as_str() {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        "sctp" => Protocol::Sctp,
        _ => return wrong("has no known protocol (tcp, udp, sctp)"),
    };
    let mut ranges = Vec::new();
    for part in numbers.split(',') {
        let (first, last) = part.split_once(['-', ':']).unwrap_or((part, part));
        let (Ok(first), Ok(last)) = (first.trim().parse::<u16>(), last.trim().parse::<u16>()) else {
            return wrong("has a port that is no number from 1 to 65535");
        };
        if first == 0 {
            return wrong("has port 0");
        }
        if first > last {
            return Err(format!("\"{text}\" is upside down; did you mean \"{last}-{first}\"?"));
        }
        ranges.push(PortRange { protocol, first, last });
    }
    Ok(ranges)
}

/// Reads a jail's list of ports: services by name, ports, or `"all"`.
///
/// # Errors
/// The entry that is wrong and what would be right.
pub fn resolve(text: &str, services: &Services) -> Result<Ports, String> {
    let trimmed = text.trim();
    if matches!(trimmed, "all" | "any" | "0:65535") {
        return Ok(Ports::All);
    }
    if let Some(ranges) = services.get(trimmed) {
        return Ok(Ports::Some(ranges.clone()));
    }
    match parse_ports(trimmed) {
        Ok(ranges) => Ok(Ports::Some(ranges)),
        Err(why) => match crate::engine::tree::nearest(trimmed, services.keys().map(String::as_str)) {
            Some(near) => Err(format!("{why}; did you mean the service \"{near}\"?")),
            None => Err(why),
        },
    }
}

/// Sorts ranges and merges those that touch.
pub fn merge(mut ranges: Vec<PortRange>) -> Vec<PortRange> {
    ranges.sort_unstable();
    let mut merged: Vec<PortRange> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match merged.last_mut() {
            Some(last) if last.protocol == range.protocol && range.first <= last.last.saturating_add(1) => {
                last.last = last.last.max(range.last);
            }
            _ => merged.push(range),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expect: Result<&[(u16, u16)], &str>) {
        match (parse_ports(text), expect) {
            (Ok(ranges), Ok(expect)) => {
                assert_eq!(ranges.iter().map(|range| (range.first, range.last)).collect::<Vec<_>>(), expect);
            }
            (Err(why), Err(part)) => assert!(why.contains(part), "{why}"),
            (got, _) => assert!(got.is_err() == expect.is_err(), "{text}: {got:?}"),
        }
    }

    #[test]
    fn ports_are_read_or_refused_with_the_remedy() {
        check("22/tcp", Ok(&[(22, 22)]));
        check("80,443/tcp", Ok(&[(80, 80), (443, 443)]));
        check("10000-10800/udp", Ok(&[(10000, 10800)]));
        check("echo-request", Ok(&[(0, 0)]));
        check("22", Err("protocol"));
        check("22/xyz", Err("no known protocol"));
        check("0/tcp", Err("port 0"));
        check("70000/tcp", Err("1 to 65535"));
        check("200-100/tcp", Err("did you mean \"100-200\""));
        check("shh", Err("neither"));
        assert!(resolve("shh", &built_in_services()).is_err_and(|why| why.contains("\"ssh\"")));
        assert_eq!(resolve("all", &built_in_services()), Ok(Ports::All));
    }

    #[test]
    fn ranges_that_touch_become_one() {
        let range = |first, last| PortRange { protocol: Protocol::Tcp, first, last };
        assert_eq!(merge(vec![range(5, 9), range(1, 4), range(20, 20), range(8, 12)]), [range(1, 12), range(20, 20)]);
    }
}
