//! The control socket: requests come in from `banctl`, answers go out. What they mean is decided by the daemon.

pub mod client;
pub mod protocol;
pub mod server;

/// Where the daemon listens, if nobody says otherwise.
pub const DEFAULT_SOCKET: &str = "/run/band/band.sock";
