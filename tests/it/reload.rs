//! A new configuration while the daemon runs: what changes, what stays, and what systemd hears meanwhile.

use rustix::process::Signal;
use serde_json::json;

use crate::daemon::SSHD;
use crate::house::{House, SOON, kernel, kernel_bans};
use crate::netns::{private, wait_until};

const LOG: &str = "log/auth.log";
const ATTACKER: &str = "198.51.100.7";

fn hang_up(house: &House) {
    house.signal(Signal::HUP);
    house.notice("RELOADING=1");
    house.notice("READY=1");
}

#[test]
fn bans_failures_and_positions_outlive_a_reload() {
    private(|| {
        let house = House::new(SSHD);
        house.must("ban 203.0.113.5");
        house.fail(LOG, ATTACKER, 2);
        house.wait_read("sshd", LOG);
        hang_up(&house);
        house.fail(LOG, ATTACKER, 2);
        house.wait_read("sshd", LOG);
        let said = house.must("reload");
        assert_eq!(said.out, "reloaded; nothing changed that the daemon keeps\n");
        assert_eq!(
            (house.jail("sshd")["failures"].clone(), house.banned()),
            (json!(4), vec!["203.0.113.5".to_owned()])
        );
        house.fail(LOG, ATTACKER, 1);
        assert_eq!(house.wait_banned(ATTACKER)["failures"], 5);
        assert_eq!(house.jail("sshd")["failures"], 5, "no line counts twice");
        assert!(kernel_bans("203.0.113.5"));
    });
}

#[test]
fn a_wrong_configuration_changes_nothing_and_is_explained() {
    private(|| {
        let house = House::new(SSHD);
        house
            .configure("[jails.sshd]\nmaxrety = 1\nlogs = [\"{dir}/log/auth.log\"]\n[defaults]\nfindtime = \"soon\"\n");
        let said = house.banctl("reload");
        assert_eq!(said.code, 78, "{said:?}");
        let file = house.fill("{dir}/band.toml");
        for part in [
            "the old configuration stays in force",
            &format!("{file}:6: unknown key"),
            "maxretry",
            &format!("{file}:9: "),
        ] {
            assert!(said.err.contains(part), "{part:?} is not in {said:?}");
        }
        hang_up(&house);
        house.hear("the old configuration stays in force");
        house.fail(LOG, ATTACKER, 4);
        house.wait_read("sshd", LOG);
        assert_eq!(house.banned(), [""; 0]);
        house.fail(LOG, ATTACKER, 1);
        house.wait_banned(ATTACKER);
    });
}

#[test]
fn a_jail_comes_another_judges_differently_and_a_third_goes() {
    private(|| {
        let other = "[jails.other]\nfilter = \"sshd\"\nlogs = [\"{dir}/log/other.log\"]\n";
        let house = House::new(&format!("{SSHD}{other}"));
        house.fail(LOG, ATTACKER, 2);
        house.fail("log/other.log", "203.0.113.8", 5);
        house.wait_banned("203.0.113.8");
        house.wait_read("sshd", LOG);
        house.configure(&format!(
            "{SSHD}maxretry = 3\n[jails.new]\nfilter = \"sshd\"\nlogs = [\"{{dir}}/log/new.log\"]\n"
        ));
        let said = house.must("reload");
        for part in ["jail new is on", "jail other is off", "jail sshd judges differently"] {
            assert!(said.out.contains(part), "{said:?}");
        }
        house.fail("log/other.log", "203.0.113.9", 9);
        house.fail(LOG, ATTACKER, 1);
        assert_eq!(house.wait_banned(ATTACKER)["failures"], 3);
        house.fail("log/new.log", "203.0.113.10", 5);
        house.wait_banned("203.0.113.10");
        assert_eq!(house.banned(), [ATTACKER, "203.0.113.10", "203.0.113.8"], "a ban outlives its jail");
        assert!(kernel_bans("203.0.113.8"));
        house.must("unban 203.0.113.8 --jail other");
        assert!(!kernel_bans("203.0.113.8"));
    });
}

#[test]
fn a_ban_moves_with_the_ports_of_its_jail() {
    private(|| {
        let house = House::new(SSHD);
        house.must(&format!("ban {ATTACKER} --jail sshd"));
        let held = |set: &str| kernel().contains(&(set.to_owned(), ATTACKER.to_owned()));
        assert!(held("all-v4"));
        house.configure(&format!("{SSHD}ports = [\"ssh\"]\n"));
        house.must("reload");
        wait_until("it is held for the port alone", SOON, || (held("sshd-v4") && !held("all-v4")).then_some(()));
        house.configure(SSHD);
        house.must("reload");
        wait_until("it is held for everything again", SOON, || held("all-v4").then_some(()));
    });
}

#[test]
fn a_network_allowed_by_a_reload_is_let_in() {
    private(|| {
        let house = House::new(SSHD);
        house.must(&format!("ban {ATTACKER} 203.0.113.5"));
        house.configure(&format!("[allow]\nnetworks = [\"198.51.100.0/24\"]\n{SSHD}"));
        assert!(house.must("reload").out.contains("the allowlist is another"));
        assert_eq!(house.banned(), ["203.0.113.5"]);
        wait_until("the kernel lets it in", SOON, || (!kernel_bans(ATTACKER)).then_some(()));
        house.refused(&format!("ban {ATTACKER}"), 1, &["198.51.100.0/24 is on the allowlist"]);
    });
}

#[test]
fn systemd_gets_its_signs_of_life() {
    private(|| {
        let mut house = House::furnished(SSHD);
        house.variables.push(("WATCHDOG_USEC", "200000".to_owned()));
        house.start();
        for _ in 0..3 {
            assert_eq!(house.notice("WATCHDOG=1"), "WATCHDOG=1");
        }
        house.end(Signal::TERM);
        house.variables.push(("WATCHDOG_PID", "1".to_owned()));
        house.start();
        house.signal(Signal::TERM);
        assert_eq!(house.notice(""), "STOPPING=1", "what is meant for another process is not answered");
    });
}
