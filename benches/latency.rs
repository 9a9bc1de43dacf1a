//! From `write(2)` of the deciding line to the kernel holding the element, with the real daemon in a network namespace
//! of its own: single bans one after the other, then 2,000 and 100,000 attackers whose deciding lines come at once.
//!
//! `cargo bench --bench latency`. Nothing outside the namespace and a temporary directory is touched.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a bench reports to people and may fail loudly"
)]

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use band::control::client::Client;
use band::control::protocol::Request;
use band::enforce::nftables::Monitor;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

const MARK: &str = "BAND_BENCH_INSIDE";
const SINGLE: u32 = 1000;
const FAILURES: u32 = 5;
const PATIENCE: Duration = Duration::from_secs(60);

fn main() {
    if std::env::var_os(MARK).is_none() {
        let root = rustix::process::getuid().is_root();
        let words: &[&str] = if root { &["-n"] } else { &["-Urn"] };
        let status = Command::new("unshare")
            .args(words)
            .arg(std::env::current_exe().unwrap())
            .env(MARK, "1")
            .status()
            .expect("unshare (package util-linux) makes the namespace");
        std::process::exit(status.code().unwrap_or(1));
    }
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("auth.log");
    let file = OpenOptions::new().create(true).append(true).open(&log).unwrap();
    let mut band = Daemon::start(directory.path(), &log);
    singles(&file, &mut band);
    for attackers in [2_000, 100_000] {
        together(&file, &mut band, attackers);
    }
    println!("band's own account: {}", band.ask(&Request::Status)["latency_us"]["line_to_kernel"]);
}

struct Daemon {
    child: Child,
    client: Client,
}

impl Daemon {
    fn start(directory: &Path, log: &Path) -> Self {
        let socket = directory.join("band.sock");
        let config = directory.join("band.toml");
        let shown = directory.display();
        std::fs::write(
            &config,
            format!(
                "[paths]\nstate = \"{shown}/state\"\nsocket = \"{}\"\nfilters = \"{shown}/filters\"\n\
                 [defaults]\nmaxretry = {FAILURES}\nbantime = \"1h\"\n[jails.sshd]\nlogs = [\"{}\"]\n",
                socket.display(),
                log.display()
            ),
        )
        .unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_band"))
            .args(["--log", "error", "--config"])
            .arg(&config)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let started = Instant::now();
        let client = loop {
            match Client::connect(&socket) {
                Ok(client) => break client,
                Err(error) => assert!(started.elapsed() < PATIENCE, "band does not start: {error}"),
            }
            pause(10);
        };
        let mut daemon = Self { child, client };
        daemon.ask(&Request::Status);
        daemon
    }

    fn ask(&mut self, request: &Request) -> serde_json::Value {
        let reply = self.client.ask(request).unwrap();
        assert!(reply.ok, "{}", reply.message);
        reply.data
    }

    /// Waits until band has read so many lines.
    fn has_read(&mut self, lines: u64) {
        let started = Instant::now();
        loop {
            let status = self.ask(&Request::Status);
            let jail = status["jails"].as_array().unwrap().iter().find(|jail| jail["name"] == "sshd").unwrap();
            if jail["logs"][0]["lines"].as_u64().unwrap() >= lines {
                return;
            }
            assert!(started.elapsed() < PATIENCE, "band does not read: {status}");
            pause(2);
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits without anything to wait for; only used between looks.
fn pause(millis: i64) {
    let _ = poll(&mut [], Some(&Timespec { tv_sec: 0, tv_nsec: millis * 1_000_000 }));
}

fn line(address: Ipv4Addr, port: u32) -> String {
    let stamp = jiff::Zoned::now().strftime("%b %e %H:%M:%S");
    format!(
        "{stamp} srv sshd[{}]: Failed password for root from {address} port {} ssh2\n",
        port % 60_000 + 1,
        port % 60_000 + 1
    )
}

fn address(base: u32, number: u32) -> Ipv4Addr {
    Ipv4Addr::from(base + number)
}

static LINES: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);

fn write(mut file: &File, text: &str) {
    file.write_all(text.as_bytes()).unwrap();
    let lines = text.bytes().filter(|byte| *byte == b'\n').count() as u64;
    LINES.fetch_add(lines, std::sync::atomic::Ordering::Relaxed);
}

fn written() -> u64 {
    LINES.load(std::sync::atomic::Ordering::Relaxed)
}

fn singles(file: &File, band: &mut Daemon) {
    let mut monitor = Monitor::open().unwrap();
    let base = 0x1400_0000;
    let mut micros = Vec::with_capacity(SINGLE as usize);
    for number in 0..SINGLE {
        let attacker = address(base, number);
        let before: String = (1..FAILURES).map(|port| line(attacker, number * 10 + port)).collect();
        write(file, &before);
        band.has_read(written());
        while monitor.next().is_some() {}
        let deciding = line(attacker, number * 10 + FAILURES);
        let started = Instant::now();
        write(file, &deciding);
        loop {
            let mut descriptors = [PollFd::from_borrowed_fd(monitor.as_fd(), PollFlags::IN)];
            poll(&mut descriptors, Some(&Timespec { tv_sec: 5, tv_nsec: 0 })).unwrap();
            if monitor.next().is_some() {
                break;
            }
            assert!(started.elapsed() < PATIENCE, "no ban of {attacker}");
        }
        micros.push(started.elapsed().as_secs_f64() * 1e6);
        let held = kernel_holds(attacker);
        assert!(held, "the kernel does not hold {attacker}");
    }
    micros.sort_by(f64::total_cmp);
    let at = |share: f64| micros[((micros.len() - 1) as f64 * share) as usize];
    println!(
        "line written -> kernel holds it, {SINGLE} single bans: p50 {:.0} us, p99 {:.0} us, max {:.0} us (goal: 200 / 2000)",
        at(0.5),
        at(0.99),
        at(1.0)
    );
}

/// Asks the kernel itself, not band.
fn kernel_holds(attacker: Ipv4Addr) -> bool {
    let element = format!("{{ {attacker} }}");
    Command::new("nft")
        .args(["get", "element", "inet", "band", "all-v4", &element])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

fn together(file: &File, band: &mut Daemon, attackers: u32) {
    let base = 0x2000_0000 + attackers * 16;
    let mut before = String::new();
    for round in 1..FAILURES {
        for number in 0..attackers {
            before.push_str(&line(address(base, number), number * 7 + round));
        }
    }
    write(file, &before);
    band.has_read(written());
    let already = band.ask(&Request::Status)["enforcers"][0]["held"].as_u64().unwrap();
    let deciding: String = (0..attackers).map(|number| line(address(base, number), number)).collect();
    let started = Instant::now();
    write(file, &deciding);
    let wanted = already + u64::from(attackers);
    let elapsed = loop {
        let status = band.ask(&Request::Status);
        let enforcer = &status["enforcers"][0];
        let (held, pending) = (enforcer["held"].as_u64().unwrap(), enforcer["pending"].as_u64().unwrap());
        if held >= wanted && pending == 0 {
            break started.elapsed();
        }
        assert!(started.elapsed() < PATIENCE, "only {held} of {wanted} are held: {enforcer}");
        pause(5);
    };
    let goal = if attackers > 10_000 { 1000 } else { 50 };
    println!(
        "{attackers} attackers at once, all in the kernel after {:.1} ms (goal: {goal})",
        elapsed.as_secs_f64() * 1e3
    );
    for number in [0, attackers / 2, attackers - 1] {
        assert!(kernel_holds(address(base, number)), "{} is missing", address(base, number));
    }
}
