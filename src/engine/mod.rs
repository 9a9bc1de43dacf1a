//! The pure room: no clock, no file, no socket. Failures come in with their moment, effects go out as values.

pub mod address;
pub mod time;
