//! `banctl`: words come in, answers go out on stdout, what went wrong on stderr; the exit code says which.

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

pub mod commands;
pub mod filters;
pub mod replay;
pub mod show;

/// Done.
pub const OK: u8 = 0;
/// Not done; stderr says why and what to do.
pub const FAILED: u8 = 1;
/// The words are wrong.
pub const USAGE: u8 = 2;
/// The daemon is not there.
pub const UNAVAILABLE: u8 = 69;
/// The configuration is wrong.
pub const CONFIG: u8 = 78;

/// Why a command was not done.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub code: u8,
    /// What to say on stderr; empty when it has been said.
    pub message: String,
}

impl Failure {
    /// A failure with exit code 1.
    pub fn new(message: impl Into<String>) -> Self {
        Self { code: FAILED, message: message.into() }
    }

    /// A failure with an exit code of its own.
    pub fn with_code(code: u8, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        // Nobody reads any more (`banctl list | head`): that is no failure to speak of.
        let message = if error.kind() == io::ErrorKind::BrokenPipe { String::new() } else { error.to_string() };
        Self { code: FAILED, message }
    }
}

/// What a command gives back.
pub type Outcome = Result<(), Failure>;

#[derive(Parser, Debug)]
#[command(name = "banctl", version, about = "Talks to band: who is shut out, why, and how to let them in again")]
struct Words {
    /// The daemon's socket.
    #[arg(long, global = true, env = "BAND_SOCKET", default_value = crate::control::DEFAULT_SOCKET)]
    socket: PathBuf,
    /// One JSON value on stdout, nothing else.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Is this machine protected? Jails, logs, the kernel, latencies.
    Status,
    /// Bans in force.
    List(commands::ListWords),
    /// Ban by hand; answers after the kernel confirmed.
    Ban(commands::BanWords),
    /// Let in again, and forget the failures.
    Unban(commands::UnbanWords),
    /// The evidence against an address.
    Why(commands::WhyWords),
    /// The allowlist, live.
    #[command(subcommand)]
    Allow(commands::AllowWords),
    /// Read the configuration anew; the old one stays in force if anything is wrong.
    Reload,
    /// Failures, bans and unbans as they happen.
    Watch,
    /// The rules band has in the kernel, as nft text.
    Rules,
    /// Jails as they are configured and run.
    #[command(subcommand)]
    Jail(commands::JailWords),
    /// What the engine would have done with these logs; touches nothing.
    Replay(replay::ReplayWords),
    /// Filters: list, show, check, and try on lines.
    #[command(subcommand)]
    Filter(filters::FilterWords),
    /// The configuration, without the daemon.
    #[command(subcommand)]
    Config(commands::ConfigWords),
    /// Files made from the same source as the program.
    #[command(subcommand)]
    Generate(commands::GenerateWords),
}

/// Runs `banctl` with the words of the command line.
pub fn run() -> ExitCode {
    let words = match Words::try_parse() {
        Ok(words) => words,
        Err(error) => {
            let asked =
                matches!(error.kind(), clap::error::ErrorKind::DisplayHelp | clap::error::ErrorKind::DisplayVersion);
            // A broken pipe here has nobody left to tell.
            let _ = error.print();
            return ExitCode::from(if asked { OK } else { USAGE });
        }
    };
    let mut out = io::BufWriter::new(io::stdout().lock());
    let result = dispatch(words, &mut out).and_then(|()| out.flush().map_err(Failure::from));
    match result {
        Ok(()) => ExitCode::from(OK),
        Err(failure) => {
            let _ = out.flush();
            if !failure.message.is_empty() {
                let _ = writeln!(io::stderr(), "banctl: {}", failure.message);
            }
            ExitCode::from(failure.code)
        }
    }
}

fn dispatch(words: Words, out: &mut dyn Write) -> Outcome {
    let daemon = commands::Daemon { socket: words.socket, json: words.json };
    match words.command {
        Command::Status => daemon.status(out),
        Command::List(list) => daemon.list(&list, out),
        Command::Ban(ban) => daemon.ban(&ban, out),
        Command::Unban(unban) => daemon.unban(&unban, out),
        Command::Why(why) => daemon.why(&why, out),
        Command::Allow(allow) => daemon.allow(&allow, out),
        Command::Reload => daemon.reload(out),
        Command::Watch => daemon.watch(out),
        Command::Rules => daemon.rules(out),
        Command::Jail(jail) => daemon.jail(&jail, out),
        Command::Replay(replay) => replay::run(&replay, words.json, out),
        Command::Filter(filter) => filters::run(&filter, words.json, out),
        Command::Config(config) => commands::config(&config, words.json, out),
        Command::Generate(generate) => commands::generate(&generate, out),
    }
}

/// The words as clap knows them, for the manual and completions.
pub fn words() -> clap::Command {
    <Words as clap::CommandFactory>::command()
}

/// Colour and moving lines are for people at a terminal only.
pub fn stderr_is_for_people() -> bool {
    io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none()
}
