//! What is set up wrongly: rights, configurations, filters, logs. Each has its sentence, and no daemon falls over it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use crate::daemon::SSHD;
use crate::house::{House, SOON};
use crate::netns::{private, wait_until};

const LOG: &str = "log/auth.log";
const ATTACKER: &str = "198.51.100.7";

/// The daemon gives up with these words, each on a line of its own; `banctl config check` says the same.
#[track_caller]
fn complains(house: &House, expect: &[&str]) {
    let said = house.start_in_vain(house.command());
    assert_eq!((said.code, said.err.lines().count()), (78, expect.len()), "{}", said.err);
    let checked = house.banctl("config check {dir}/band.toml");
    assert_eq!((checked.code, checked.err.lines().count()), (78, expect.len()), "{}", checked.err);
    let listed = house.banctl("config check {dir}/band.toml --json");
    let complaints = listed.json()["complaints"].as_array().unwrap().clone();
    assert_eq!((listed.code, listed.err.as_str(), complaints.len()), (78, "", expect.len()));
    for part in expect {
        let part = house.fill(part);
        assert!(said.err.contains(&part), "{part:?} is not in {}", said.err);
        assert!(checked.err.contains(&part), "{part:?} is not in {}", checked.err);
    }
}

#[test]
fn without_the_right_to_change_the_packet_filter_the_daemon_says_how_to_get_it() {
    private(|| {
        let house = House::furnished(SSHD);
        let command = house.command_by("setpriv", &["--bounding-set", "-net_admin", "--inh-caps", "-net_admin"]);
        let said = house.start_in_vain(command);
        assert_eq!((said.code, said.err.lines().count()), (1, 1), "{said:?}");
        assert!(said.err.contains("CAP_NET_ADMIN") && said.err.contains("AmbientCapabilities"), "{said:?}");
        assert!(!house.path("socket").exists());
    });
}

#[test]
fn every_complaint_about_a_configuration_comes_at_once() {
    private(|| {
        let house = House::furnished(
            "[defaults]\nfindtime = \"ten\"\n[allow]\nnetworks = [\"10.0.0.1/8\"]\n[jails.sshd]\nmaxrety = 3\nports = [\"shh\"]\n\
             [jails.mine]\nfilter = \"sssh\"\n",
        );
        complains(
            &house,
            &[
                "{dir}/band.toml:6: findtime: \"ten\" is not a duration",
                "{dir}/band.toml:8: \"10.0.0.1/8\" has bits set behind its prefix; did you mean 10.0.0.0/8?",
                "{dir}/band.toml:10: unknown key \"maxrety\" in [jails.sshd]; did you mean \"maxretry\"?",
                "{dir}/band.toml:11: \"shh\" is neither a service nor ports",
                "{dir}/band.toml:12: jail mine: there is no filter \"sssh\"; did you mean \"sshd\"?",
            ],
        );
        fs::create_dir(house.path("band.d")).unwrap();
        house.configure(SSHD);
        fs::write(house.path("band.d/10-more.toml"), "[jails.sshd]\nmaxretry = 0\n").unwrap();
        complains(&house, &["{dir}/band.d/10-more.toml:2: "]);
        house.configure("[jails.sshd]\n[jails.sshd]\n");
        fs::remove_file(house.path("band.d/10-more.toml")).unwrap();
        complains(&house, &["{dir}/band.toml:6: not valid TOML: duplicate key"]);
        fs::remove_file(house.path("band.toml")).unwrap();
        complains(&house, &["{dir}/band.toml: does not exist; write it, or name another one with --config"]);
    });
}

#[test]
fn a_filter_of_ones_own_must_be_right_and_prove_it() {
    private(|| {
        let mut house = House::furnished("[jails.mine]\nfilter = \"mine\"\nlogs = [\"{dir}/log/auth.log\"]\n");
        fs::create_dir(house.path("filters")).unwrap();
        let head = "description = \"mine\"\nprefix = \"none\"\n";
        let sample =
            |address: &str| format!("[[sample]]\nline = \"no entry for 192.0.2.1\"\naddress = \"{address}\"\n");
        let write = |text: String| fs::write(house.path("filters/mine.toml"), text).unwrap();
        let pattern = "failregex = ['^no entry for <HOST>$']\n";
        write(format!("{head}failregex = ['^no entry (for <HOST>$']\n{}", sample("192.0.2.1")));
        complains(&house, &["{dir}/filters/mine.toml:3: failregex[0]: unclosed group"]);
        write(format!("{head}{pattern}"));
        complains(&house, &["{dir}/filters/mine.toml:1: the filter has no [[sample]]"]);
        write(format!("{head}{pattern}{}", sample("192.0.2.2")));
        complains(&house, &["{dir}/filters/mine.toml:4: the sample's failure was laid on 192.0.2.1"]);
        fs::write(house.path("filters/mine.toml"), [0xff, 0xfe]).unwrap();
        complains(&house, &["the filter is not text in UTF-8"]);
        write(format!("{head}{pattern}{}", sample("192.0.2.1")));
        house.start();
        house.append(LOG, &format!("no entry for {ATTACKER}\n").repeat(5));
        house.wait_banned(ATTACKER);
    });
}

#[test]
fn a_directory_in_the_place_of_a_log_is_told_and_makes_room_for_one() {
    private(|| {
        let mut house = House::furnished(SSHD);
        fs::create_dir(house.path(LOG)).unwrap();
        house.start();
        let log = house.jail("sshd")["logs"][0].clone();
        assert_eq!(log["state"], "unreadable");
        assert!(log["why"].as_str().unwrap().contains("is a directory, not a log file"), "{log}");
        assert_eq!(house.stderr().matches("is a directory, not a log file").count(), 1, "{}", house.stderr());
        fs::remove_dir(house.path(LOG)).unwrap();
        house.fail(LOG, ATTACKER, 5);
        house.wait_banned(ATTACKER);
    });
}

#[test]
fn a_log_the_daemon_may_not_read_is_told_and_read_once_it_may() {
    private(|| {
        let mut house = House::furnished(SSHD);
        // Another user needs the way to everything it uses, and the program itself.
        let open = |name: &str, mode| fs::set_permissions(house.path(name), fs::Permissions::from_mode(mode)).unwrap();
        fs::copy(env!("CARGO_BIN_EXE_band"), house.path("band")).unwrap();
        house.append(LOG, "");
        for (name, mode) in [("", 0o777), ("log", 0o755), (LOG, 0o600), ("notify", 0o666), ("band", 0o755)] {
            open(name, mode);
        }
        let mut command = Command::new("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]);
        command.args(["--inh-caps", "+net_admin", "--ambient-caps", "+net_admin"]).arg(house.path("band"));
        house.dress(&mut command);
        house.start_as(command);
        let log = house.jail("sshd")["logs"][0].clone();
        assert_eq!(log["state"], "unreadable", "{log}");
        assert!(house.stderr().contains(&house.fill("{dir}/log/auth.log: ")), "{}", house.stderr());
        house.fail(LOG, ATTACKER, 5);
        fs::set_permissions(house.path(LOG), fs::Permissions::from_mode(0o644)).unwrap();
        wait_until("the log is read", SOON, || (house.jail("sshd")["logs"][0]["state"] == "ok").then_some(()));
        house.wait_banned(ATTACKER);
    });
}

#[test]
fn a_state_that_cannot_be_read_is_put_aside_and_one_that_cannot_be_written_does_not_stop_the_protection() {
    private(|| {
        let mut house = House::furnished(SSHD);
        fs::create_dir(house.path("state")).unwrap();
        fs::write(house.path("state/ledger.log"), "something else\nentirely\n").unwrap();
        house.start();
        let files = fs::read_dir(house.path("state")).unwrap().flatten();
        let kept =
            files.filter(|file| fs::read_to_string(file.path()).is_ok_and(|text| text.contains("entirely"))).count();
        assert_eq!(kept, 1, "nothing is thrown away");
        house.fail(LOG, ATTACKER, 5);
        house.wait_banned(ATTACKER);
        house.end(rustix::process::Signal::TERM);
        fs::remove_dir_all(house.path("state")).unwrap();
        fs::write(house.path("state"), "a file").unwrap();
        house.start();
        house.hear("nothing can be kept over a restart; band protects from memory");
        house.must("ban 198.51.100.8");
    });
}
