//! What is to be done in the world, as values. The engine makes them; enforcers, mirrors and people's screens take them.

use std::fmt;

use ipnet::IpNet;

use super::time::Timestamp;

/// A jail, by number: given out once per name and process, never used for another name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JailId(pub u16);

/// Which host or person made a ban.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Failures in a log.
    Log,
    /// `banctl ban`.
    Manual,
    /// Another host of the fleet.
    Fleet(String),
    /// An import from another program.
    Import,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Log => f.write_str("log"),
            Self::Manual => f.write_str("manual"),
            Self::Fleet(host) => write!(f, "fleet:{host}"),
            Self::Import => f.write_str("import"),
        }
    }
}

impl Origin {
    /// Reads what `Display` wrote.
    pub fn read(text: &str) -> Self {
        match text {
            "log" => Self::Log,
            "import" => Self::Import,
            _ => text.strip_prefix("fleet:").map_or(Self::Manual, |host| Self::Fleet(host.to_owned())),
        }
    }
}

/// A ban that stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ban {
    /// The jail it belongs to.
    pub jail: JailId,
    /// Who is shut out.
    pub net: IpNet,
    /// Since when.
    pub since: Timestamp,
    /// Until when; `None` = forever.
    pub until: Option<Timestamp>,
    /// Failures that led to it.
    pub failures: u32,
    /// The how manieth ban of this network in this jail.
    pub count: u32,
    /// Who made it.
    pub origin: Origin,
    /// Why, for people.
    pub reason: String,
}

/// One thing to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Shut out.
    Ban(Ban),
    /// Stands already, with a new end.
    Extend(Ban),
    /// Let in again: by its end (`expired`) or by hand.
    Unban {
        /// The ban that is over.
        ban: Ban,
        /// Its time was up, so a kernel that keeps timeouts has already let it in.
        expired: bool,
    },
}
