//! The pure room: no clock, no file, no socket. Failures come in with their moment, effects go out as values.

pub mod address;
pub mod allowlist;
pub mod core;
pub mod effect;
pub mod filter;
pub mod jail;
pub mod ledger;
pub mod tally;
pub mod time;
pub mod tree;
