//! The integration tests: the real kernel, each test in a network namespace of its own.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests may fail loudly")]
#![allow(missing_docs, reason = "nobody imports a test")]

mod banctl;
mod control;
mod corpus;
mod daemon;
mod house;
mod netns;
mod nftables;
mod packets;
mod reload;
mod repair;
mod replay;
mod restart;
mod ssh;
mod tidy;
mod wrong;
