//! `banctl replay` and `banctl filter`: what would have been, without a daemon and without touching anything.

use std::io::Write;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::house::{House, Said};

const TIMES: &str = "--now 2026-06-22T00:00:00Z --timezone UTC";

/// Wrong passwords at these seconds of one minute.
fn lines(address: &str, seconds: &[u32]) -> String {
    let line = |second| {
        format!("Jun 21 16:47:{second:02} h sshd[{second}]: Failed password for root from {address} port 22 ssh2\n")
    };
    seconds.iter().map(line).collect()
}

fn house() -> House {
    let house = House::furnished("[jails.sshd]\nlogs = [\"{dir}/log/*.log\"]\n");
    house.append("log/a.log", &lines("192.0.2.1", &[1, 3, 5, 7, 9]));
    house.append("log/b.log", &lines("192.0.2.2", &[2, 4, 6, 8, 10, 11]));
    house
}

fn events(said: &Said) -> Vec<Value> {
    said.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn files_are_judged_by_their_own_time_in_the_order_of_their_lines() {
    let house = house();
    let said = house.must(&format!("replay --json --jail sshd {TIMES} {{dir}}/log/a.log {{dir}}/log/b.log"));
    let events = events(&said);
    let short: Vec<String> = events
        .iter()
        .filter(|event| event["event"] != "summary")
        .map(|event| {
            let text = |key: &str| event[key].as_str().unwrap_or("-").to_owned();
            format!("{} {} {}", &text("event"), text("address"), &text("at")[17..])
        })
        .collect();
    let mut expect: Vec<String> = Vec::new();
    for second in 1..=11 {
        let address = if second % 2 == 1 && second < 11 { "192.0.2.1" } else { "192.0.2.2" };
        expect.push(format!("failure {address} {second:02}Z"));
        if second == 9 || second == 10 {
            expect.push(format!("ban {address} {second:02}Z"));
        }
    }
    assert_eq!(short, expect);
    let failure = json!({"event": "failure", "jail": "sshd", "address": "192.0.2.2", "user": "root",
        "at": "2026-06-21T16:47:02Z", "file": "b.log", "line": 1});
    assert_eq!(events[1], failure);
    let ban = &events[9];
    assert_eq!([&ban["until"], &ban["failures"]], [&json!("2026-06-21T17:47:09Z"), &json!(5)], "{ban}");
    let summary = events.last().unwrap();
    assert_eq!(
        [&summary["lines"], &summary["failures"], &summary["bans"], &summary["undated"]],
        [&json!(11), &json!(11), &json!(2), &json!(0)]
    );
    assert!(summary["seconds"].is_f64() && summary["bytes"].as_u64() > Some(0), "{summary}");
}

#[test]
fn a_ban_ends_in_a_replay_too() {
    let house = house();
    house.append("log/a.log", "Jun 21 19:00:00 h sshd[1]: Failed password for root from 203.0.113.9 port 22 ssh2\n");
    let said = house.must(&format!("replay --json --jail sshd {TIMES} {{dir}}/log/a.log"));
    let unban = events(&said).into_iter().find(|event| event["event"] == "unban").expect("an unban");
    assert_eq!([&unban["address"], &unban["at"]], [&json!("192.0.2.1"), &json!("2026-06-21T17:47:09Z")], "{unban}");
}

#[test]
fn people_get_a_table_and_the_quiet_only_the_sum() {
    let house = house();
    let said = house.must(&format!("replay --jail sshd {TIMES} {{dir}}/log/a.log"));
    assert!(said.out.contains("192.0.2.1  sshd  5         2026-06-21 16:47:09"), "{}", said.out);
    assert!(said.out.contains("5 lines (") && said.err.is_empty(), "{said:?}");
    let quiet = house.must(&format!("replay --quiet --jail sshd {TIMES} {{dir}}/log/a.log"));
    assert_eq!(quiet.out.lines().count(), 1, "{quiet:?}");
    let quiet = house.must(&format!("replay --quiet --json --jail sshd {TIMES} {{dir}}/log/a.log"));
    assert_eq!([&quiet.json()["event"], &quiet.json()["bans"]], [&json!("summary"), &json!(1)]);
}

#[test]
fn files_go_to_the_jails_that_name_them_and_others_are_refused_with_a_remedy() {
    let house = house();
    let config = "--config {dir}/band.toml";
    let said = house.must(&format!("replay --quiet --json {config} {TIMES} {{dir}}/log/a.log {{dir}}/log/b.log"));
    assert_eq!(said.json()["bans"], 2);
    house.append("stray.txt", &lines("192.0.2.3", &[1]));
    house.refused(&format!("replay {config} {{dir}}/stray.txt"), 2, &["stray.txt", "--jail", "--filter", "sshd"]);
    let said = house.must(&format!("replay --quiet --json {config} {TIMES} --filter sshd {{dir}}/stray.txt"));
    assert_eq!(said.json()["failures"], 1);
    house.refused("replay --jail nope {dir}/log/a.log", 2, &["there is no jail \"nope\""]);
    house.refused("replay --jail sshd {dir}/log/none.log", 1, &["none.log", "does not exist"]);
    house.refused("replay --jail sshd {dir}/log", 1, &["is a directory"]);
    assert_eq!(house.banctl("replay").code, 2);
    assert_eq!(house.banctl("replay --jail sshd --now yesterday {dir}/log/a.log").code, 2);
    house.configure("[jails.sshd]\nmaxrety = 1\n");
    house.refused(&format!("replay {config} {{dir}}/log/a.log"), 78, &["maxrety"]);
}

#[test]
fn what_comes_through_a_pipe_is_read_as_well() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_banctl"));
    command.args("replay --quiet --json --jail sshd -".split(' ')).args(TIMES.split(' '));
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(lines("192.0.2.1", &[1, 2, 3, 4, 5]).as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((output.status.code(), &summary["bans"]), (Some(0), &json!(1)));
}

#[test]
fn filters_are_listed_shown_and_checked() {
    let house = House::furnished("");
    let config = "--config {dir}/band.toml";
    let list = house.must(&format!("filter list --json {config}")).json();
    let names: Vec<&str> = list.as_array().unwrap().iter().map(|filter| filter["name"].as_str().unwrap()).collect();
    for name in ["sshd", "asterisk", "asterisk-ami", "asterisk-iax", "nginx-auth", "nginx-scan", "dropbear"] {
        assert!(names.contains(&name), "{names:?}");
    }
    assert!(house.must(&format!("filter list {config}")).out.lines().count() > names.len());
    assert!(house.must(&format!("filter show sshd {config}")).out.contains("[[sample]]"));
    let checked = house.must(&format!("filter check --json {config}")).json();
    let right = |filter: &Value| filter["ok"] == true && filter["samples"].as_u64() > Some(0);
    assert!(checked.as_array().unwrap().iter().all(right), "{checked}");
    house.refused(&format!("filter show shd {config}"), 78, &["did you mean \"sshd\"?"]);
    house.append("mine.toml", "description = \"m\"\nprefix = \"none\"\nfailregex = ['^x <HOST>$']\n");
    house.refused("filter check {dir}/mine.toml", 78, &["mine.toml:1: the filter has no [[sample]]"]);
    let said = house.banctl("filter check {dir}/mine.toml --json");
    assert_eq!((said.code, &said.json()[0]["ok"], said.err.as_str()), (78, &json!(false), ""));
}

#[test]
fn a_filter_explains_itself_line_by_line() {
    let house = House::furnished("");
    house.append("lines", &lines("192.0.2.1", &[1]));
    house.append(
        "lines",
        "Jun 21 16:47:02 h sshd[2]: Accepted password for root from 192.0.2.1 port 22 ssh2\nnonsense\n",
    );
    let said = house.must(&format!("filter test sshd --json {TIMES} {{dir}}/lines"));
    let answers = events(&said);
    let expect = json!({"line": 1, "match": true, "address": "192.0.2.1", "user": "root", "at": "2026-06-21T16:47:01Z",
        "pattern": "failregex[0]"});
    assert_eq!(answers[0], expect);
    for (number, answer) in answers.iter().enumerate().skip(1) {
        assert_eq!([&answer["line"], &answer["match"]], [&json!(number + 1), &json!(false)], "{answer}");
    }
    assert_eq!(answers.len(), 3);
    let text = house.must(&format!("filter test sshd {TIMES} {{dir}}/lines")).out;
    for part in ["1: FAILURE of 192.0.2.1 by failregex[0]", "a login that succeeded", "3 lines, 1 failures"] {
        assert!(text.contains(part), "{text}");
    }
    house.refused("filter test nope {dir}/lines", 78, &["there is no filter \"nope\""]);
    house.refused("filter test sshd {dir}/none", 1, &["none"]);
    house.refused("filter test sshd --mode brutal {dir}/lines", 78, &["no mode \"brutal\""]);
}
