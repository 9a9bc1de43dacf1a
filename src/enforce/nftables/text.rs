//! The model as people read it: a layout comes in, what `nft list table` shows goes out, sets without elements.

use std::fmt::Write;
use std::net::{Ipv4Addr, Ipv6Addr};

use super::model::{BASE_CHAIN, BASE_PRIORITY, Family, Match, Model, Rule, Verdict, allow_set_name};
use super::{Layout, PortRange, Protocol};

/// The rule set of a layout in the nft language, as `nft -y list table` prints it after an install, sets without elements.
pub fn describe(layout: &Layout) -> String {
    text_of(&Model::new(layout, false))
}

/// The same for a model, with its counters and all its prefix lengths.
pub(super) fn text_of(model: &Model) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = write_table(&mut text, model);
    text
}

fn write_table(out: &mut String, model: &Model) -> std::fmt::Result {
    writeln!(out, "table inet {} {{", model.table)?;
    for family in [Family::V4, Family::V6] {
        write_set(out, allow_set_name(family), family, &["flags interval"])?;
    }
    for set in &model.sets {
        let lines = ["flags timeout", "counter"];
        write_set(out, &set.name, set.family, if set.counted { &lines } else { &lines[..1] })?;
    }
    let rules = model.rules();
    let chains = model.chains();
    for (index, chain) in chains.iter().enumerate() {
        writeln!(out, "\tchain {chain} {{")?;
        if chain == BASE_CHAIN {
            writeln!(out, "\t\ttype filter hook prerouting priority {BASE_PRIORITY}; policy accept;")?;
        }
        for rule in rules.iter().filter(|rule| rule.chain == *chain) {
            writeln!(out, "\t\t{}", rule_text(rule))?;
        }
        writeln!(out, "\t}}{}", if index + 1 < chains.len() { "\n" } else { "" })?;
    }
    writeln!(out, "}}")
}

fn write_set(out: &mut String, name: &str, family: Family, lines: &[&str]) -> std::fmt::Result {
    let key = if family == Family::V4 { "ipv4_addr" } else { "ipv6_addr" };
    writeln!(out, "\tset {name} {{\n\t\ttype {key}")?;
    for line in lines {
        writeln!(out, "\t\t{line}")?;
    }
    writeln!(out, "\t}}\n")
}

fn rule_text(rule: &Rule) -> String {
    let on = match_text(&rule.on);
    let verdict = match &rule.verdict {
        Verdict::Accept => "accept".to_owned(),
        Verdict::Drop => "drop".to_owned(),
        Verdict::Jump(chain) => format!("jump {chain}"),
        Verdict::TcpReset => "reject with tcp reset".to_owned(),
        // What nft prints for its default, icmpx port-unreachable.
        Verdict::PortUnreachable => "reject".to_owned(),
        Verdict::Prohibited => "reject with icmpx admin-prohibited".to_owned(),
    };
    if on.is_empty() { verdict } else { format!("{on} {verdict}") }
}

fn match_text(on: &Match) -> String {
    match on {
        Match::Anything => String::new(),
        Match::Loopback => "iifname \"lo\"".to_owned(),
        Match::NeighbourDiscovery => "icmpv6 type 133-136".to_owned(),
        Match::Source { family, length, set } => {
            let ip = if *family == Family::V4 { "ip" } else { "ip6" };
            match mask_text(*family, *length) {
                Some(mask) => format!("{ip} saddr & {mask} == @{set}"),
                None => format!("{ip} saddr @{set}"),
            }
        }
        Match::Tcp => "meta l4proto tcp".to_owned(),
        Match::Port(range) => port_text(range),
        Match::Echo(Family::V4) => "icmp type echo-request".to_owned(),
        Match::Echo(Family::V6) => "icmpv6 type echo-request".to_owned(),
    }
}

fn port_text(range: &PortRange) -> String {
    let protocol = match range.protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Sctp => "sctp",
        Protocol::Dccp => "dccp",
        Protocol::Icmp => "icmp",
    };
    let PortRange { first, last, .. } = range;
    if first == last { format!("{protocol} dport {first}") } else { format!("{protocol} dport {first}-{last}") }
}

fn mask_text(family: Family, length: u8) -> Option<String> {
    let ones = u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0);
    let text = match family {
        Family::V4 => Ipv4Addr::from_bits(u32::try_from(ones >> 96).unwrap_or(u32::MAX)).to_string(),
        Family::V6 => Ipv6Addr::from_bits(ones).to_string(),
    };
    (length < family.bits()).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::super::{Action, Ports, Scope};
    use super::*;

    #[test]
    fn a_layout_is_described_as_nft_lists_it() {
        let range = |protocol, first, last| PortRange { protocol, first, last };
        let layout = Layout {
            table: "band".to_owned(),
            allow: vec![],
            scopes: vec![Scope {
                name: "pbx".to_owned(),
                action: Action::Reject,
                ports: Ports::Some(vec![
                    range(Protocol::Tcp, 5061, 5061),
                    range(Protocol::Udp, 5060, 5061),
                    range(Protocol::Icmp, 0, 0),
                ]),
            }],
        };
        let text = describe(&layout);
        let chains = text.split_once("\tchain pbx-ban").map(|(_, chains)| chains);
        let expect = " {
		tcp dport 5061 reject with tcp reset
		udp dport 5060-5061 reject
		icmp type echo-request reject with icmpx admin-prohibited
		icmpv6 type echo-request reject with icmpx admin-prohibited
	}

	chain prerouting {
		type filter hook prerouting priority -300; policy accept;
		iifname \"lo\" accept
		ip saddr @allow4 accept
		ip6 saddr @allow6 accept
		icmpv6 type 133-136 accept
		ip saddr @pbx-v4 jump pbx-ban
		ip6 saddr @pbx-v6 jump pbx-ban
		ip6 saddr & ffff:ffff:ffff:ffff:: == @pbx-v6-64 jump pbx-ban
	}
}
";
        assert_eq!(chains, Some(expect), "{text}");
        assert!(text.starts_with("table inet band {\n\tset allow4 {\n\t\ttype ipv4_addr\n\t\tflags interval\n\t}\n"));
    }
}
