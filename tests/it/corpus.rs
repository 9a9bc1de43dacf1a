//! The corpus of real logs with its list of who did what: nobody innocent may be banned, every attacker who left enough
//! lines must be. The corpus is not part of the project; `BAND_CORPUS` names it, or it lies beside the project.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use ipnet::IpNet;
use serde_json::Value;

/// What every jail has by default.
const MAXRETRY: u64 = 5;

/// Kinds of attempts in the corpus that one jail counts one by one, each by a line of its own.
const COUNTED: &[(&str, &str)] = &[
    ("password", "sshd"),
    ("kbdint", "sshd"),
    ("limit_req", "nginx-limit"),
    ("limit_conn", "nginx-limit"),
    ("denied", "nginx-forbidden"),
    ("basic-auth", "nginx-auth"),
    ("exploit-scan", "nginx-scan"),
    ("bad-request", "nginx-bad-request"),
    ("bad-digest", "asterisk"),
    ("unknown-endpoint", "asterisk"),
    ("acl", "asterisk"),
    ("ami-auth", "asterisk-ami"),
    ("iax-auth", "asterisk-iax"),
];

/// Kinds that leave fewer lines than attempts, or none that a normal filter may count, and why.
const NOT_COUNTED: &[(&str, &str)] = &[
    ("publickey", "all keys of a connection leave one line"),
    ("empty-password", "leaves only the line about the closed connection"),
    ("none-auth", "leaves only the line about the closed connection"),
    ("method-disabled", "leaves only the line about the closed connection"),
    ("user-change", "one connection"),
    ("grace-timeout", "leaves no line"),
    ("banner-grab", "no login was tried: mode ddos"),
    ("bad-protocol", "no login was tried: mode ddos"),
    ("preauth-close", "no login was tried: mode ddos"),
    ("connect-close", "no login was tried: mode ddos"),
    ("connect-reset", "no login was tried: mode ddos"),
    ("scanner-connection", "no login was tried, or a request as of anybody: mode ddos"),
    ("startup-flood", "one line for many connections: mode ddos"),
    ("kex", "no login was tried: mode extra"),
    ("request", "answered like anybody's"),
    ("login", "right"),
    ("no-credentials", "every browser's first request"),
    ("forbidden", "a 403 that no rule gave"),
    ("injection", "forged fields in requests that are otherwise ordinary"),
    ("method-probe", "some methods are common"),
    ("proxy-probe", "one request"),
    ("tls-error", "leaves no line at the level of the log"),
    ("timeout", "leaves no line"),
    ("challenge-ignored", "every phone does it once; a flood of them: mode aggressive"),
    ("forged-nonce", "answered with a new challenge"),
    ("stray-ack", "no answer is due"),
    ("stray-bye", "no answer is due"),
    ("config-error", "the machine's own fault"),
    ("malformed", "what no SIP stack understands: mode aggressive"),
    ("ari-auth", "leaves no line"),
    ("http-404", "leaves no line"),
    ("ws-error", "mode aggressive"),
    ("ami-acl", "several lines for one"),
    ("ami-noauth", "leaves no line"),
    ("ami-timeout", "leaves no line"),
    ("iax-acl", "leaves no line with a login"),
    ("missing-extension", "somebody who is known dialled wrong"),
    ("extension-scan", "calls of somebody who is known"),
    ("scan", "mostly packets that leave no line"),
];

/// In some files a counted kind leaves less: run, file (or any), kind and how many attempts are not told of.
const LESS: &[(&str, &str, &str, u64, &str)] = &[
    ("nginx-", "access", "limit_req", u64::MAX, "only the error log says why a request was refused"),
    ("nginx-", "access", "limit_conn", u64::MAX, "only the error log says why a request was refused"),
    ("nginx-", "access", "denied", u64::MAX, "only the error log says why a request was refused"),
    (
        "asterisk-small-authuser",
        "",
        "unknown-endpoint",
        4,
        "with auth_username the first four within 5 s leave no line",
    ),
];

/// The corpus, if it is there.
fn corpus() -> Option<PathBuf> {
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/corpus");
    let path = std::env::var_os("BAND_CORPUS").map_or_else(beside, PathBuf::from).join("reallogs");
    if path.is_dir() {
        return Some(path);
    }
    // Past the harness, which keeps what passing tests print.
    let _ = writeln!(
        std::io::stderr(),
        "\n*** NOT RUN: there is no corpus at {}; set BAND_CORPUS to its directory ***\n",
        path.display()
    );
    None
}

/// What a replay found.
struct Found {
    banned: Vec<IpNet>,
    counted: BTreeMap<IpAddr, u64>,
}

impl Found {
    fn bans(&self, address: IpAddr) -> bool {
        self.banned.iter().any(|net| net.contains(&address))
    }
}

fn replay(run: &Path, files: &[&str], jails: &[&str], timezone: &str) -> Found {
    let mut command = Command::new(env!("CARGO_BIN_EXE_banctl"));
    command.args(["replay", "--json", "--now", "2026-11-20T12:30:00Z", "--timezone", timezone]);
    command.args(jails.iter().flat_map(|jail| ["--jail", jail]));
    let output = command.args(files.iter().map(|file| run.join(file))).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut found = Found { banned: Vec::new(), counted: BTreeMap::new() };
    for line in output.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        let event: Value = serde_json::from_slice(line).unwrap();
        let address = event["address"].as_str().unwrap_or("");
        match event["event"].as_str() {
            Some("ban") => {
                let net = address.parse().unwrap_or_else(|_| IpNet::from(address.parse::<IpAddr>().unwrap()));
                found.banned.push(net);
            }
            Some("failure") => *found.counted.entry(address.parse().unwrap()).or_default() += 1,
            _ => {}
        }
    }
    found
}

/// Attempts of one kind that these files tell of.
fn told(run: &str, files: &[&str], kind: &str, attempts: u64) -> u64 {
    let fits = |(of, file, less, ..): &&(&str, &str, &str, u64, &str)| {
        run.starts_with(of) && *less == kind && files.iter().all(|name| name.starts_with(file))
    };
    attempts.saturating_sub(LESS.iter().find(fits).map_or(0, |less| less.3))
}

/// Must this attacker be banned by what stands in these files?
fn must_be_banned(run: &str, files: &[&str], source: &Value) -> bool {
    let mut by_jail: BTreeMap<&str, u64> = BTreeMap::new();
    for (kind, attempts) in source["by_kind"].as_object().unwrap() {
        match COUNTED.iter().find(|(counted, _)| counted == kind) {
            Some((_, jail)) => *by_jail.entry(jail).or_default() += told(run, files, kind, attempts.as_u64().unwrap()),
            None => assert!(NOT_COUNTED.iter().any(|(known, _)| known == kind), "kind {kind:?} is in neither table"),
        }
    }
    by_jail.values().any(|failures| *failures >= MAXRETRY)
}

/// Replays the files of a run and compares with the truth.
fn check(corpus: &Path, run: &str, files: &[&str], jails: &[&str], timezone: &str) {
    let truth: Value = serde_json::from_slice(&std::fs::read(corpus.join(run).join("truth.json")).unwrap()).unwrap();
    let found = replay(&corpus.join(run), files, jails, timezone);
    let (mut wrong, mut attackers) = (String::new(), 0);
    for source in truth["sources"].as_array().unwrap() {
        let address: IpAddr = source["addr"].as_str().unwrap().parse().unwrap();
        let (banned, counted) = (found.bans(address), found.counted.get(&address).copied().unwrap_or(0));
        let fault = match source["kind"].as_str().unwrap() {
            "legit" | "mistyper" => banned.then_some("innocent and banned"),
            "spoof-target" if source["forgery_level"] == "field" => {
                (banned || counted > 0).then_some("forged and believed")
            }
            "attacker" if must_be_banned(run, files, source) => {
                attackers += 1;
                (!banned).then_some("attacked and was not banned")
            }
            _ => None,
        };
        if let Some(fault) = fault {
            writeln!(wrong, "{address} {fault}: {counted} counted of {} {}", source["failures"], source["by_kind"])
                .unwrap();
        }
    }
    assert!(wrong.is_empty(), "{run} {files:?}:\n{wrong}");
    assert!(attackers >= 3, "{run} {files:?}: only {attackers} attackers were looked at");
}

#[test]
fn real_logs_of_sshd_ban_the_attackers_and_nobody_else() {
    let Some(corpus) = corpus() else { return };
    for run in ["sshd-small-info", "sshd-medium"] {
        for file in
            ["auth.log.traditional", "auth.log.rfc3339", "auth.log.rfc5424", "journal.short", "journal.short-iso"]
        {
            check(&corpus, run, &[file], &["sshd"], "UTC");
        }
    }
}

#[test]
fn real_logs_of_nginx_ban_the_attackers_and_nobody_else() {
    let Some(corpus) = corpus() else { return };
    let jails = ["nginx-auth", "nginx-limit", "nginx-scan", "nginx-bad-request", "nginx-forbidden"];
    for run in ["nginx-small", "nginx-medium"] {
        let several: [&[&str]; 4] =
            [&["access.log", "error.log"], &["access_iso.log"], &["access_vhost.log"], &["access.json"]];
        for files in several {
            check(&corpus, run, files, &jails, "UTC");
        }
    }
}

#[test]
fn real_logs_of_asterisk_ban_the_attackers_and_nobody_else() {
    let Some(corpus) = corpus() else { return };
    let jails = ["asterisk", "asterisk-ami", "asterisk-iax"];
    for (run, timezone) in [("asterisk-small-authuser", "Europe/Berlin"), ("asterisk-medium", "UTC")] {
        let several: [&[&str]; 5] =
            [&["combined"], &["messages", "security"], &["syslog.rfc3339"], &["messages.plain"], &["messages.json"]];
        for files in several {
            check(&corpus, run, files, &jails, timezone);
        }
    }
}
