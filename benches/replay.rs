//! How fast logs are gone through: `banctl replay` (full sshd filter, dates, sessions, windows, bans) beside `rg -c`
//! with three of the patterns, in turn, over the same 2 million lines. Ratios count, seconds are this machine's.
//!
//! `cargo bench --bench replay`; `BAND_BENCH_LOG=FILE` takes another log of sshd in syslog form.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a bench reports to people and may fail loudly"
)]

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

const LINES: u32 = 2_000_000;
const PAIRS: usize = 7;

fn main() {
    let directory = tempfile::tempdir().unwrap();
    let log = match std::env::var_os("BAND_BENCH_LOG") {
        Some(log) => PathBuf::from(log),
        None => {
            let log = directory.path().join("auth.log");
            write_log(&log);
            log
        }
    };
    let ours = |log: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_banctl"));
        command.args(["replay", "--jail", "sshd", "--timezone", "UTC", "--quiet", "--json"]).arg(log);
        command
    };
    let theirs = |log: &Path| {
        let mut command = Command::new("rg");
        command.args([
            "-c",
            "-e",
            "Failed password",
            "-e",
            "Invalid user",
            "-e",
            "Connection closed by authenticating user",
        ]);
        command.arg(log);
        command
    };
    println!("{}", String::from_utf8_lossy(&ours(&log).output().expect("banctl runs").stdout).trim());
    let has_rg = theirs(&log).output().is_ok();
    let (mut a, mut b) = (Vec::new(), Vec::new());
    for _ in 0..PAIRS {
        a.push(seconds(ours(&log)));
        if has_rg {
            b.push(seconds(theirs(&log)));
        }
    }
    let lines = std::fs::read(&log).unwrap().iter().filter(|byte| **byte == b'\n').count();
    println!(
        "banctl replay: median {:.3} s, {:.1} million lines a second",
        median(&a),
        lines as f64 / median(&a) / 1e6
    );
    if has_rg {
        let ratios: Vec<f64> = a.iter().zip(&b).map(|(a, b)| a / b).collect();
        println!(
            "rg -c: median {:.3} s; replay takes {:.2} times as long (median of {PAIRS} pairs; goal: at most 2)",
            median(&b),
            median(&ratios)
        );
    } else {
        println!("rg (package ripgrep) is not installed, so there is nothing to compare with");
    }
}

fn seconds(mut command: Command) -> f64 {
    let started = Instant::now();
    let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
    assert!(status.success(), "{command:?} failed");
    started.elapsed().as_secs_f64()
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// A server's log under attack: three of ten lines are attempts of 5,000 addresses, a part of them IPv6; the rest is
/// what a busy server writes.
fn write_log(path: &Path) {
    let mut out = BufWriter::new(std::fs::File::create(path).unwrap());
    let mut seed = 42u64;
    let mut next = |below: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % below
    };
    let attackers: Vec<String> = (0..5000)
        .map(|_| {
            let (a, b, c, d) = (1 + next(220), next(256), next(256), 1 + next(254));
            if next(5) == 0 {
                format!("2001:db8:{:x}:{:x}::{:x}", next(65536), next(65536), next(4096))
            } else {
                format!("{a}.{b}.{c}.{d}")
            }
        })
        .collect();
    let users = ["root", "admin", "test", "oracle", "ubuntu", "git", "postgres", "pi"];
    let start = jiff::Timestamp::now() - jiff::SignedDuration::from_secs(i64::from(LINES / 200));
    for number in 0..LINES {
        let at = start + jiff::SignedDuration::from_secs(i64::from(number / 200));
        let stamp = at.to_zoned(jiff::tz::TimeZone::UTC).strftime("%b %e %H:%M:%S").to_string();
        let (pid, port) = (1000 + next(60_000), 1024 + next(60_000));
        let (who, user) = (&attackers[next(5000) as usize], users[next(8) as usize]);
        let text = match next(100) {
            0..=11 => format!("Failed password for invalid user {user} from {who} port {port} ssh2"),
            12..=20 => format!("Failed password for {user} from {who} port {port} ssh2"),
            21..=26 => format!("Invalid user {user} from {who} port {port}"),
            27..=29 => format!("Connection closed by authenticating user {user} {who} port {port} [preauth]"),
            30..=43 => format!(
                "Accepted publickey for deploy from 192.0.2.{} port {port} ssh2: ED25519 SHA256:0123456789012345678901234567890123456789012",
                next(200)
            ),
            44..=57 => "pam_unix(sshd:session): session opened for user deploy(uid=1001) by (uid=0)".to_owned(),
            58..=71 => format!("Received disconnect from 192.0.2.{} port {port}:11: disconnected by user", next(200)),
            _ => String::new(),
        };
        match text.as_str() {
            "" => writeln!(
                out,
                "{stamp} srv CRON[{pid}]: pam_unix(cron:session): session opened for user root(uid=0) by (uid=0)"
            )
            .unwrap(),
            text => writeln!(out, "{stamp} srv sshd[{pid}]: {text}").unwrap(),
        }
    }
}
