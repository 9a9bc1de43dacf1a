//! From lines in real log files to elements in the kernel: what counts, when it counts, and what does not.

use std::fs::{self, File};
use std::io::Write;

use serde_json::json;

use crate::house::{House, SOON, ago, failures, kernel, kernel_bans};
use crate::netns::{private, run, wait_until};

/// One jail, one log.
pub const SSHD: &str = "[jails.sshd]\nlogs = [\"{dir}/log/auth.log\"]\n";
const LOG: &str = "log/auth.log";
const ATTACKER: &str = "198.51.100.7";
/// Attacks last in tests that prove that nothing happened to others.
const FENCE: &str = "198.51.100.250";

/// Attackers of another kind come last: once they are banned, everything before them was judged.
#[track_caller]
fn only_the_fence_is_banned(house: &House) {
    house.fail(LOG, FENCE, 5);
    house.wait_banned(FENCE);
    assert_eq!(house.banned(), [FENCE]);
}

#[test]
fn lines_in_a_log_become_an_element_in_the_kernel_and_evidence() {
    private(|| {
        let house = House::new(SSHD);
        house.fail(LOG, ATTACKER, 4);
        house.wait_read("sshd", LOG);
        assert_eq!(house.banned(), [""; 0]);
        house.fail(LOG, ATTACKER, 1);
        let ban = house.wait_banned(ATTACKER);
        assert_eq!(
            [&ban["jail"], &ban["failures"], &ban["count"], &ban["origin"]],
            [&json!("sshd"), &json!(5), &json!(1), &json!("log")]
        );
        wait_until("the kernel holds it", SOON, || kernel_bans(ATTACKER).then_some(()));
        let why = house.must(&format!("why {ATTACKER} --json")).json();
        assert_eq!(why["evidence"].as_array().unwrap().len(), 5, "{why}");
        assert_eq!(why["bans"][0]["packets"], 0, "{why}");
        let latency = &house.must("status --json").json()["latency_us"]["line_to_kernel"];
        assert_eq!(latency["count"], 1, "{latency}");
    });
}

#[test]
fn nginx_scanners_are_banned_and_visitors_are_not() {
    private(|| {
        let house = House::new("[jails.nginx-scan]\nlogs = [\"{dir}/log/access.log\"]");
        let stamp = ago(0).strftime("%d/%b/%Y:%H:%M:%S +0000").to_string();
        let line = |address: &str, path: &str| {
            format!("{address} - - [{stamp}] \"GET {path} HTTP/1.1\" 404 150 \"-\" \"Mozilla/5.0\"\n")
        };
        let visitor = line("203.0.113.4", "/missing.html").repeat(9);
        let scanner: String = ["/.env", "/.git/config", "/wp-login.php", "/xmlrpc.php", "/old.sql"]
            .map(|path| line(ATTACKER, path))
            .concat();
        house.append("log/access.log", &(visitor + &scanner));
        house.wait_banned(ATTACKER);
        assert_eq!(house.banned(), [ATTACKER]);
    });
}

/// One SIP attempt as `messages` and `security` tell of it.
fn sip(call: usize) -> [String; 2] {
    let (stamp, moment) = (ago(0).strftime("%F %T").to_string(), ago(0).strftime("%FT%T.000+0000").to_string());
    [
        format!(
            "[{stamp}] NOTICE[812] res_pjsip/pjsip_distributor.c: Request 'REGISTER' from '<sip:200@192.0.2.10>' failed \
             for '{ATTACKER}:5070' (callid: call-{call}) - No matching endpoint found\n"
        ),
        format!(
            "[{stamp}] SECURITY[9] res_security_log.c: SecurityEvent=\"InvalidAccountID\",EventTV=\"{moment}\",\
             Severity=\"Error\",Service=\"PJSIP\",EventVersion=\"1\",AccountID=\"200\",SessionID=\"call-{call}\",\
             LocalAddress=\"IPV4/UDP/192.0.2.10/5060\",RemoteAddress=\"IPV4/UDP/{ATTACKER}/5070\"\n"
        ),
    ]
}

#[test]
fn an_attempt_that_two_logs_of_asterisk_tell_of_counts_once() {
    private(|| {
        let house =
            House::new("[jails.asterisk]\ntimezone = \"UTC\"\nlogs = [\"{dir}/log/messages\", \"{dir}/log/security\"]");
        for call in 0..4 {
            let [messages, security] = sip(call);
            house.append("log/messages", &messages);
            house.append("log/security", &security);
        }
        house.wait_read("asterisk", "log/messages");
        house.wait_read("asterisk", "log/security");
        assert_eq!((house.jail("asterisk")["failures"].clone(), house.banned().len()), (json!(4), 0));
        house.append("log/security", &sip(4)[1]);
        assert_eq!(house.wait_banned(ATTACKER)["failures"], 5);
        house.append("log/messages", &sip(4)[0]);
        house.wait_read("asterisk", "log/messages");
        assert_eq!(house.jail("asterisk")["failures"], 5);
    });
}

#[test]
fn a_log_that_appears_later_is_read_from_its_start() {
    private(|| {
        let house = House::new("[jails.sshd]\nlogs = [\"{dir}/log/auth.log\", \"{dir}/log/*/secure\"]");
        let status = house.must("status --json").json();
        assert_eq!(status["protected"], false, "{status}");
        assert!(status["reasons"][0].as_str().unwrap().contains("no log it can read"), "{status}");
        assert_eq!(house.jail("sshd")["logs"][0]["state"], "waiting");
        house.fail(LOG, ATTACKER, 5);
        house.wait_banned(ATTACKER);
        assert_eq!(house.must("status --json").json()["protected"], true);
        for (directory, address) in [("log/web1", "198.51.100.8"), ("log/web2", "198.51.100.9")] {
            fs::create_dir(house.path(directory)).unwrap();
            house.fail(&format!("{directory}/secure"), address, 5);
            house.wait_banned(address);
        }
    });
}

#[test]
fn failures_of_before_the_start_count_if_they_lie_in_the_window() {
    private(|| {
        let mut house = House::furnished(SSHD);
        let lines = [
            failures("198.51.100.1", 5, 7200),
            failures("198.51.100.2", 5, 630),
            failures("198.51.100.3", 5, 500),
            failures("198.51.100.4", 4, 400),
        ];
        house.append(LOG, &lines.concat());
        house.start();
        house.wait_banned("198.51.100.3");
        house.wait_read("sshd", LOG);
        assert_eq!(house.banned(), ["198.51.100.3"]);
        house.fail(LOG, "198.51.100.4", 1);
        house.wait_banned("198.51.100.4");
        assert_eq!(house.banned(), ["198.51.100.3", "198.51.100.4"]);
    });
}

#[test]
fn a_log_that_is_renamed_and_made_anew_is_read_to_the_end_of_both() {
    private(|| {
        let house = House::new(SSHD);
        house.fail(LOG, ATTACKER, 2);
        house.wait_read("sshd", LOG);
        fs::rename(house.path(LOG), house.path("log/auth.log.1")).unwrap();
        house.fail("log/auth.log.1", ATTACKER, 1);
        house.fail(LOG, ATTACKER, 2);
        assert_eq!(house.wait_banned(ATTACKER)["failures"], 5);
        house.wait_read("sshd", LOG);
        let jail = house.jail("sshd");
        assert_eq!((&jail["failures"], &jail["logs"][0]["rotations"]), (&json!(5), &json!(1)), "{jail}");
    });
}

#[test]
fn a_log_that_is_copied_and_emptied_is_counted_once() {
    private(|| {
        let house = House::new(SSHD);
        house.fail(LOG, ATTACKER, 3);
        house.wait_read("sshd", LOG);
        fs::copy(house.path(LOG), house.path("log/auth.log.1")).unwrap();
        File::options().write(true).open(house.path(LOG)).unwrap().set_len(0).unwrap();
        house.fail(LOG, ATTACKER, 1);
        house.wait_read("sshd", LOG);
        assert_eq!((house.jail("sshd")["failures"].clone(), house.banned().len()), (json!(4), 0));
        house.fail(LOG, ATTACKER, 1);
        assert_eq!(house.wait_banned(ATTACKER)["failures"], 5);
    });
}

#[test]
fn an_unfinished_last_line_waits_for_its_end() {
    private(|| {
        let house = House::new(SSHD);
        let lines = failures(ATTACKER, 5, 0);
        let (most, rest) = lines.split_at(lines.len() - 20);
        house.append(LOG, most);
        wait_until("four lines are read", SOON, || (house.jail("sshd")["failures"] == 4).then_some(()));
        assert_eq!(house.banned(), [""; 0]);
        house.append(LOG, rest);
        house.wait_banned(ATTACKER);
        assert_eq!(house.jail("sshd")["failures"], 5);
    });
}

#[test]
fn the_allowed_and_the_machine_itself_are_never_banned() {
    private(|| {
        run("ip", "address add 203.0.113.9/32 dev lo");
        let house = House::new(&format!("[allow]\nnetworks = \"192.0.2.0/24, 2001:db8:5::/48\"\n{SSHD}"));
        for address in ["192.0.2.5", "203.0.113.9", "127.0.0.1", "::1", "2001:db8:5::1"] {
            house.fail(LOG, address, 6);
        }
        only_the_fence_is_banned(&house);
        let held = kernel();
        for element in [r#"{"prefix":{"addr":"192.0.2.0","len":24}}"#, "203.0.113.9"] {
            assert!(held.contains(&("allow4".to_owned(), element.to_owned())), "{element} is not in {held:?}");
        }
    });
}

#[test]
fn an_address_the_machine_gets_while_band_runs_is_its_own_from_then_on() {
    private(|| {
        let house = House::new(SSHD);
        house.must("ban 203.0.113.10");
        run("ip", "address add 203.0.113.10/32 dev lo");
        wait_until("the ban is lifted", SOON, || house.banned().is_empty().then_some(()));
        wait_until("the kernel lets it in", SOON, || (!kernel_bans("203.0.113.10")).then_some(()));
        house.fail(LOG, "203.0.113.10", 6);
        only_the_fence_is_banned(&house);
        run("ip", "address del 203.0.113.10/32 dev lo");
        wait_until("it is a stranger again", SOON, || (house.banctl("ban 203.0.113.10").code == 0).then_some(()));
    });
}

#[test]
fn ipv6_is_counted_and_banned_by_its_network_of_64_bits() {
    private(|| {
        let house = House::new(SSHD);
        for n in 1..=5 {
            house.fail(LOG, &format!("2001:db8:1:2::{n:x}"), 1);
            house.fail(LOG, &format!("2001:db8:{n}::1"), 1);
        }
        house.wait_banned("2001:db8:1:2::/64");
        house.fail(LOG, "::ffff:198.51.100.7", 5);
        house.wait_banned(ATTACKER);
        assert_eq!(house.banned(), [ATTACKER, "2001:db8:1:2::/64"]);
        let expect = ("all-v6-64".to_owned(), "2001:db8:1:2::".to_owned());
        wait_until("the kernel holds it", SOON, || kernel().contains(&expect).then_some(()));
    });
}

#[test]
fn a_ban_ends_by_itself_and_the_next_one_is_longer() {
    private(|| {
        let house = House::new(&format!(
            "[defaults]\nbantime = \"2s\"\nbantime_growth = {{ factor = 100, max = \"1h\" }}\n{SSHD}"
        ));
        let seconds = |ban: &serde_json::Value| {
            let moment = |key: &str| ban[key].as_str().unwrap().parse::<jiff::Timestamp>().unwrap();
            (moment("until") - moment("since")).total(jiff::Unit::Second).unwrap()
        };
        house.fail(LOG, ATTACKER, 5);
        let ban = house.wait_banned(ATTACKER);
        assert_eq!((seconds(&ban), &ban["count"]), (2.0, &json!(1)));
        wait_until("the kernel holds it", SOON, || kernel_bans(ATTACKER).then_some(()));
        wait_until("its time is up", SOON, || house.banned().is_empty().then_some(()));
        wait_until("the kernel lets it in", SOON, || (!kernel_bans(ATTACKER)).then_some(()));
        house.fail(LOG, ATTACKER, 5);
        let ban = house.wait_banned(ATTACKER);
        assert_eq!((seconds(&ban), &ban["count"]), (200.0, &json!(2)));
    });
}

#[test]
fn who_is_banned_again_and_again_goes_to_the_jail_for_those() {
    private(|| {
        let house = House::new(
            "[jails.sshd]\nmaxretry = 1\nbantime = \"1s\"\nlogs = [\"{dir}/log/auth.log\"]\n[jails.recidive]\nmaxretry = 2\n",
        );
        house.fail(LOG, ATTACKER, 1);
        house.wait_banned(ATTACKER);
        wait_until("its time is up", SOON, || house.banned().is_empty().then_some(()));
        house.fail(LOG, ATTACKER, 1);
        let ban = wait_until("recidive", SOON, || house.list("--jail recidive").pop());
        assert_eq!((&ban["address"], &ban["failures"]), (&json!(ATTACKER), &json!(2)));
        wait_until("the shorter ban is over", SOON, || house.list("--jail sshd").is_empty().then_some(()));
        assert!(kernel_bans(ATTACKER), "the longer one holds in the kernel");
    });
}

#[test]
fn a_jail_with_ports_refuses_those_alone() {
    private(|| {
        let house = House::new(&format!("{SSHD}ports = [\"ssh\"]\naction = \"reject\"\n"));
        house.fail(LOG, ATTACKER, 5);
        house.wait_banned(ATTACKER);
        let expect = ("sshd-v4".to_owned(), ATTACKER.to_owned());
        wait_until("the kernel holds it", SOON, || kernel().contains(&expect).then_some(()));
        let rules = run("nft", "-n list table inet band");
        assert!(rules.contains("tcp dport 22 ") && rules.contains("reject with tcp reset"), "{rules}");
    });
}

#[test]
fn a_line_that_is_no_text_or_endless_does_no_harm() {
    private(|| {
        let house = House::new(SSHD);
        let mut file = File::options().create(true).append(true).open(house.path(LOG)).unwrap();
        file.write_all(&failures(ATTACKER, 4, 0).into_bytes()).unwrap();
        let garbage: Vec<u8> = (0..=255u8).cycle().take(100_000).collect();
        file.write_all(&garbage).unwrap();
        file.write_all(b"\n").unwrap();
        for _ in 0..10 {
            file.write_all(&vec![b'x'; 1 << 20]).unwrap();
        }
        file.write_all(&[b"\n", failures(ATTACKER, 1, 0).as_bytes()].concat()).unwrap();
        house.wait_banned(ATTACKER);
        let log = &house.jail("sshd")["logs"][0];
        assert!(log["lines_cut"].as_u64().unwrap() >= 1 && log["failures"] == 5, "{log}");
    });
}
