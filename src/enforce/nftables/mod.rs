//! Bans in the kernel: a layout and bans come in, netlink messages go out. Spawns nothing, keeps no timers, decides nothing.
//!
//! The numbers and kernel oddities named in this room were measured on 6.18, 6.12 and 6.1.

mod elements;
mod kernel;
mod model;
mod monitor;
mod rules;
mod seen;
mod socket;
mod text;
mod wire;

use ipnet::IpNet;
use rustix::io::Errno;

use crate::engine::time::Span;

pub use kernel::Kernel;
pub use monitor::{Change, Monitor};
pub use text::describe;

/// What the kernel should hold apart from the bans themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The name of our table in the family `inet`; everything in that table is ours and is put right by an install.
    pub table: String,
    /// Networks that are let through whatever is banned.
    pub allow: Vec<IpNet>,
    /// The groups of bans; the order does not matter.
    pub scopes: Vec<Scope>,
}

/// Bans that are enforced alike: one group of sets and one chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scope {
    /// `all`, or the name of a jail: 1 to 100 of `A-Z a-z 0-9 _ -`.
    pub name: String,
    /// What happens to a packet of a banned address.
    pub action: Action,
    /// Which packets of a banned address are meant.
    pub ports: Ports,
}

/// What happens to a packet of a banned address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// No answer at all.
    Drop,
    /// TCP gets a reset, everything else an ICMP `port unreachable` (echo requests: `administratively prohibited`).
    Reject,
}

/// Which packets of a banned address are meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ports {
    /// Every packet.
    All,
    /// Only packets to these ports; the others go on to the next scopes.
    Some(Vec<PortRange>),
}

/// The destination ports `first` to `last` of one protocol; both are ignored for [`Protocol::Icmp`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PortRange {
    /// The protocol that has the ports.
    pub protocol: Protocol,
    /// The first port.
    pub first: u16,
    /// The last port; equal to `first` for a single one.
    pub last: u16,
}

/// A protocol a scope can be limited to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
    /// DCCP.
    Dccp,
    /// Echo requests (ping) of ICMP and ICMPv6; it has no ports.
    Icmp,
}

/// One change of what the kernel holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Ban `net`; if it is banned already, the new timeout replaces the old one, be it longer or shorter.
    Ban {
        /// The name of a scope of the layout.
        scope: String,
        /// An address (`/32`, `/128`) or a network; host bits are cleared.
        net: IpNet,
        /// How long from now, in whole milliseconds, at most 100 years; `None` is for ever.
        timeout: Option<Span>,
    },
    /// Let `net` in again; no error if it was not banned.
    Unban {
        /// The name of a scope of the layout.
        scope: String,
        /// Exactly the network that was banned; a part of it is not an element.
        net: IpNet,
    },
}

/// A ban as the kernel holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// The scope it was banned in.
    pub scope: String,
    /// The address or network.
    pub net: IpNet,
    /// What is left of its time; `None` is for ever.
    pub expires: Option<Span>,
    /// Packets that came from it since it was last banned, also those to ports the scope leaves open.
    pub packets: u64,
    /// The bytes of these packets.
    pub bytes: u64,
}

/// Why the kernel does not hold what it was asked to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// We may not change the rules.
    #[error(
        "the capability CAP_NET_ADMIN is missing: run as root, or write AmbientCapabilities=CAP_NET_ADMIN into the unit"
    )]
    Permission,
    /// The kernel lacks something we need.
    #[error(
        "the kernel has no {0}: load it (modprobe nf_tables) or use a kernel with CONFIG_NF_TABLES and CONFIG_NF_TABLES_INET"
    )]
    Unsupported(&'static str),
    /// Our table, a set or a chain was deleted by somebody else: install again.
    #[error("the table \"{0}\" or a part of it is gone from the kernel; it must be installed again")]
    Gone(String),
    /// Another process owns a table of our name (table flag `owner`).
    #[error("the table \"{0}\" belongs to another process; stop it or choose another table name")]
    Owned(String),
    /// The layout cannot be put into the kernel.
    #[error("{0}")]
    Layout(String),
    /// The op names a scope that the installed layout does not have.
    #[error("no scope \"{0}\" is installed in the kernel")]
    UnknownScope(String),
    /// The kernel did not answer within 10 seconds.
    #[error("the kernel did not answer while {0}")]
    Silent(&'static str),
    /// Any other refusal.
    #[error("{doing}: the kernel answered \"{errno}\"")]
    Kernel {
        /// What we were doing.
        doing: &'static str,
        /// The kernel's answer.
        errno: Errno,
    },
}

impl Layout {
    /// Refuses names the kernel or the nft language cannot hold, names that occur twice, and ranges that run backwards.
    ///
    /// # Errors
    /// [`Error::Layout`] with one sentence about the first fault.
    pub fn check(&self) -> Result<(), Error> {
        check_name("table", &self.table)?;
        for (index, scope) in self.scopes.iter().enumerate() {
            check_name("scope", &scope.name)?;
            if self.scopes[..index].iter().any(|earlier| earlier.name == scope.name) {
                return Err(Error::Layout(format!("the scope \"{}\" occurs twice", scope.name)));
            }
            let Ports::Some(ranges) = &scope.ports else { continue };
            if let Some(range) = ranges.iter().find(|range| range.first > range.last) {
                let PortRange { first, last, .. } = range;
                return Err(Error::Layout(format!(
                    "the scope \"{}\" has a range {first}-{last} of no ports",
                    scope.name
                )));
            }
        }
        Ok(())
    }
}

/// The kernel takes 255 bytes for a name, the suffixes of our sets and chains need up to 9.
const NAME_BYTES_MAX: usize = 100;

fn check_name(what: &str, name: &str) -> Result<(), Error> {
    let legal = name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'));
    if legal && (1..=NAME_BYTES_MAX).contains(&name.len()) {
        return Ok(());
    }
    Err(Error::Layout(format!("the {what} name \"{name}\" is not 1 to {NAME_BYTES_MAX} of A-Z a-z 0-9 _ -")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(names: [&str; 2], range: (u16, u16), expect: &str) {
        let scope = |name: &str| Scope {
            name: name.to_owned(),
            action: Action::Drop,
            ports: Ports::Some(vec![PortRange { protocol: Protocol::Tcp, first: range.0, last: range.1 }]),
        };
        let layout = Layout { table: "band".to_owned(), allow: vec![], scopes: names.map(scope).to_vec() };
        let got = layout.check().err().map(|error| error.to_string()).unwrap_or_default();
        assert!(got.contains(expect) && got.is_empty() == expect.is_empty(), "{names:?} {range:?}: {got}");
    }

    #[test]
    fn a_layout_with_impossible_names_or_ranges_is_refused() {
        check(["sshd", "3cx_-Z"], (22, 22), "");
        check(["sshd", ""], (22, 22), "scope name \"\"");
        check(["sshd", "a b"], (22, 22), "scope name \"a b\"");
        check(["sshd", &"x".repeat(101)], (22, 22), "1 to 100");
        check(["sshd", "sshd"], (22, 22), "occurs twice");
        check(["sshd", "pbx"], (23, 22), "23-22 of no ports");
    }
}
