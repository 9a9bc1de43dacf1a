//! What outlives the daemon: bans in the kernel while it is away, and everything it knew once it is back.

use rustix::process::Signal;

use crate::daemon::SSHD;
use crate::house::{House, SOON, failures, kernel, kernel_bans};
use crate::netns::{private, run, wait_until};

const LOG: &str = "log/auth.log";
const ATTACKER: &str = "198.51.100.7";

/// Bans of every kind: by log, by hand with and without an end, of networks.
fn house_with_bans() -> House {
    let house = House::new(SSHD);
    house.fail(LOG, ATTACKER, 5);
    house.wait_banned(ATTACKER);
    house.must("ban 203.0.113.0/24 2001:db8:9::/48 --for forever");
    house.must("ban 192.0.2.77 --jail sshd --for 2h");
    house
}

/// Everything that is listed, and everything the kernel holds.
fn everything(house: &House) -> (Vec<serde_json::Value>, Vec<(String, String)>) {
    let mut list = house.list("");
    list.sort_by_key(|ban| ban["address"].to_string());
    (list, kernel())
}

#[test]
fn a_daemon_that_is_asked_to_stop_leaves_its_bans_in_the_kernel() {
    private(|| {
        let mut house = house_with_bans();
        let before = kernel();
        assert!(before.len() >= 4, "{before:?}");
        house.signal(Signal::TERM);
        house.notice("STOPPING=1");
        assert_eq!(house.ended().code(), Some(0));
        assert_eq!(kernel(), before);
        assert!(!house.path("socket").exists(), "the socket is taken away");
        house.refused("status", 69, &["band is not running", "systemctl start band"]);
        assert!(house.stderr().contains("bans stay in the kernel"), "{}", house.stderr());
    });
}

#[test]
fn a_restart_brings_every_ban_back_as_it_was() {
    private(|| {
        let mut house = house_with_bans();
        let before = everything(&house);
        house.restart();
        assert_eq!(everything(&house), before);
        assert_eq!(house.end(Signal::TERM).code(), Some(0));
        run("nft", "flush ruleset");
        house.start();
        assert_eq!(everything(&house), before, "also when the kernel has lost them");
    });
}

#[test]
fn a_daemon_that_was_killed_comes_back_with_every_ban_as_it_was() {
    private(|| {
        let mut house = house_with_bans();
        let before = everything(&house);
        let ledger = house.path("state/ledger.log");
        wait_until("the last ban is on disk", SOON, || {
            std::fs::read_to_string(&ledger).unwrap().contains("192.0.2.77").then_some(())
        });
        house.end(Signal::KILL);
        assert!(house.path("socket").exists());
        assert_eq!(kernel(), before.1);
        house.append("state/ledger.log", "torn {\"what\":\"ba");
        house.start();
        assert_eq!(everything(&house), before);
        house.wait_read("sshd", LOG);
        assert_eq!(everything(&house), before, "the lines that led to a ban do not count again");
    });
}

#[test]
fn a_ban_that_ended_while_the_daemon_was_away_is_over() {
    private(|| {
        let mut house = House::new(SSHD);
        house.must("ban 203.0.113.5 --for 1s");
        house.must("ban 203.0.113.6 --for 1h");
        assert_eq!(house.end(Signal::TERM).code(), Some(0));
        wait_until("its time is up in the kernel", SOON, || (!kernel_bans("203.0.113.5")).then_some(()));
        house.start();
        assert_eq!(house.banned(), ["203.0.113.6"]);
    });
}

#[test]
fn lines_of_before_an_unban_do_not_ban_again() {
    private(|| {
        let mut house = House::new(SSHD);
        house.fail(LOG, ATTACKER, 5);
        house.wait_banned(ATTACKER);
        // More of it, written before the ban took hold and after.
        house.fail(LOG, ATTACKER, 5);
        house.wait_read("sshd", LOG);
        house.must(&format!("unban {ATTACKER}"));
        for signal in [Signal::TERM, Signal::KILL] {
            let ledger = house.path("state/ledger.log");
            wait_until("the unban is on disk", SOON, || {
                std::fs::read_to_string(&ledger).unwrap().contains("\"unban\"").then_some(())
            });
            house.end(signal);
            house.start();
            house.wait_read("sshd", LOG);
            assert_eq!(house.banned(), [""; 0], "{signal:?}");
        }
        // What comes after it counts from the start.
        wait_until("a new second", SOON, || {
            let now = failures("x", 1, 0)[..19].to_owned();
            (!std::fs::read_to_string(house.path(LOG)).unwrap().contains(&now)).then_some(())
        });
        house.fail(LOG, ATTACKER, 4);
        house.wait_read("sshd", LOG);
        assert_eq!(house.banned(), [""; 0]);
        house.fail(LOG, ATTACKER, 1);
        assert_eq!(house.wait_banned(ATTACKER)["failures"], 5);
    });
}

#[test]
fn failures_in_the_window_survive_a_restart() {
    private(|| {
        let mut house = House::new(SSHD);
        house.fail(LOG, ATTACKER, 4);
        house.wait_read("sshd", LOG);
        house.restart();
        house.fail(LOG, ATTACKER, 1);
        assert_eq!(house.wait_banned(ATTACKER)["failures"], 5);
    });
}

#[test]
fn lines_written_while_the_daemon_was_away_count() {
    private(|| {
        let mut house = House::new(SSHD);
        house.fail(LOG, ATTACKER, 2);
        house.wait_read("sshd", LOG);
        house.end(Signal::TERM);
        house.fail(LOG, ATTACKER, 3);
        house.start();
        assert_eq!(house.wait_banned(ATTACKER)["failures"], 5);
    });
}

#[test]
fn what_was_allowed_by_hand_stays_allowed() {
    private(|| {
        let mut house = House::new(SSHD);
        house.must("allow add 198.51.100.0/24 --for 1h --note office");
        house.must("allow add 192.0.2.0/24");
        house.must("allow remove 192.0.2.0/24");
        let before = house.must("allow list --json").json();
        house.restart();
        assert_eq!(house.must("allow list --json").json(), before);
        house.fail(LOG, ATTACKER, 5);
        house.fail(LOG, "192.0.2.5", 5);
        house.wait_banned("192.0.2.5");
        assert_eq!(house.banned(), ["192.0.2.5"]);
    });
}
