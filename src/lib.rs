//! band watches the logs of servers and phone systems and shuts attackers out in the kernel.
//!
//! The modules in reading order; each one's first line says what comes in and what goes out.

pub mod engine;

pub mod logs;

pub mod enforce;

pub mod store;

pub mod control;

pub mod config;

pub mod replay;

pub mod cli;

pub mod daemon;
