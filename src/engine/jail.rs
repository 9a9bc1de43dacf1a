//! One jail's policy and its joiner: what a jail decides with, apart from the tally and the ledger that all share.

use std::sync::Arc;

use super::effect::JailId;
use super::filter::session::Joiner;
use super::ledger::Growth;
use super::time::Span;

/// The numbers a jail judges by.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// Failures that are one too many.
    pub maxretry: u32,
    /// The window they lie in, both edges included.
    pub findtime: Span,
    /// How long the ban lasts; `None` = forever.
    pub bantime: Option<Span>,
    /// Longer bans for those who come back.
    pub growth: Option<Growth>,
    /// IPv6 addresses are counted and banned by this prefix.
    pub ipv6_prefix: u8,
}

impl Default for Policy {
    /// The defaults of the configuration: 5 failures within 10 minutes, 1 hour.
    fn default() -> Self {
        Self {
            maxretry: 5,
            findtime: Span::from_seconds(600),
            bantime: Some(Span::from_seconds(3600)),
            growth: None,
            ipv6_prefix: 64,
        }
    }
}

/// A jail as the engine knows it.
#[derive(Debug)]
pub struct Jail {
    /// Its number.
    pub id: JailId,
    /// Its name.
    pub name: Arc<str>,
    /// What it judges by.
    pub policy: Policy,
    /// Joins the lines of its sessions.
    pub joiner: Joiner,
    /// Failures counted since start.
    pub failures: u64,
}
