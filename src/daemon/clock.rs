//! The only place that asks for the time of day; everything else gets it as an argument.

use std::time::SystemTime;

use crate::engine::time::Timestamp;

/// Now.
pub fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timestamp(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

/// How long to sleep until `at`, for poll: rounded up, so that the moment has come when it wakes.
pub fn until(at: Option<Timestamp>) -> Option<rustix::event::Timespec> {
    let wait = (at?.0.saturating_sub(now().0)).clamp(0, 86_400_000);
    Some(rustix::event::Timespec { tv_sec: wait / 1000, tv_nsec: (wait % 1000) * 1_000_000 })
}
