//! band watches the logs of servers and phone systems and shuts attackers out in the kernel.
//!
//! The modules in reading order; each one's first line says what comes in and what goes out.

pub mod enforce;
pub mod engine;
pub mod logs;
