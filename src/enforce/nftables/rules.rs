//! The model as netlink messages: sets, chains and rules come in, messages of a batch go out. Asks nothing, decides nothing.

use super::model::{BASE_PRIORITY, BanSet, Family, Match, Range, Rule, Verdict, allow_set_name};
use super::wire::{APPEND, Batch, CREATE, kind};
use super::{PortRange, Protocol};

/// `NFT_SET_INTERVAL`.
pub(super) const SET_INTERVAL: u32 = 4;
/// `NFT_SET_TIMEOUT`.
pub(super) const SET_TIMEOUT: u32 = 0x10;
/// 1000 elements in one list are at most 48 KB; a list of 64 KiB or more does not fit into its attribute.
pub(super) const ELEMENTS_PER_MESSAGE: usize = 1000;
/// `NFT_SET_ELEM_INTERVAL_END`: the first address behind a range.
const INTERVAL_END: u32 = 1;
const VERDICT_REGISTER: u32 = 0;
const REGISTER: u32 = 1;
const META_IIFNAME: u32 = 6;
const META_NFPROTO: u32 = 15;
const META_L4PROTO: u32 = 16;
const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;
const CMP_EQ: u32 = 0;
const CMP_LTE: u32 = 3;
const CMP_GTE: u32 = 5;
const IPPROTO_ICMP: u8 = 1;
const IPPROTO_TCP: u8 = 6;
const IPPROTO_UDP: u8 = 17;
const IPPROTO_DCCP: u8 = 33;
const IPPROTO_ICMPV6: u8 = 58;
const IPPROTO_SCTP: u8 = 132;
const ECHO_REQUEST_V4: u8 = 8;
const ECHO_REQUEST_V6: u8 = 128;
/// Router solicitation, the first of the four messages of neighbour discovery.
const ND_FIRST: u8 = 133;
/// Neighbour advertisement, the last of them.
const ND_LAST: u8 = 136;

/// The number the nft language has for the type of a key (`ipv4_addr`, `ipv6_addr`).
pub(super) fn key_type(family: Family) -> u32 {
    match family {
        Family::V4 => 7,
        Family::V6 => 8,
    }
}

fn nfproto(family: Family) -> u8 {
    match family {
        Family::V4 => 2,
        Family::V6 => 10,
    }
}

/// The set of one scope and length; the counter makes the kernel give each new element one of its own.
pub(super) fn put_ban_set(b: &mut Batch, table: &str, set: &BanSet) -> u32 {
    b.message(kind::NEWSET, CREATE, |b| {
        put_set_head(b, table, &set.name, SET_TIMEOUT, set.family);
        if set.counted {
            b.nest(17, put_counter);
        }
    })
}

/// An allow set with exactly these ranges.
pub(super) fn put_allow_set(b: &mut Batch, table: &str, family: Family, ranges: &[Range]) {
    let name = allow_set_name(family);
    b.message(kind::NEWSET, CREATE, |b| put_set_head(b, table, name, SET_INTERVAL, family));
    b.message(kind::DELSETELEM, 0, |b| {
        b.text(1, table);
        b.text(2, name);
    });
    let last = if family == Family::V4 { u128::from(u32::MAX) } else { u128::MAX };
    // A range up to the last address has no end element.
    let ends: Vec<(u128, u32)> = ranges
        .iter()
        .flat_map(|range| [Some((range.0, 0)), (range.1 < last).then(|| (range.1 + 1, INTERVAL_END))])
        .flatten()
        .collect();
    for part in ends.chunks(ELEMENTS_PER_MESSAGE) {
        put_elements(b, kind::NEWSETELEM, table, name, part, |b, (address, flags)| {
            put_key(b, &address.to_be_bytes()[16 - family.bytes()..]);
            if *flags != 0 {
                b.u32(3, *flags);
            }
        });
    }
}

fn put_set_head(b: &mut Batch, table: &str, name: &str, flags: u32, family: Family) {
    b.text(1, table);
    b.text(2, name);
    b.u32(3, flags);
    b.u32(4, key_type(family));
    b.u32(5, if family == Family::V4 { 4 } else { 16 });
    // The id is only for rules that name a set by it; the kernel wants the attribute all the same.
    b.u32(10, 1);
}

fn put_counter(b: &mut Batch) {
    b.text(1, "counter");
    b.nest(2, |_| {});
}

/// One message with a list of elements.
pub(super) fn put_elements<T>(
    b: &mut Batch,
    kind: u8,
    table: &str,
    set: &str,
    items: &[T],
    put: impl Fn(&mut Batch, &T),
) -> u32 {
    b.message(kind, if kind == kind::NEWSETELEM { CREATE } else { 0 }, |b| {
        b.text(1, table);
        b.text(2, set);
        b.nest(3, |b| items.iter().for_each(|item| b.nest(1, |b| put(b, item))));
    })
}

/// The key of an element.
pub(super) fn put_key(b: &mut Batch, key: &[u8]) {
    b.nest(1, |b| b.raw(1, key));
}

/// A chain; the base chain with its hook, the others without.
pub(super) fn put_chain(b: &mut Batch, table: &str, name: &str, is_base: bool) {
    b.message(kind::NEWCHAIN, CREATE, |b| {
        b.text(1, table);
        b.text(3, name);
        if is_base {
            b.nest(4, |b| {
                // NF_INET_PRE_ROUTING
                b.u32(1, 0);
                b.u32(2, BASE_PRIORITY.cast_unsigned());
            });
            // NF_ACCEPT
            b.u32(5, 1);
            b.text(7, "filter");
        }
    });
}

/// A rule behind those its chain has.
pub(super) fn put_rule(b: &mut Batch, table: &str, rule: &Rule) -> u32 {
    b.message(kind::NEWRULE, CREATE | APPEND, |b| {
        b.text(1, table);
        b.text(2, &rule.chain);
        b.nest(4, |b| {
            put_match(b, &rule.on);
            put_verdict(b, &rule.verdict);
        });
    })
}

fn put_match(b: &mut Batch, on: &Match) {
    match on {
        Match::Anything => {}
        Match::Loopback => {
            put_meta(b, META_IIFNAME);
            put_cmp(b, CMP_EQ, b"lo\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
        }
        Match::NeighbourDiscovery => {
            put_meta_is(b, META_NFPROTO, nfproto(Family::V6));
            put_meta_is(b, META_L4PROTO, IPPROTO_ICMPV6);
            put_payload(b, TRANSPORT_HEADER, 0, 1);
            put_cmp(b, CMP_GTE, &[ND_FIRST]);
            put_cmp(b, CMP_LTE, &[ND_LAST]);
        }
        Match::Source { family, length, set } => {
            put_meta_is(b, META_NFPROTO, nfproto(*family));
            let (offset, bytes) = if *family == Family::V4 { (12, 4) } else { (8, 16) };
            put_payload(b, NETWORK_HEADER, offset, bytes);
            if *length < family.bits() {
                put_mask(b, *family, *length);
            }
            put_expression(b, "lookup", |b| {
                b.text(1, set);
                b.u32(2, REGISTER);
            });
        }
        Match::Tcp => put_meta_is(b, META_L4PROTO, IPPROTO_TCP),
        Match::Port(range) => put_port(b, range),
        Match::Echo(family) => {
            let (protocol, echo) = match family {
                Family::V4 => (IPPROTO_ICMP, ECHO_REQUEST_V4),
                Family::V6 => (IPPROTO_ICMPV6, ECHO_REQUEST_V6),
            };
            put_meta_is(b, META_NFPROTO, nfproto(*family));
            put_meta_is(b, META_L4PROTO, protocol);
            put_payload(b, TRANSPORT_HEADER, 0, 1);
            put_cmp(b, CMP_EQ, &[echo]);
        }
    }
}

fn put_port(b: &mut Batch, range: &PortRange) {
    let protocol = match range.protocol {
        Protocol::Tcp => IPPROTO_TCP,
        Protocol::Udp => IPPROTO_UDP,
        Protocol::Sctp => IPPROTO_SCTP,
        Protocol::Dccp => IPPROTO_DCCP,
        // Has no ports; the model makes Match::Echo of it.
        Protocol::Icmp => IPPROTO_ICMP,
    };
    put_meta_is(b, META_L4PROTO, protocol);
    put_payload(b, TRANSPORT_HEADER, 2, 2);
    if range.first == range.last {
        put_cmp(b, CMP_EQ, &range.first.to_be_bytes());
    } else {
        put_cmp(b, CMP_GTE, &range.first.to_be_bytes());
        put_cmp(b, CMP_LTE, &range.last.to_be_bytes());
    }
}

fn put_verdict(b: &mut Batch, verdict: &Verdict) {
    let immediate = |b: &mut Batch, code: i32, chain: Option<&str>| {
        put_expression(b, "immediate", |b| {
            b.u32(1, VERDICT_REGISTER);
            b.nest(2, |b| {
                b.nest(2, |b| {
                    b.u32(1, code.cast_unsigned());
                    if let Some(chain) = chain {
                        b.text(2, chain);
                    }
                });
            });
        });
    };
    let reject = |b: &mut Batch, kind: u32, code: u8| {
        put_expression(b, "reject", |b| {
            b.u32(1, kind);
            b.raw(2, &[code]);
        });
    };
    match verdict {
        // NF_DROP, NF_ACCEPT, NFT_JUMP
        Verdict::Drop => immediate(b, 0, None),
        Verdict::Accept => immediate(b, 1, None),
        Verdict::Jump(chain) => immediate(b, -3, Some(chain)),
        // NFT_REJECT_TCP_RST; NFT_REJECT_ICMPX_UNREACH with NFT_REJECT_ICMPX_PORT_UNREACH or _ADMIN_PROHIBITED
        Verdict::TcpReset => reject(b, 1, 0),
        Verdict::PortUnreachable => reject(b, 2, 1),
        Verdict::Prohibited => reject(b, 2, 3),
    }
}

fn put_expression(b: &mut Batch, name: &str, build: impl FnOnce(&mut Batch)) {
    b.nest(1, |b| {
        b.text(1, name);
        b.nest(2, build);
    });
}

fn put_meta(b: &mut Batch, key: u32) {
    put_expression(b, "meta", |b| {
        b.u32(1, REGISTER);
        b.u32(2, key);
    });
}

fn put_meta_is(b: &mut Batch, key: u32, value: u8) {
    put_meta(b, key);
    put_cmp(b, CMP_EQ, &[value]);
}

fn put_cmp(b: &mut Batch, op: u32, value: &[u8]) {
    put_expression(b, "cmp", |b| {
        b.u32(1, REGISTER);
        b.u32(2, op);
        b.nest(3, |b| b.raw(1, value));
    });
}

fn put_payload(b: &mut Batch, header: u32, offset: u32, bytes: u32) {
    put_expression(b, "payload", |b| {
        b.u32(1, REGISTER);
        b.u32(2, header);
        b.u32(3, offset);
        b.u32(4, bytes);
    });
}

fn put_mask(b: &mut Batch, family: Family, length: u8) {
    let ones = u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0);
    let bytes = family.bytes();
    put_expression(b, "bitwise", |b| {
        b.u32(1, REGISTER);
        b.u32(2, REGISTER);
        b.u32(3, if family == Family::V4 { 4 } else { 16 });
        b.nest(4, |b| b.raw(1, &ones.to_be_bytes()[..bytes]));
        b.nest(5, |b| b.raw(1, &[0; 16][..bytes]));
    });
}
