//! Where bans are put into force: effects come in, the kernel (and later other places) holds them.

pub mod nftables;
pub mod outbox;
