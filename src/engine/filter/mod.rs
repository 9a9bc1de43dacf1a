//! Filters: lines come in, failures (whose, when, in which session) go out. Reading files and counting are done elsewhere.

pub mod definition;
pub mod matcher;
pub mod prefix;
pub mod proof;
pub mod session;
pub mod stamp;
pub mod template;
