//! Somebody else changes the packet filter while the daemon runs: what band put there comes back.

use crate::daemon::SSHD;
use crate::house::{House, SOON, kernel, kernel_bans};
use crate::netns::{private, run, wait_until};

/// Single addresses, networks of several lengths, both families, with and without an end.
fn house_with_bans() -> House {
    let house = House::new(&format!("[allow]\nnetworks = [\"10.0.0.0/8\"]\n{SSHD}"));
    house.must("ban 198.51.100.7 203.0.113.0/24 198.18.0.0/15 2001:db8::7 2001:db8:1::/64");
    house.must("ban 198.51.100.8 2001:db8:2::/48 --for forever");
    house
}

#[test]
fn a_flushed_ruleset_comes_back_with_every_ban() {
    private(|| {
        let house = house_with_bans();
        let before = kernel();
        for round in 1..=3 {
            run("nft", "flush ruleset");
            wait_until("everything is back", SOON, || (kernel() == before).then_some(()));
            wait_until("it is told", SOON, || {
                let enforcer = house.must("status --json").json()["enforcers"][0].clone();
                (enforcer["repairs"].as_u64() >= Some(round) && enforcer["repaired_after"].to_string().contains("nft"))
                    .then_some(())
            });
        }
        let rules = run("nft", "list table inet band");
        assert!(rules.contains("hook prerouting") && rules.contains("@all-v4 "), "{rules}");
    });
}

#[test]
fn an_element_that_somebody_deletes_is_put_back() {
    private(|| {
        let house = house_with_bans();
        let before = kernel();
        for (set, element) in [("all-v4", "198.51.100.7"), ("all-v6", "2001:db8::7"), ("all-v4-24", "203.0.113.0")] {
            run("nft", &format!("delete element inet band {set} {{ {element} }}"));
            wait_until(&format!("{element} is back in {set}"), SOON, || (kernel() == before).then_some(()));
        }
        run("nft", "flush set inet band all-v4");
        wait_until("all are back", SOON, || (kernel() == before).then_some(()));
        house.hear("bans in the kernel were changed by somebody else; repaired");
    });
}

#[test]
fn an_element_that_somebody_adds_is_taken_out() {
    private(|| {
        let house = house_with_bans();
        let before = kernel();
        run("nft", "add element inet band all-v4 { 192.0.2.200 timeout 1h }");
        wait_until("it is gone", SOON, || (kernel() == before).then_some(()));
        assert!(!house.banned().contains(&"192.0.2.200".to_owned()));
    });
}

#[test]
fn a_rule_that_somebody_takes_out_is_put_back() {
    private(|| {
        let _house = house_with_bans();
        let before = kernel();
        run("nft", "flush chain inet band prerouting");
        wait_until("the rules are back", SOON, || {
            run("nft", "list table inet band").contains("ip saddr @all-v4 ").then_some(())
        });
        assert_eq!(kernel(), before);
        run("nft", "delete table inet band");
        wait_until("the table is back", SOON, || {
            (run("nft", "list tables").contains("inet band") && kernel() == before).then_some(())
        });
    });
}

#[test]
fn who_is_allowed_is_let_in_at_once() {
    private(|| {
        let house = house_with_bans();
        let allowed = |element: &str| kernel().contains(&("allow4".to_owned(), element.to_owned()));
        assert!(kernel_bans("198.51.100.7") && !allowed("198.51.100.7"));
        let said = house.must("allow add 198.51.100.7 --note office");
        assert!(said.out.contains("198.51.100.7 is never banned from now on; 1 bans lifted"), "{said:?}");
        assert!(!kernel_bans("198.51.100.7") && allowed("198.51.100.7"), "the kernel knows before the answer");
        // A ban of a network around it stands, and the kernel lets the one through.
        house.must("allow add 203.0.113.9");
        assert!(kernel_bans("203.0.113.0") && allowed("203.0.113.9"));
        house.refused("ban 198.51.100.7", 1, &["is on the allowlist", "banctl allow remove 198.51.100.7"]);
        house.must("allow remove 198.51.100.7");
        assert!(!allowed("198.51.100.7"));
        house.must("ban 198.51.100.7");
        assert!(kernel_bans("198.51.100.7"));
    });
}

#[test]
fn a_stay_on_the_allowlist_ends_by_itself() {
    private(|| {
        let house = house_with_bans();
        house.must("allow add 192.0.2.50 --for 1s");
        let allowed = || kernel().contains(&("allow4".to_owned(), "192.0.2.50".to_owned()));
        assert!(allowed());
        wait_until("its stay is over", SOON, || (!allowed()).then_some(()));
        house.must("ban 192.0.2.50");
    });
}
