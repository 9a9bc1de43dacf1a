//! Addresses as logs and people write them: text comes in, one canonical form goes out (v4-mapped unwrapped, no names ever).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// The canonical form: `::ffff:1.2.3.4` is `1.2.3.4`, everything else is itself.
pub fn canonical(address: IpAddr) -> IpAddr {
    address.to_canonical()
}

/// The network of `address` that is counted and banned: itself for IPv4, its prefix of `ipv6_prefix` bits for IPv6.
#[inline]
pub fn counted_net(address: IpAddr, ipv6_prefix: u8) -> IpNet {
    match address {
        IpAddr::V6(six) if ipv6_prefix < 128 => {
            let mask = u128::MAX.checked_shl(128 - u32::from(ipv6_prefix)).unwrap_or(0);
            net_of(IpAddr::V6(Ipv6Addr::from_bits(six.to_bits() & mask)), ipv6_prefix)
        }
        _ => IpNet::from(address),
    }
}

/// `address/length` with its host bits cleared; a length that does not fit is cut to the family's.
pub fn net_of(address: IpAddr, length: u8) -> IpNet {
    let most = if address.is_ipv4() { 32 } else { 128 };
    match IpNet::new(address, length.min(most)) {
        Ok(net) => net.trunc(),
        Err(_) => IpNet::from(address),
    }
}

/// How a network is written everywhere: without the length when it is a single address.
pub fn show_net(net: &IpNet) -> String {
    if net.prefix_len() == net.max_prefix_len() { net.addr().to_string() } else { net.to_string() }
}

/// Reads an address or network as a person types it.
///
/// # Errors
/// One sentence that says what is wrong and what would be right: a port, a zone, host bits, a name.
pub fn parse_net(text: &str) -> Result<IpNet, String> {
    let text = text.trim();
    let (address, length) = match text.rsplit_once('/') {
        Some((address, length)) => (address, Some(length)),
        None => (text, None),
    };
    let parsed = parse_typed_address(address).map_err(|why| format!("\"{text}\" {why}"))?;
    let mapped = address.trim_start_matches('[').to_ascii_lowercase().starts_with("::ffff:") && parsed.is_ipv4();
    let Some(length) = length else { return Ok(IpNet::from(parsed)) };
    let most: u8 = if parsed.is_ipv4() { 32 } else { 128 };
    let bits = match length.parse::<u8>() {
        Ok(bits) if mapped && bits >= 96 => bits - 96,
        Ok(bits) if bits <= most => bits,
        Ok(_) | Err(_) => {
            match length.parse::<Ipv4Addr>().ok().and_then(|mask| ipnet::ipv4_mask_to_prefix(mask).ok()) {
                Some(bits) if parsed.is_ipv4() => bits,
                Some(_) | None => {
                    return Err(format!("\"{text}\" has no valid prefix length; write a number from 0 to {most}"));
                }
            }
        }
    };
    let net = IpNet::new(parsed, bits)
        .map_err(|_| format!("\"{text}\" has no valid prefix length; write a number from 0 to {most}"))?;
    if net.addr() != net.network() {
        return Err(format!("\"{text}\" has bits set behind its prefix; did you mean {}?", net.trunc()));
    }
    Ok(net)
}

fn parse_typed_address(text: &str) -> Result<IpAddr, String> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(canonical(address));
    }
    if let Some(inner) = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'))
        && let Ok(address) = inner.parse::<Ipv6Addr>()
    {
        return Ok(canonical(IpAddr::V6(address)));
    }
    if let Some((before, zone)) = text.split_once('%')
        && before.trim_start_matches('[').parse::<Ipv6Addr>().is_ok()
    {
        let zone = zone.trim_end_matches(']');
        return Err(format!(
            "names the interface {zone}; addresses count on every interface here, leave out \"%{zone}\""
        ));
    }
    let without_port =
        text.rsplit_once(':').map(|(host, port)| (host.trim_start_matches('[').trim_end_matches(']'), port));
    if let Some((host, port)) = without_port
        && host.parse::<IpAddr>().is_ok()
        && !port.is_empty()
        && port.bytes().all(|b| b.is_ascii_digit())
    {
        return Err(format!("has a port; leave out \":{port}\" (ports belong to the jail)"));
    }
    Err("is not an IPv4 or IPv6 address (host names are never resolved)".to_owned())
}

/// Reads the address at the start of `text`, as long as it goes; returns it with the number of bytes it takes.
///
/// Takes `1.2.3.4`, `2001:db8::1`, `::ffff:1.2.3.4`, `[2001:db8::1]` and a zone (`fe80::1%eth0`), which is dropped.
/// An octet with a leading zero or above 255, or digits that run on, is no address.
pub fn munch(text: &[u8]) -> Option<(IpAddr, usize)> {
    match *text.first()? {
        b'[' => munch_bracketed(text),
        b'0'..=b'9' => match munch_v4(text) {
            Some((address, length)) if !matches!(text.get(length), Some(b':' | b'.')) || !v6_goes_on(text, length) => {
                Some((IpAddr::V4(address), length))
            }
            _ => munch_v6(text),
        },
        b'a'..=b'f' | b'A'..=b'F' | b':' => munch_v6(text),
        _ => None,
    }
}

/// After a complete IPv4 address, `.` is never legal and `:` only a port separator; neither makes it IPv6.
fn v6_goes_on(text: &[u8], at: usize) -> bool {
    text.get(at) == Some(&b'.') && text.get(at + 1).is_some_and(u8::is_ascii_digit)
}

/// Reads four octets; `None` if they are not there or if another digit follows.
#[inline]
pub fn munch_v4(text: &[u8]) -> Option<(Ipv4Addr, usize)> {
    let (mut address, mut at) = (0u32, 0usize);
    for octet_number in 0..4 {
        if octet_number > 0 {
            if *text.get(at)? != b'.' {
                return None;
            }
            at += 1;
        }
        let first = text.get(at)?.wrapping_sub(b'0');
        if first > 9 {
            return None;
        }
        let mut octet = u32::from(first);
        at += 1;
        for _ in 0..2 {
            let Some(digit) = text.get(at).map(|b| b.wrapping_sub(b'0')).filter(|digit| *digit <= 9) else { break };
            if octet == 0 {
                return None;
            }
            octet = octet * 10 + u32::from(digit);
            at += 1;
        }
        if octet > 255 {
            return None;
        }
        address = address << 8 | octet;
    }
    if text.get(at).is_some_and(u8::is_ascii_digit) {
        return None;
    }
    Some((Ipv4Addr::from(address), at))
}

/// Hexadecimal value of a byte; 255 for every other byte.
const HEX: [u8; 256] = {
    let mut table = [255u8; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = match byte as u8 {
            digit @ b'0'..=b'9' => digit - b'0',
            letter @ b'a'..=b'f' => letter - b'a' + 10,
            letter @ b'A'..=b'F' => letter - b'A' + 10,
            _ => 255,
        };
        byte += 1;
    }
    table
};

/// RFC 4291, section 2.2: up to eight groups, one `::`, a dotted quad for the last two groups.
fn munch_v6(text: &[u8]) -> Option<(IpAddr, usize)> {
    let mut groups = [0u16; 8];
    let (mut count, mut gap, mut at) = (0usize, None, 0usize);
    if text.first() == Some(&b':') {
        if text.get(1) != Some(&b':') {
            return None;
        }
        gap = Some(0);
        at = 2;
    }
    // `at` stands where a group may begin: at the start, behind a colon, or behind the gap.
    while count < 8 {
        let start = at;
        let mut value = 0u32;
        while at - start < 4
            && let Some(digit) = text.get(at).map(|byte| HEX[usize::from(*byte)])
            && digit < 16
        {
            value = value << 4 | u32::from(digit);
            at += 1;
        }
        if at == start {
            // A single colon at the end is punctuation, unless it belongs to the gap.
            if gap == Some(count) || count == 0 {
                break;
            }
            at -= 1;
            break;
        }
        if text.get(at) == Some(&b'.') && count <= 6 {
            if let Some((quad, length)) = munch_v4(&text[start..]) {
                let bits = quad.to_bits();
                groups[count] = (bits >> 16) as u16;
                groups[count + 1] = (bits & 0xffff) as u16;
                count += 2;
                at = start + length;
                break;
            }
        } else if text.get(at).is_some_and(|byte| HEX[usize::from(*byte)] < 16) {
            return None;
        }
        groups[count] = value as u16;
        count += 1;
        if text.get(at) != Some(&b':') {
            break;
        }
        if text.get(at + 1) == Some(&b':') {
            if gap.is_some() {
                break;
            }
            gap = Some(count);
            at += 2;
        } else if count < 8 {
            at += 1;
        }
    }
    match gap {
        Some(gap) => {
            if count > 7 {
                return None;
            }
            let behind = count - gap;
            groups.copy_within(gap..count, 8 - behind);
            groups[gap..8 - behind].fill(0);
        }
        None if count != 8 => return None,
        None => {}
    }
    let address = canonical(IpAddr::V6(Ipv6Addr::from(groups)));
    Some((address, past_zone(text, at)))
}

/// `%eth0` behind an address belongs to it.
fn past_zone(text: &[u8], at: usize) -> usize {
    let mut end = at;
    if text.get(end) == Some(&b'%') {
        end += 1;
        while text.get(end).is_some_and(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_')) {
            end += 1;
        }
    }
    end
}

fn munch_bracketed(text: &[u8]) -> Option<(IpAddr, usize)> {
    let (address, length) = munch_v6(text.get(1..)?)?;
    (text.get(1 + length) == Some(&b']')).then_some((address, length + 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn munches(text: &str, expect: Option<(&str, usize)>) {
        let got = munch(text.as_bytes()).map(|(address, length)| (address.to_string(), length));
        assert_eq!(got, expect.map(|(address, length)| (address.to_owned(), length)), "{text}");
    }

    #[test]
    fn the_longest_address_at_the_start_is_taken() {
        munches("1.2.3.4 port 5", Some(("1.2.3.4", 7)));
        munches("1.2.3.4", Some(("1.2.3.4", 7)));
        munches("1.2.3.4:5060", Some(("1.2.3.4", 7)));
        munches("1.2.3.4.", Some(("1.2.3.4", 7)));
        munches("1.2.3.4.5", None);
        munches("1.2.3.456", None);
        munches("01.2.3.4", None);
        munches("256.2.3.4", None);
        munches("1.2.3", None);
        munches("2001:db8::1 port", Some(("2001:db8::1", 11)));
        munches("2001:DB8::1,", Some(("2001:db8::1", 11)));
        munches("[2001:db8::1]:5060", Some(("2001:db8::1", 13)));
        munches("[2001:db8::1", None);
        munches("::ffff:192.0.2.1 x", Some(("192.0.2.1", 16)));
        munches("fe80::1%eth0 port", Some(("fe80::1", 12)));
        munches("::1", Some(("::1", 3)));
        munches("fe80::1: bad", Some(("fe80::1", 7)));
        munches("example.org", None);
        munches("deadbeef", None);
        munches("", None);
    }

    #[test]
    fn what_is_munched_is_what_the_standard_library_reads() {
        let mut seed = 3u64;
        let mut next = |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % below
        };
        let pieces = ["0", "1", "a", "ffff", "2001", "db8", ":", ":", ":", "::", "1.2.3.4", ".", "12345", "g", "FE80"];
        let mut read = 0;
        for _ in 0..200_000 {
            let text: String = (0..1 + next(14)).map(|_| pieces[next(pieces.len() as u64) as usize]).collect();
            let whole = text.parse::<Ipv6Addr>().ok().map(|address| canonical(IpAddr::V6(address)));
            let got = munch_v6(text.as_bytes());
            if let Some(address) = whole {
                read += 1;
                assert_eq!(got, Some((address, text.len())), "{text}");
            } else if let Some((address, length)) = got {
                // Part of it is an address; that part must be one for the standard library, too.
                let part = text[..length].parse::<Ipv6Addr>().ok().map(|address| canonical(IpAddr::V6(address)));
                assert_eq!(part, Some(address), "{text}");
            }
        }
        assert!(read > 1000, "only {read} addresses among the texts");
    }

    #[track_caller]
    fn parses(text: &str, expect: Result<&str, &str>) {
        match (parse_net(text), expect) {
            (Ok(net), Ok(expect)) => assert_eq!(show_net(&net), expect, "{text}"),
            (Err(why), Err(part)) => assert!(why.contains(part), "{text}: {why}"),
            (got, _) => assert!(got.is_err() && expect.is_err(), "{text}: {got:?}"),
        }
    }

    #[test]
    fn typed_addresses_are_made_canonical_or_refused_with_the_remedy() {
        parses("1.2.3.4", Ok("1.2.3.4"));
        parses(" 10.0.0.0/8 ", Ok("10.0.0.0/8"));
        parses("10.0.0.0/255.0.0.0", Ok("10.0.0.0/8"));
        parses("::ffff:1.2.3.4", Ok("1.2.3.4"));
        parses("::ffff:10.0.0.0/104", Ok("10.0.0.0/8"));
        parses("[2001:db8::1]", Ok("2001:db8::1"));
        parses("2001:db8::/32", Ok("2001:db8::/32"));
        parses("1.2.3.4/24", Err("did you mean 1.2.3.0/24"));
        parses("1.2.3.4:5060", Err("has a port"));
        parses("[2001:db8::1]:5060", Err("has a port"));
        parses("fe80::1%eth0", Err("leave out \"%eth0\""));
        parses("example.org", Err("never resolved"));
        parses("1.2.3.0/33", Err("0 to 32"));
        parses("", Err("not an IPv4"));
    }

    #[test]
    fn ipv6_is_counted_by_its_prefix_and_ipv4_alone() {
        let six: IpAddr = "2001:db8:1:2:3::4".parse().unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
        assert_eq!(show_net(&counted_net(six, 64)), "2001:db8:1:2::/64");
        assert_eq!(show_net(&counted_net(six, 128)), "2001:db8:1:2:3::4");
        assert_eq!(show_net(&counted_net(IpAddr::V4(Ipv4Addr::new(1, 2, 3, 4)), 64)), "1.2.3.4");
    }
}
