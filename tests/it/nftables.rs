//! The packet filter in the kernel: what we install and apply must be what `nft` lists. Packets: see `packets`.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use band::enforce::nftables::{Action, Error, Kernel, Layout, Monitor, Op, PortRange, Ports, Protocol, Scope};
use band::enforce::nftables::{Change, describe};
use band::engine::time::{SPAN_MAX, Span};
use ipnet::IpNet;
use serde_json::Value;

use crate::netns::{private, readable, run, wait_until};

const SOON: Duration = Duration::from_secs(10);

pub fn scope(name: &str, action: Action, ports: Ports) -> Scope {
    Scope { name: name.to_owned(), action, ports }
}

pub fn layout(allow: &[&str], scopes: Vec<Scope>) -> Layout {
    Layout { table: "band".to_owned(), allow: allow.iter().map(|net| net.parse().unwrap()).collect(), scopes }
}

fn drop_all(names: &[&str]) -> Layout {
    layout(&[], names.iter().map(|name| scope(name, Action::Drop, Ports::All)).collect())
}

pub fn net(text: &str) -> IpNet {
    text.parse().unwrap_or_else(|_| IpNet::from(text.parse::<IpAddr>().unwrap()))
}

/// A ban of so many milliseconds; 0 is for ever.
pub fn ban(scope: &str, text: &str, milliseconds: i64) -> Op {
    let timeout = (milliseconds != 0).then_some(Span(milliseconds));
    Op::Ban { scope: scope.to_owned(), net: net(text), timeout }
}

pub fn unban(scope: &str, text: &str) -> Op {
    Op::Unban { scope: scope.to_owned(), net: net(text) }
}

pub fn installed(layout: &Layout) -> Kernel {
    let mut kernel = Kernel::open().expect("the kernel opens");
    kernel.install(layout).expect("the layout is installed");
    kernel
}

fn listed() -> Value {
    let raw = nftables::helper::get_current_ruleset_raw(None::<&str>, ["list", "ruleset"]);
    serde_json::from_str(&raw.expect("nft (nftables) is needed by the tests")).unwrap()
}

/// What nft says the sets of a table hold: set, element, timeout in seconds.
pub fn elements(table: &str) -> BTreeSet<(String, String, Option<u64>)> {
    let ruleset = listed();
    let objects = ruleset["nftables"].as_array().unwrap();
    let sets = objects.iter().filter_map(|object| object.get("set")).filter(|set| set["table"] == table);
    sets.flat_map(|set| {
        let name = set["name"].as_str().unwrap();
        let elements = set["elem"].as_array().cloned().unwrap_or_default();
        elements.into_iter().map(move |element| {
            let value = element.pointer("/elem/val").unwrap_or(&element);
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            (name.to_owned(), text, element.pointer("/elem/timeout").and_then(Value::as_u64))
        })
    })
    .collect()
}

fn element(set: &str, value: &str, seconds: Option<u64>) -> (String, String, Option<u64>) {
    (set.to_owned(), value.to_owned(), seconds)
}

/// The table as nft prints it, without elements.
fn printed(table: &str) -> String {
    let text = run("nft", &format!("-y list table inet {table}"));
    let mut in_elements = false;
    let mut kept = String::new();
    for line in text.lines() {
        in_elements |= line.trim_start().starts_with("elements = {");
        if !in_elements {
            kept.push_str(line);
            kept.push('\n');
        }
        in_elements &= !line.ends_with('}');
    }
    kept
}

fn sorted_lines(text: &str) -> Vec<&str> {
    let mut lines: Vec<_> = text.lines().collect();
    lines.sort_unstable();
    lines
}

/// Bans as scope, network and whether they end.
fn held(kernel: &mut Kernel) -> BTreeSet<(String, IpNet, bool)> {
    let held = kernel.dump().unwrap();
    let set: BTreeSet<_> = held.iter().map(|h| (h.scope.clone(), h.net, h.expires.is_some())).collect();
    assert_eq!(held.len(), set.len(), "a dump gives each ban once");
    set
}

fn many_scopes() -> Layout {
    let range = |protocol, first, last| PortRange { protocol, first, last };
    let ports = vec![
        range(Protocol::Tcp, 22, 22),
        range(Protocol::Tcp, 8000, 8100),
        range(Protocol::Udp, 5060, 5061),
        range(Protocol::Sctp, 9899, 9899),
        range(Protocol::Dccp, 1, 65535),
        range(Protocol::Icmp, 0, 0),
    ];
    let allow = ["10.0.0.0/8", "10.1.0.0/16", "192.168.0.0/24", "192.168.1.0/25", "255.255.255.255/32", "fd00::/8"];
    layout(
        &allow,
        vec![
            scope("all", Action::Drop, Ports::All),
            scope("sshd", Action::Reject, Ports::Some(ports.clone())),
            scope("3cx-v4", Action::Drop, Ports::Some(ports)),
            scope(&"long_".repeat(12), Action::Reject, Ports::All),
        ],
    )
}

#[test]
fn what_nft_lists_is_what_we_describe() {
    private(|| {
        let layout = many_scopes();
        let mut kernel = installed(&layout);
        assert_eq!(printed("band"), kernel.describe());
        let uncounted = kernel.describe().replace("\t\tcounter\n", "");
        assert_eq!(uncounted, describe(&layout));
        kernel.install(&drop_all(&["all"])).unwrap();
        assert_eq!(elements("band"), BTreeSet::new(), "nothing is allowed any more");
        kernel.install(&layout).unwrap();
        kernel.install(&layout).unwrap();
        assert_eq!(
            elements("band"),
            BTreeSet::from([
                element("allow4", r#"{"prefix":{"addr":"10.0.0.0","len":8}}"#, None),
                element("allow4", r#"{"range":["192.168.0.0","192.168.1.127"]}"#, None),
                element("allow4", "255.255.255.255", None),
                element("allow6", r#"{"prefix":{"addr":"fd00::","len":8}}"#, None),
            ])
        );
        assert_eq!(kernel.apply(&[ban("all", "198.51.100.0/24", 1000), ban("sshd", "2001:db8::/47", 1000)]), []);
        assert_eq!(sorted_lines(&printed("band")), sorted_lines(&kernel.describe()), "with lengths that came up");
        assert!(kernel.is_intact().unwrap());
        assert!(nftables::helper::get_current_ruleset().is_ok(), "the typed reader understands it too");
    });
}

#[test]
fn what_we_describe_can_be_loaded_by_nft() {
    private(|| {
        let path = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(path.path(), describe(&many_scopes())).unwrap();
        run("nft", &format!("-f {}", path.path().display()));
        assert_eq!(printed("band"), describe(&many_scopes()));
    });
}

/// Every kind of network as op, and as the element nft must list.
const KINDS: [(&str, &str, &str); 9] = [
    ("203.0.113.5", "all-v4", "203.0.113.5"),
    ("203.0.113.0/24", "all-v4-24", "203.0.113.0"),
    ("198.51.0.0/17", "all-v4-17", "198.51.0.0"),
    ("0.0.0.0/0", "all-v4-0", "0.0.0.0"),
    ("2001:db8::5", "all-v6", "2001:db8::5"),
    ("2001:db8:1:2::/64", "all-v6-64", "2001:db8:1:2::"),
    ("2001:db8::/47", "all-v6-47", "2001:db8::"),
    ("2001:db8:8000::/33", "all-v6-33", "2001:db8:8000::"),
    ("2001:db8::6/127", "all-v6-127", "2001:db8::6"),
];

fn every_kind_is_held_and_let_go(mut kernel: Kernel) {
    kernel.install(&drop_all(&["all", "other"])).unwrap();
    for repeat in ["new", "extended"] {
        let ops: Vec<_> = KINDS.iter().map(|(text, ..)| ban("all", text, 3_600_000)).collect();
        assert_eq!(kernel.apply(&ops), [], "{repeat}");
        let expect = KINDS.iter().map(|(_, set, value)| element(set, value, Some(3600))).collect();
        assert_eq!(elements("band"), expect, "{repeat}");
        let expect = KINDS.iter().map(|(text, ..)| ("all".to_owned(), net(text), true)).collect();
        assert_eq!(held(&mut kernel), expect, "{repeat}");
    }
    for (text, ..) in KINDS {
        let found = kernel.held("all", &net(text)).unwrap().unwrap();
        assert!(found.net == net(text) && found.expires.is_some_and(|left| (3_500_000..=3_600_000).contains(&left.0)));
        assert_eq!(kernel.held("other", &net(text)), Ok(None));
        assert_eq!(kernel.apply(&[unban("all", text), unban("other", text)]), []);
        assert_eq!(kernel.held("all", &net(text)), Ok(None), "{text}");
    }
    assert_eq!(elements("band"), BTreeSet::new());
}

#[test]
fn every_kind_of_network_is_held_and_let_go() {
    private(|| every_kind_is_held_and_let_go(Kernel::open().unwrap()));
}

#[test]
fn every_kind_of_network_is_held_and_let_go_on_old_kernels_too() {
    private(|| every_kind_is_held_and_let_go(Kernel::open_portable().unwrap()));
}

fn the_last_timeout_counts(mut kernel: Kernel) {
    let left = |kernel: &mut Kernel| kernel.held("all", &net("203.0.113.5")).unwrap().map(|held| held.expires);
    kernel.install(&drop_all(&["all"])).unwrap();
    for milliseconds in [60_000, 600_000, 5_000, 0, 7_000, i64::MAX, 9_000] {
        assert_eq!(kernel.apply(&[ban("all", "203.0.113.5", milliseconds)]), [], "{milliseconds}");
        let expect = milliseconds.min(SPAN_MAX.0);
        match left(&mut kernel).expect("it is held") {
            None => assert_eq!(milliseconds, 0),
            Some(left) => assert!((expect - 4_000..=expect + 4).contains(&left.0), "{milliseconds}: {left:?}"),
        }
    }
    let ops = [ban("all", "203.0.113.5", 1000), unban("all", "203.0.113.5"), ban("all", "203.0.113.5", 50_000)];
    assert_eq!(kernel.apply(&ops), []);
    assert!(left(&mut kernel).flatten().unwrap().0 > 40_000, "the last op of one call wins");
    assert_eq!(kernel.apply(&ops[..2]), []);
    assert_eq!(left(&mut kernel), None);
}

#[test]
fn the_last_timeout_counts_be_it_longer_or_shorter() {
    private(|| {
        the_last_timeout_counts(Kernel::open().unwrap());
        run("nft", "flush ruleset");
        the_last_timeout_counts(Kernel::open_portable().unwrap());
    });
}

#[test]
fn a_ban_ends_by_itself() {
    private(|| {
        let mut kernel = installed(&drop_all(&["all"]));
        let start = Instant::now();
        let over = Op::Ban { scope: "all".to_owned(), net: net("203.0.113.7"), timeout: Some(Span(-1)) };
        let ops = [ban("all", "203.0.113.5", 300), ban("all", "203.0.113.6", 60_000), over];
        assert_eq!(kernel.apply(&ops), []);
        assert!(kernel.held("all", &net("203.0.113.5")).unwrap().is_some());
        wait_until("the ban is over", SOON, || {
            kernel.held("all", &net("203.0.113.5")).unwrap().is_none().then_some(())
        });
        assert!(start.elapsed() >= Duration::from_millis(290), "not before its time");
        assert_eq!(held(&mut kernel), BTreeSet::from([("all".to_owned(), net("203.0.113.6"), true)]));
    });
}

#[test]
fn a_hundred_thousand_bans_go_in_one_call() {
    private(|| {
        let mut kernel = installed(&drop_all(&["all"]));
        let address = |i: u32| IpNet::from(IpAddr::from(Ipv4Addr::from_bits(0x0a00_0000 + i)));
        let ops: Vec<_> = (0..100_000)
            .map(|i| Op::Ban { scope: "all".to_owned(), net: address(i), timeout: Some(Span(3_600_000)) })
            .collect();
        assert_eq!(kernel.apply(&ops), []);
        let held = held(&mut kernel);
        assert_eq!(held.len(), 100_000);
        assert!((0..100_000).all(|i| held.contains(&("all".to_owned(), address(i), true))));
    });
}

#[test]
fn six_thousand_networks_of_ipv6_fit_into_their_messages() {
    private(|| {
        let mut kernel = installed(&drop_all(&["all"]));
        let ops: Vec<_> = (0..6000).map(|i| ban("all", &format!("2001:db8:{i:x}::/64"), 3_600_000)).collect();
        assert_eq!(kernel.apply(&ops), []);
        assert_eq!(held(&mut kernel).len(), 6000);
        let ops: Vec<_> = (0..6000).map(|i| unban("all", &format!("2001:db8:{i:x}::/64"))).collect();
        assert_eq!(kernel.apply(&ops), []);
        assert_eq!(held(&mut kernel).len(), 0);
    });
}

#[test]
fn a_new_process_adopts_what_the_old_one_left() {
    private(|| {
        let layout = drop_all(&["all", "sshd"]);
        let ops = [ban("all", "203.0.113.5", 60_000), ban("sshd", "203.0.113.0/24", 0), ban("all", "2001:db8::/47", 0)];
        for mut old in [Kernel::open().unwrap().uncounted(), Kernel::open().unwrap()] {
            run("nft", "flush ruleset");
            old.install(&layout).unwrap();
            assert_eq!(old.apply(&ops), []);
            let before = held(&mut old);
            assert_eq!(before.len(), 3);
            let printed_before = printed("band");
            drop(old);
            for mut new in [Kernel::open().unwrap(), Kernel::open_portable().unwrap()] {
                new.install(&layout).unwrap();
                new.install(&layout).unwrap();
                assert_eq!(held(&mut new), before);
                assert_eq!(sorted_lines(&printed("band")), sorted_lines(&printed_before));
                assert_eq!(sorted_lines(&new.describe()), sorted_lines(&printed_before));
                assert!(new.is_intact().unwrap());
                assert_eq!(new.apply(&[unban("all", "2001:db8::/47"), ban("all", "2001:db8::/47", 0)]), []);
            }
        }
    });
}

#[test]
fn a_changed_layout_keeps_the_bans_of_the_scopes_that_stay() {
    private(|| {
        let mut kernel = installed(&drop_all(&["all", "sshd", "pbx"]));
        let ops = [ban("all", "203.0.113.5", 0), ban("sshd", "203.0.113.0/24", 0), ban("pbx", "2001:db8::/64", 0)];
        assert_eq!(kernel.apply(&ops), []);
        let mut layout = drop_all(&["web", "pbx", "all"]);
        layout.allow.push(net("10.0.0.0/8"));
        layout.scopes[1].action = Action::Reject;
        kernel.install(&layout).unwrap();
        let expect = [("all", "203.0.113.5"), ("pbx", "2001:db8::/64")];
        assert_eq!(held(&mut kernel), expect.map(|(scope, text)| (scope.to_owned(), net(text), false)).into());
        assert_eq!(sorted_lines(&printed("band")), sorted_lines(&kernel.describe()));
        assert!(!printed("band").contains("sshd"), "the scope that went left nothing behind");
        let unknown = kernel.apply(&[ban("sshd", "203.0.113.5", 0)]);
        assert_eq!(unknown, [(0, Error::UnknownScope("sshd".to_owned()))]);
    });
}

#[test]
fn a_length_nobody_is_banned_by_is_given_up_at_the_next_install() {
    private(|| {
        let mut kernel = installed(&drop_all(&["all"]));
        assert_eq!(kernel.apply(&[ban("all", "203.0.113.0/24", 0), ban("all", "198.51.0.0/16", 0)]), []);
        assert_eq!(kernel.apply(&[unban("all", "203.0.113.0/24")]), []);
        kernel.install(&drop_all(&["all"])).unwrap();
        assert!(printed("band").contains("all-v4-16"));
        // Kernels before 6.18 do not tell how many elements a set has: there it stays.
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
        let tells = (numbers.next(), numbers.next()) >= (Some(6), Some(18));
        assert_eq!(printed("band").contains("all-v4-24"), !tells, "{release}");
        assert_eq!(sorted_lines(&printed("band")), sorted_lines(&kernel.describe()));
        assert_eq!(kernel.apply(&[ban("all", "203.0.113.0/24", 0)]), []);
        assert_eq!(held(&mut kernel).len(), 2);
        assert!(kernel.is_intact().unwrap());
    });
}

#[test]
fn foreign_things_in_our_table_are_put_right_and_other_tables_are_left_alone() {
    private(|| {
        run("nft", "add table ip other");
        run("nft", "add set ip other all-v4 { type ipv4_addr ; }");
        run("nft", "add element ip other all-v4 { 203.0.113.9 }");
        run("nft", "add chain ip other prerouting { type filter hook prerouting priority -400 ; }");
        run("nft", "add rule ip other prerouting ip saddr @all-v4 counter drop");
        let other = run("nft", "list table ip other");
        // Our names with other kinds, a dormant table, and things that refer to each other.
        run("nft", "add table inet band { flags dormant ; }");
        run("nft", "add set inet band all-v4 { type ipv4_addr ; flags interval ; size 5 ; }");
        run("nft", "add set inet band allow4 { type ipv6_addr ; }");
        run("nft", "add chain inet band prerouting { type filter hook prerouting priority 7 ; policy drop ; }");
        run("nft", "add chain inet band stray");
        run("nft", "add map inet band verdicts { type ipv4_addr : verdict ; }");
        run("nft", "add element inet band verdicts { 203.0.113.1 : jump stray }");
        run("nft", "add rule inet band prerouting ip saddr vmap @verdicts");
        run("nft", "add rule inet band prerouting tcp dport { 1, 2 } drop");
        let mut kernel = installed(&drop_all(&["all"]));
        assert_eq!(sorted_lines(&printed("band")), sorted_lines(&kernel.describe()));
        assert!(kernel.is_intact().unwrap());
        assert_eq!(kernel.apply(&[ban("all", "203.0.113.5", 0)]), []);
        assert_eq!(run("nft", "list table ip other"), other);
        run("nft", "flush table inet band");
        assert_eq!(kernel.is_intact(), Ok(false));
        kernel.install(&drop_all(&["all"])).unwrap();
        assert_eq!(run("nft", "list table ip other"), other);
        assert_eq!(held(&mut kernel).len(), 1, "flush table deletes rules, not elements");
    });
}

#[test]
fn each_meddling_is_noticed() {
    private(|| {
        let layout = drop_all(&["all", "sshd"]);
        let mut kernel = installed(&layout);
        let rule = |text: &str| {
            let ruleset = run("nft", "-a list table inet band");
            let line = ruleset.lines().find(|line| line.contains(text)).unwrap().to_owned();
            line.rsplit(' ').next().unwrap().to_owned()
        };
        let meddlings: [&dyn Fn() -> String; 8] = [
            &|| "delete table inet band".to_owned(),
            &|| "flush chain inet band sshd-ban".to_owned(),
            &|| "add rule inet band prerouting accept".to_owned(),
            &|| "insert rule inet band all-ban accept".to_owned(),
            &|| format!("delete rule inet band prerouting handle {}", rule("@all-v4 jump")),
            &|| format!("replace rule inet band prerouting handle {} accept", rule("@all-v4 jump")),
            &|| "add table inet band { flags dormant ; }".to_owned(),
            &|| "add chain inet band prerouting { policy drop ; }".to_owned(),
        ];
        for meddling in meddlings {
            assert_eq!(kernel.is_intact(), Ok(true));
            let command = meddling();
            run("nft", &command);
            assert_eq!(kernel.is_intact(), Ok(false), "{command}");
            kernel.install(&layout).unwrap();
            assert_eq!(sorted_lines(&printed("band")), sorted_lines(&kernel.describe()), "{command}");
        }
        run("nft", "add table ip other");
        assert_eq!(kernel.is_intact(), Ok(true), "somebody else's table is not our business");
    });
}

#[test]
fn a_flush_by_somebody_else_is_heard_and_repaired() {
    private(|| {
        let mut monitor = Monitor::open().unwrap();
        let mut next = move || -> Change {
            assert!(readable(&monitor, SOON), "no change was heard");
            wait_until("the change is read", SOON, || monitor.next())
        };
        // Two from trying out the kernel may have come, or more: the install is the last of ours.
        let mut kernel = installed(&drop_all(&["all"]));
        assert_eq!(kernel.apply(&[ban("all", "203.0.113.5", 0)]), []);
        run("nft", "flush ruleset");
        let mut own = 0;
        let change = loop {
            let change = next();
            assert!(!change.overflow);
            if change.port_id != kernel.port_id() {
                break change;
            }
            assert_eq!(change.pid, rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned());
            own += 1;
        };
        assert!(own >= 2, "install and apply were heard too");
        assert_eq!(change.name, "nft");
        assert!(change.pid != 0 && change.generation > 0);
        assert_eq!(kernel.is_intact(), Ok(false));
        let gone = || Error::Gone("band".to_owned());
        assert_eq!(
            kernel.apply(&[ban("all", "203.0.113.5", 0), unban("all", "203.0.113.6")]),
            [(0, gone()), (1, gone())]
        );
        assert_eq!(kernel.dump(), Err(gone()));
        assert_eq!(kernel.held("all", &net("203.0.113.5")), Err(gone()));
        kernel.install(&drop_all(&["all"])).unwrap();
        assert_eq!(kernel.apply(&[ban("all", "203.0.113.5", 0)]), []);
        assert!(kernel.is_intact().unwrap());
        assert_eq!(held(&mut kernel).len(), 1);
        assert_eq!([next(), next()].map(|change| change.port_id), [kernel.port_id(); 2]);
    });
}

#[test]
fn a_monitor_nobody_reads_reports_the_loss() {
    private(|| {
        let mut monitor = Monitor::open().unwrap();
        let mut kernel = installed(&drop_all(&["all"]));
        let op = [ban("all", "203.0.113.5", 0)];
        (0..5000).for_each(|_| assert_eq!(kernel.apply(&op), []));
        let changes: Vec<Change> = std::iter::from_fn(|| monitor.next()).collect();
        assert_eq!(changes.iter().filter(|change| change.overflow).count(), 1);
        assert_eq!(kernel.apply(&op), []);
        assert!(monitor.next().is_some_and(|change| !change.overflow), "and it goes on afterwards");
    });
}

#[test]
fn one_bad_op_does_not_harm_a_thousand_good_ones() {
    private(|| {
        let mut kernel = installed(&drop_all(&["all", "full", "gone"]));
        // The kernel refuses more than 8 elements here and knows nothing of "gone".
        for set in ["full-v4", "gone-v4"] {
            let ruleset = run("nft", "-a list table inet band");
            let line = ruleset.lines().find(|line| line.contains(&format!("@{set} jump"))).unwrap().to_owned();
            run("nft", &format!("delete rule inet band prerouting handle {}", line.rsplit(' ').next().unwrap()));
            run("nft", &format!("delete set inet band {set}"));
        }
        run("nft", "add set inet band full-v4 { type ipv4_addr ; flags timeout ; size 8 ; }");
        let mut ops: Vec<_> = (0..1000).map(|i| ban("all", &format!("10.0.{}.{}", i / 250, i % 250), 60_000)).collect();
        ops.extend((0..9).map(|i| ban("full", &format!("10.9.0.{i}"), 60_000)));
        ops.insert(500, ban("gone", "10.8.0.1", 60_000));
        ops.insert(700, ban("nowhere", "10.8.0.1", 60_000));
        let failed = kernel.apply(&ops);
        assert_eq!(failed.len(), 3, "{failed:?}");
        assert_eq!(failed[0], (500, Error::Gone("band".to_owned())));
        assert_eq!(failed[1], (700, Error::UnknownScope("nowhere".to_owned())));
        assert!(failed[2].0 >= 1002 && matches!(failed[2].1, Error::Kernel { .. }), "{failed:?}");
        let elements = elements("band");
        assert_eq!(elements.iter().filter(|(set, ..)| set == "all-v4").count(), 1000);
        assert_eq!(elements.iter().filter(|(set, ..)| set == "full-v4").count(), 8);
    });
}

#[test]
fn many_refusals_do_not_take_for_ever() {
    private(|| {
        let mut kernel = installed(&drop_all(&["full"]));
        run("nft", "flush chain inet band prerouting");
        run("nft", "delete set inet band full-v4");
        run("nft", "add set inet band full-v4 { type ipv4_addr ; flags timeout ; size 1 ; }");
        let ops: Vec<_> = (0..5000).map(|i| ban("full", &format!("10.9.{}.{}", i / 250, i % 250), 60_000)).collect();
        let start = Instant::now();
        let failed = kernel.apply(&ops);
        assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
        assert_eq!(failed.len(), 4999);
        assert_eq!(held(&mut kernel).len(), 1);
    });
}

#[test]
fn a_table_owned_by_somebody_else_is_told_apart_from_missing_rights() {
    private(|| {
        let mut nft = std::process::Command::new("nft")
            .arg("-i")
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let commands = b"add table inet band { flags owner ; }\n";
        std::io::Write::write_all(nft.stdin.as_mut().unwrap(), commands).unwrap();
        wait_until("nft owns the table", SOON, || run("nft", "list ruleset").contains("band").then_some(()));
        let mut kernel = Kernel::open().unwrap();
        assert_eq!(kernel.install(&drop_all(&["all"])), Err(Error::Owned("band".to_owned())));
        drop(nft.stdin.take());
        nft.wait().unwrap();
        wait_until("the table went with its owner", SOON, || kernel.install(&drop_all(&["all"])).ok());
    });
}

#[test]
fn without_the_capability_we_say_how_to_get_it() {
    private(|| {
        let mut kernel = installed(&drop_all(&["all"]));
        let mut sets = rustix::thread::capabilities(None).unwrap();
        sets.effective.remove(rustix::thread::CapabilitySet::NET_ADMIN);
        rustix::thread::set_capabilities(None, sets).unwrap();
        let why = Kernel::open().err();
        assert_eq!(why, Some(Error::Permission));
        assert!(why.unwrap().to_string().contains("AmbientCapabilities=CAP_NET_ADMIN"));
        assert_eq!(Monitor::open().err(), Some(Error::Permission));
        assert_eq!(kernel.apply(&[ban("all", "203.0.113.5", 0)]), [(0, Error::Permission)]);
        assert_eq!(kernel.install(&drop_all(&["all"])), Err(Error::Permission));
        assert_eq!(kernel.dump(), Err(Error::Permission));
    });
}

#[test]
fn opening_and_removing_leave_no_trace() {
    private(|| {
        let mut kernel = Kernel::open().unwrap();
        assert_eq!(run("nft", "list ruleset"), "");
        kernel.install(&many_scopes()).unwrap();
        assert_eq!(kernel.apply(&[ban("all", "203.0.113.5", 0)]), []);
        assert_eq!([kernel.remove("band"), kernel.remove("band")], [Ok(()), Ok(())]);
        assert_eq!(run("nft", "list ruleset"), "");
    });
}

#[test]
fn an_install_succeeds_while_others_keep_changing_rules() {
    private(|| {
        let mut kernel = Kernel::open().unwrap();
        let mut busy = Kernel::open().unwrap();
        let other = Layout { table: "other".to_owned(), ..drop_all(&["all"]) };
        busy.install(&other).unwrap();
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|threads| {
            threads.spawn(|| {
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    assert_eq!(busy.apply(&[ban("all", "203.0.113.5", 0)]), []);
                }
            });
            let installs: Vec<_> = (0..50).map(|_| kernel.install(&drop_all(&["all", "sshd"]))).collect();
            done.store(true, std::sync::atomic::Ordering::Relaxed);
            assert!(installs.iter().all(Result::is_ok), "{installs:?}");
        });
        assert!(kernel.is_intact().unwrap() && busy.is_intact().unwrap());
    });
}
