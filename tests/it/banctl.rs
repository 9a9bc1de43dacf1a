//! `banctl` against a running daemon: what it does, what it refuses, its exit codes, and the JSON that scripts hold on to.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::daemon::SSHD;
use crate::house::{House, Running, SOON, kernel, kernel_bans};
use crate::netns::{private, readable, run, wait_until};

#[track_caller]
fn has_keys(value: &Value, keys: &str) {
    for key in keys.split(' ') {
        assert!(value.get(key).is_some(), "no {key} in {value}");
    }
}

#[test]
fn json_has_the_keys_scripts_rely_on() {
    private(|| {
        let house = House::new(SSHD);
        house.fail("log/auth.log", "198.51.100.7", 5);
        house.wait_banned("198.51.100.7");
        let status = house.must("status --json").json();
        has_keys(&status, "version uptime_s jails enforcers latency_us memory protected reasons");
        let jail = house.jail("sshd");
        has_keys(&jail, "name enabled failures bans logs");
        has_keys(&jail["logs"][0], "path state offset lines failures last_line");
        assert_eq!(
            [&jail["enabled"], &jail["failures"], &jail["bans"], &jail["logs"][0]["lines"]],
            [&json!(true), &json!(5), &json!(1), &json!(5)]
        );
        let enforcer = &status["enforcers"][0];
        assert_eq!(
            [&enforcer["name"], &enforcer["state"], &enforcer["pending"], &enforcer["error"]],
            [&json!("nftables"), &json!("ok"), &json!(0), &Value::Null]
        );
        has_keys(&status["latency_us"]["line_to_kernel"], "count p50 p99 max");
        has_keys(&status["memory"], "rss_bytes tracked_addresses");
        has_keys(&house.list("")[0], "address jail since until failures count origin reason");
        let why = house.must("why 198.51.100.7 --json").json();
        has_keys(&why, "address bans allowed evidence windows");
        has_keys(&why["evidence"][0], "at jail file pattern line");
        let allowed = house.must("allow list --json").json();
        has_keys(&allowed[0], "network from until note");
        let jails = house.must("jail list --json").json();
        has_keys(&jails[0], "name enabled filter maxretry findtime bantime ipv6_prefix ports action logs");
        assert_eq!(jails.as_array().unwrap().len(), 11, "the built-in ones");
        assert_eq!(house.must("jail show sshd --json").json()[0]["name"], "sshd");
    });
}

#[test]
fn tables_fit_80_columns_and_have_no_colour_in_a_pipe() {
    private(|| {
        let house = House::new(SSHD);
        house.must("ban 203.0.113.0/24 --reason tested");
        for words in ["list", "allow list", "jail list", "filter check"] {
            let said = house.must(words);
            assert!(!said.out.contains('\u{1b}'), "{said:?}");
            let longest = said.out.lines().map(|line| line.chars().count()).max();
            assert!(longest <= Some(80), "banctl {words}: {}", said.out);
        }
        assert!(house.must("status").out.starts_with("NOT PROTECTED\n"), "there is no log yet");
    });
}

#[test]
fn a_ban_by_hand_is_in_the_kernel_before_the_answer() {
    private(|| {
        let house = House::new(SSHD);
        let said = house.must("ban 198.51.100.7 203.0.113.0/24 2001:db8::7 2001:db8:1::/64");
        assert_eq!(said.out, "banned 198.51.100.7, 203.0.113.0/24, 2001:db8::7, 2001:db8:1::/64\n");
        let held = kernel();
        for (set, element) in [
            ("all-v4", "198.51.100.7"),
            ("all-v4-24", "203.0.113.0"),
            ("all-v6", "2001:db8::7"),
            ("all-v6-64", "2001:db8:1::"),
        ] {
            assert!(held.contains(&(set.to_owned(), element.to_owned())), "{element} is not in {held:?}");
        }
        assert_eq!(house.must("unban 198.51.100.7").out, "let in again: 198.51.100.7\n");
        assert!(!kernel_bans("198.51.100.7"));
        assert_eq!(house.must("unban --all").code, 0);
        assert!(house.banned().is_empty() && !kernel().iter().any(|(set, _)| set.starts_with("all-")));
    });
}

#[test]
fn jail_span_and_reason_are_kept() {
    private(|| {
        let house = House::new(&format!("{SSHD}bantime = \"2h\"\n"));
        house.must("ban 198.51.100.1");
        house.must("ban 198.51.100.2 --jail sshd --reason abuse-desk");
        house.must("ban 198.51.100.3 --for 1h30m");
        house.must("ban 198.51.100.4 --for forever");
        let list = house.list("");
        let seconds = |ban: &Value| {
            let moment = |key: &str| ban[key].as_str().unwrap().parse::<jiff::Timestamp>().unwrap();
            (moment("until") - moment("since")).total(jiff::Unit::Second).unwrap()
        };
        let find = |n: usize| list.iter().find(|ban| ban["address"] == format!("198.51.100.{n}")).unwrap();
        assert_eq!((&find(1)["jail"], seconds(find(1))), (&json!("manual"), 3600.0));
        assert_eq!((&find(2)["jail"], seconds(find(2))), (&json!("sshd"), 7200.0));
        assert_eq!((&find(2)["reason"], &find(2)["origin"]), (&json!("abuse-desk"), &json!("manual")));
        assert_eq!(seconds(find(3)), 5400.0);
        assert_eq!(find(4)["until"], Value::Null);
    });
}

#[test]
fn what_must_not_be_banned_is_refused_with_a_sentence() {
    private(|| {
        run("ip", "address add 203.0.113.9/24 dev lo");
        let house = House::new(&format!("[allow]\nnetworks = [\"192.0.2.0/24\"]\n{SSHD}"));
        for (net, part) in [
            ("203.0.113.9", "this machine itself"),
            ("203.0.113.0/24", "this machine itself (203.0.113.9, own address)"),
            ("127.0.0.1", "loopback"),
            ("::1", "loopback"),
            ("0.0.0.0/0", "this machine itself"),
            ("::/0", "this machine itself"),
            ("192.0.2.7", "192.0.2.0/24 is on the allowlist ([allow] in the configuration)"),
            ("1.2.3.4:5060", "has a port; leave out \":5060\""),
            ("[2001:db8::1]:22", "has a port; leave out \":22\""),
            ("fe80::1%eth0", "leave out \"%eth0\""),
            ("10.0.0.1/8", "did you mean 10.0.0.0/8?"),
            ("10.0.0.0/33", "no valid prefix length"),
            ("example.org", "host names are never resolved"),
            ("1.2.3", "is not an IPv4 or IPv6 address"),
            ("1.2.3.04", "is not an IPv4 or IPv6 address"),
        ] {
            house.refused(&format!("ban {net}"), 1, &[part]);
        }
        assert_eq!(house.banned(), [""; 0]);
        assert!(!kernel().iter().any(|(set, _)| set.starts_with("all-")));
    });
}

#[test]
fn one_wrong_address_in_a_list_bans_nobody_and_one_refused_spares_itself_alone() {
    private(|| {
        let house = House::new(SSHD);
        house.refused("ban 198.51.100.1 nonsense 198.51.100.2", 1, &["nonsense"]);
        assert_eq!(house.banned(), [""; 0]);
        house.refused("ban 198.51.100.1 127.0.0.1 198.51.100.2", 1, &["127.0.0.1 was not banned"]);
        assert_eq!(house.banned(), ["198.51.100.1", "198.51.100.2"]);
        assert!(kernel_bans("198.51.100.1") && kernel_bans("198.51.100.2"));
    });
}

#[test]
fn addresses_are_taken_as_people_write_them() {
    private(|| {
        let house = House::new(SSHD);
        house.must(
            "ban [2001:db8::1] ::ffff:192.0.2.9 2001:DB8:0:0::2 198.51.100.0/255.255.255.0 ::ffff:203.0.113.0/120",
        );
        let expect = ["192.0.2.9", "198.51.100.0/24", "2001:db8::1", "2001:db8::2", "203.0.113.0/24"];
        assert_eq!(house.banned(), expect);
        house.must("unban ::ffff:192.0.2.9 [2001:db8::1]");
        assert_eq!(house.banned(), &["198.51.100.0/24", "2001:db8::2", "203.0.113.0/24"]);
    });
}

#[test]
fn every_failure_has_its_exit_code() {
    private(|| {
        let house = House::new(SSHD);
        house.refused("unban 198.51.100.99", 1, &["198.51.100.99 is not banned"]);
        house.refused("ban 198.51.100.1 --for never", 1, &["is not a duration"]);
        house.refused("ban 198.51.100.1 --for 0", 1, &["longer than nothing"]);
        house.refused("ban 198.51.100.1 --jail ssh", 1, &["there is no jail \"ssh\"", "sshd"]);
        house.refused("list --jail ssh", 1, &["there is no jail"]);
        house.refused("list nonsense", 1, &["is not an IPv4"]);
        house.refused("why nonsense", 1, &["is not an IPv4"]);
        house.refused("allow remove 198.51.100.1", 1, &["is not on the allowlist"]);
        house.refused("allow remove 127.0.0.0/8", 1, &["stays allowed"]);
        house.refused("allow add 198.51.100.1 --for soon", 1, &["is not a duration"]);
        house.refused("jail show nope", 1, &["there is no jail \"nope\""]);
        for usage in ["", "explode", "ban", "unban", "unban --all 198.51.100.1", "list --frob", "allow", "why"] {
            let said = house.banctl(usage);
            assert_eq!((said.code, said.out.as_str()), (2, ""), "banctl {usage}: {said:?}");
        }
        for asked in ["--help", "--version", "help ban"] {
            let said = house.banctl(asked);
            assert!(said.code == 0 && !said.out.is_empty() && said.err.is_empty(), "{said:?}");
        }
        house.refused("status --socket {dir}/nobody", 69, &["nobody", "band is not running"]);
        house.refused("config check {dir}/nowhere.toml", 78, &["nowhere.toml: does not exist"]);
        assert_eq!(house.banned(), [""; 0]);
    });
}

#[test]
fn a_list_can_be_narrowed_and_an_unban_can_name_a_network_or_a_jail() {
    private(|| {
        let house = House::new(SSHD);
        house.must("ban 198.51.100.1 198.51.100.2 203.0.113.0/24 2001:db8::1");
        house.must("ban 198.51.100.1 192.0.2.5 --jail sshd");
        let names = |words: &str| {
            let mut names: Vec<String> =
                house.list(words).iter().map(|ban| ban["address"].as_str().unwrap().to_owned()).collect();
            names.sort();
            names
        };
        assert_eq!(names("--jail sshd"), ["192.0.2.5", "198.51.100.1"]);
        assert_eq!(names("198.51.100.0/24"), ["198.51.100.1", "198.51.100.1", "198.51.100.2"]);
        assert_eq!(names("203.0.113.77"), ["203.0.113.0/24"]);
        assert_eq!(names("--jail manual 198.51.100.0/24"), ["198.51.100.1", "198.51.100.2"]);
        house.must("unban 198.51.100.1 --jail sshd");
        assert!(kernel_bans("198.51.100.1"), "the other jail still wants it");
        house.must("unban 198.51.100.0/24");
        assert!(!kernel_bans("198.51.100.1") && !kernel_bans("198.51.100.2"));
        house.must("unban 203.0.113.77");
        assert_eq!(names(""), ["192.0.2.5", "2001:db8::1"]);
        house.must("unban --all --jail manual");
        assert_eq!(names(""), ["192.0.2.5"]);
    });
}

#[test]
fn an_unban_forgets_the_failures() {
    private(|| {
        let house = House::new(SSHD);
        house.fail("log/auth.log", "198.51.100.7", 4);
        house.wait_read("sshd", "log/auth.log");
        let windows = house.must("why 198.51.100.7 --json").json()["windows"].clone();
        assert_eq!(windows[0]["failures"], 4, "{windows}");
        house.refused("unban 198.51.100.7", 1, &["its failures, if any, are forgotten"]);
        house.fail("log/auth.log", "198.51.100.7", 4);
        house.wait_read("sshd", "log/auth.log");
        assert_eq!(house.banned(), [""; 0]);
        house.fail("log/auth.log", "198.51.100.7", 1);
        house.wait_banned("198.51.100.7");
    });
}

#[test]
fn a_hundred_thousand_bans_by_hand_are_listed_and_held() {
    private(|| {
        let mut house = House::furnished(SSHD);
        house.variables.push(("BAND_LOG", "warn".to_owned()));
        house.start();
        for half in 0..2 {
            let mut words = vec!["ban".to_owned()];
            words.extend((0..50_000).map(|n| format!("10.{half}.{}.{}", n / 250, n % 250)));
            let said = house.banctl_words(words.iter().map(String::as_str));
            assert_eq!(said.code, 0, "{}", said.err);
        }
        assert_eq!(house.list("").len(), 100_000);
        assert_eq!(kernel().iter().filter(|(set, _)| set == "all-v4").count(), 100_000);
        let half = house.must("unban 10.0.0.0/16 --json").json();
        assert_eq!(half.as_array().unwrap().len(), 50_000);
    });
}

#[test]
fn who_watches_sees_failures_bans_and_unbans() {
    private(|| {
        let house = House::new(SSHD);
        let mut command = Command::new(env!("CARGO_BIN_EXE_banctl"));
        command.args(["watch", "--json"]).env("BAND_SOCKET", house.path("socket")).stdout(Stdio::piped());
        let mut watcher = Running(command.spawn().unwrap());
        let mut lines = BufReader::new(watcher.0.stdout.take().unwrap());
        wait_until("the watcher hears what is done now", SOON, || {
            house.must("ban 203.0.113.5");
            house.must("unban 203.0.113.5");
            readable(lines.get_ref(), Duration::ZERO).then_some(())
        });
        let mut next = || {
            assert!(!lines.buffer().is_empty() || readable(lines.get_ref(), SOON), "an event comes");
            let mut line = String::new();
            lines.read_line(&mut line).unwrap();
            serde_json::from_str::<Value>(&line).unwrap()
        };
        house.fail("log/auth.log", "198.51.100.7", 5);
        let mut events: Vec<Value> = Vec::new();
        while events.iter().filter(|event| event["address"] == "198.51.100.7").count() < 6 {
            events.push(next());
        }
        house.must("unban 198.51.100.7");
        events.push(next());
        drop(watcher);
        events.retain(|event| event["address"] == "198.51.100.7");
        let kinds: Vec<&str> = events.iter().map(|event| event["event"].as_str().unwrap()).collect();
        assert_eq!(kinds.iter().filter(|kind| **kind == "failure").count(), 5, "{events:?}");
        assert!(kinds.contains(&"ban") && kinds.last() == Some(&"unban"), "{events:?}");
        for event in &events {
            has_keys(event, "event jail address at");
        }
    });
}
