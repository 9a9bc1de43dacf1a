//! Which jails share sets in the kernel: the configuration comes in, a layout and each jail's scope go out.

use std::sync::Arc;

use hashbrown::HashMap;
use ipnet::IpNet;

use crate::config::ports::{Ports, Protocol};
use crate::config::schema::{Action, Config};
use crate::enforce::nftables as nft;

/// The scope of jails without ports: everything from the banned address is dropped.
const ALL: &str = "all";
/// The same with an answer.
const ALL_REJECT: &str = "all-reject";

/// A layout and who belongs where.
#[derive(Clone, Debug)]
pub struct Scopes {
    /// What the kernel gets.
    pub layout: nft::Layout,
    of: HashMap<String, Arc<str>>,
    all: Arc<str>,
}

impl Scopes {
    /// The scopes of a configuration. Jails with the same ports and action share one, because each scope costs every
    /// packet that is not banned a look-up; its name is the first such jail's.
    pub fn new(config: &Config, allow: Vec<IpNet>) -> Self {
        let all: Arc<str> = Arc::from(ALL);
        let mut layout = nft::Layout {
            table: config.nftables.table.clone(),
            allow,
            scopes: vec![nft::Scope { name: ALL.to_owned(), action: nft::Action::Drop, ports: nft::Ports::All }],
        };
        let mut of: HashMap<String, Arc<str>> = HashMap::new();
        for jail in config.enabled() {
            let action = match jail.action {
                Action::Drop => nft::Action::Drop,
                Action::Reject => nft::Action::Reject,
            };
            let ports = ports(&jail.ports);
            let name = match layout.scopes.iter().find(|scope| scope.action == action && scope.ports == ports) {
                Some(scope) => scope.name.clone(),
                None => {
                    let name = if ports == nft::Ports::All { ALL_REJECT.to_owned() } else { jail.name.clone() };
                    layout.scopes.push(nft::Scope { name: name.clone(), action, ports });
                    name
                }
            };
            of.insert(jail.name.clone(), Arc::from(name));
        }
        Self { layout, of, all }
    }

    /// The scope of a jail; one that is not configured (any more) shuts out everything.
    pub fn of(&self, jail: &str) -> Arc<str> {
        Arc::clone(self.of.get(jail).unwrap_or(&self.all))
    }
}

fn ports(ports: &Ports) -> nft::Ports {
    match ports {
        Ports::All => nft::Ports::All,
        Ports::Some(ranges) => nft::Ports::Some(
            ranges
                .iter()
                .map(|range| nft::PortRange {
                    protocol: match range.protocol {
                        Protocol::Tcp => nft::Protocol::Tcp,
                        Protocol::Udp => nft::Protocol::Udp,
                        Protocol::Sctp => nft::Protocol::Sctp,
                        Protocol::Icmp => nft::Protocol::Icmp,
                    },
                    first: range.first,
                    last: range.last,
                })
                .collect(),
        ),
    }
}
