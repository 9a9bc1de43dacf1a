//! What the configuration says, typed: a tree comes in, options with defaults filled in go out, complaints beside them.

use std::path::PathBuf;

use ipnet::IpNet;
use jiff::tz::TimeZone;

use super::ports::{PortRange, Ports, Services, built_in_services, merge, parse_ports, resolve};
use crate::engine::address::parse_net;
use crate::engine::filter::definition::NORMAL;
use crate::engine::jail::Policy;
use crate::engine::ledger::Growth;
use crate::engine::time::Span;
use crate::engine::tree::{Complaints, Node, Section, Value};

/// The jails that exist without being configured (off until they are switched on).
pub const BUILT_IN_JAILS: &[&str] = &[
    "sshd",
    "asterisk",
    "asterisk-ami",
    "asterisk-iax",
    "nginx-auth",
    "nginx-limit",
    "nginx-scan",
    "nginx-bad-request",
    "nginx-forbidden",
    "dropbear",
    "recidive",
];

/// The jail that counts bans instead of lines.
pub const RECIDIVE: &str = "recidive";
/// Bans made by hand without a jail.
pub const MANUAL: &str = "manual";
/// Addresses with failures that are remembered at most: about 100 MB.
const TRACKED_MAX: usize = 1_000_000;

/// Everything the configuration says.
#[derive(Clone, Debug)]
pub struct Config {
    /// Never banned.
    pub allow: Vec<IpNet>,
    /// The machine's own addresses are never banned.
    pub ignoreself: bool,
    /// Addresses with failures remembered at most.
    pub tracked_max: usize,
    /// The jails, switched on or not, in order of name.
    pub jails: Vec<JailConfig>,
    /// The policy of bans by hand.
    pub defaults: Policy,
    /// Names for ports.
    pub services: Services,
    /// Where things are.
    pub paths: Paths,
    /// The kernel's sets.
    pub nftables: NftablesConfig,
}

/// Where things are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    /// What survives.
    pub state: PathBuf,
    /// The control socket.
    pub socket: PathBuf,
    /// Filters that replace built-in ones.
    pub filters: PathBuf,
}

/// How bans reach the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NftablesConfig {
    /// Off = bans are only kept and shown.
    pub enabled: bool,
    /// The table's name (family inet).
    pub table: String,
}

/// What happens to packets of the banned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// They vanish.
    Drop,
    /// They are answered: TCP reset, otherwise ICMP.
    Reject,
}

/// One jail.
#[derive(Clone, Debug)]
pub struct JailConfig {
    /// Its name.
    pub name: String,
    /// It is switched on.
    pub enabled: bool,
    /// Its filter's name.
    pub filter: String,
    /// The filter's mode.
    pub mode: String,
    /// Its logs; empty = where the filter says they usually are.
    pub logs: Vec<String>,
    /// What it shuts out.
    pub ports: Ports,
    /// How.
    pub action: Action,
    /// The zone of stamps without one; `None` = the system's.
    pub timezone: Option<TimeZone>,
    /// When it bans and for how long.
    pub policy: Policy,
    /// Where it stands, for later complaints.
    pub node: Node,
}

impl Config {
    /// Reads the merged tree.
    pub fn read(root: &Node, complaints: &mut Complaints) -> Self {
        let mut section = Section::new(root, "", complaints);
        let sections = ["defaults", "allow", "services", "paths", "enforce", "jails"].map(|key| section.node(key));
        for later in ["fleet", "firewall", "network", "web"] {
            if let Some(node) = section.node(later) {
                section.complain(node, format!("[{later}] is not part of this version yet; take the section out"));
            }
        }
        section.finish();
        let [defaults, allow, services, paths, enforce, jails] = sections;
        let empty = Node::empty(&root.file);
        let (defaults, own) = read_defaults(defaults.unwrap_or(&empty), complaints);
        let services = read_services(services.unwrap_or(&empty), complaints);
        let mut config = Self {
            allow: read_allow(allow.unwrap_or(&empty), complaints),
            ignoreself: own.ignoreself,
            tracked_max: own.tracked_max,
            jails: Vec::new(),
            defaults,
            services,
            paths: read_paths(paths.unwrap_or(&empty), complaints),
            nftables: read_enforce(enforce.unwrap_or(&empty), complaints),
        };
        config.jails = read_jails(jails.unwrap_or(&empty), &config, complaints);
        config
    }

    /// The jails that are switched on.
    pub fn enabled(&self) -> impl Iterator<Item = &JailConfig> {
        self.jails.iter().filter(|jail| jail.enabled)
    }
}

struct Own {
    ignoreself: bool,
    tracked_max: usize,
}

fn read_defaults(node: &Node, complaints: &mut Complaints) -> (Policy, Own) {
    let mut section = Section::new(node, "defaults", complaints);
    let policy = read_policy(&mut section, &Policy::default());
    let own = Own {
        ignoreself: section.boolean("ignoreself").unwrap_or(true),
        tracked_max: section
            .integer("tracked_max", 1000..=100_000_000)
            .and_then(|most| usize::try_from(most).ok())
            .unwrap_or(TRACKED_MAX),
    };
    section.finish();
    (policy, own)
}

/// What MikoPBX calls weak, normal, enhanced and paranoid: attempts, within, block for.
fn preset(name: &str) -> Option<(u32, i64, i64)> {
    Some(match name {
        "weak" => (20, 600, 600),
        "normal" => (10, 3600, 86_400),
        "enhanced" => (5, 21_600, 604_800),
        "paranoid" => (3, 86_400, 2_592_000),
        _ => return None,
    })
}

fn read_policy(section: &mut Section<'_, '_>, base: &Policy) -> Policy {
    let mut policy = base.clone();
    if let Some(name) = section.string("preset") {
        match preset(&name) {
            Some((maxretry, findtime, bantime)) => {
                policy.maxretry = maxretry;
                policy.findtime = Span::from_seconds(findtime);
                policy.bantime = Some(Span::from_seconds(bantime));
            }
            None => {
                if let Some(node) = section.node("preset") {
                    section.complain(
                        node,
                        format!("preset \"{name}\" is not known; write weak, normal, enhanced or paranoid"),
                    );
                }
            }
        }
    }
    if let Some(maxretry) = section.integer("maxretry", 1..=100_000) {
        policy.maxretry = u32::try_from(maxretry).unwrap_or(policy.maxretry);
    }
    if let Some(findtime) = section.span("findtime") {
        policy.findtime = findtime;
    }
    if let Some(bantime) = section.span_or_forever("bantime") {
        policy.bantime = bantime;
    }
    if let Some(prefix) = section.integer("ipv6_prefix", 16..=128) {
        policy.ipv6_prefix = u8::try_from(prefix).unwrap_or(policy.ipv6_prefix);
    }
    if let Some(node) = section.node("bantime_growth") {
        policy.growth = read_growth(node, section);
    }
    policy
}

fn read_growth(node: &Node, outer: &mut Section<'_, '_>) -> Option<Growth> {
    if matches!(node.value, Value::Boolean(false)) {
        return None;
    }
    let mut section = Section::new(node, "bantime_growth", outer.complaints());
    let factor = section.number("factor").unwrap_or(2.0);
    if !(1.0..=1000.0).contains(&factor) {
        section.complain(node, "factor must be from 1 to 1000; 2 doubles each ban");
    }
    let growth = Growth {
        factor,
        max: section.span("max").unwrap_or(Span::from_seconds(30 * 86_400)),
        forget: section.span("forget").unwrap_or(Span::from_seconds(90 * 86_400)),
    };
    section.finish();
    Some(growth)
}

fn read_allow(node: &Node, complaints: &mut Complaints) -> Vec<IpNet> {
    let mut section = Section::new(node, "allow", complaints);
    let mut networks = Vec::new();
    for (text, node) in section.strings("networks").unwrap_or_default() {
        for part in text.split([' ', ',', ';', '\n', '\t']).filter(|part| !part.is_empty()) {
            match parse_net(part) {
                Ok(net) => networks.push(net),
                Err(why) => section.complain(node, why),
            }
        }
    }
    section.finish();
    networks
}

fn read_services(node: &Node, complaints: &mut Complaints) -> Services {
    let mut services = built_in_services();
    for (name, node) in node.entries() {
        let texts: Vec<&Node> = match &node.value {
            Value::Array(items) => items.iter().collect(),
            _ => vec![node],
        };
        let mut ranges = Vec::new();
        for item in texts {
            match &item.value {
                Value::String(text) => match parse_ports(text) {
                    Ok(parsed) => ranges.extend(parsed),
                    Err(why) => complaints.push(item.complaint(format!("service {name}: {why}"))),
                },
                _ => {
                    complaints.push(item.complaint(format!("service {name} must be a list of ports like [\"22/tcp\"]")))
                }
            }
        }
        services.insert(name.clone(), merge(ranges));
    }
    services
}

fn read_paths(node: &Node, complaints: &mut Complaints) -> Paths {
    let mut section = Section::new(node, "paths", complaints);
    let mut path = |key: &'static str, default: &str| {
        let text = section.string(key).unwrap_or_else(|| default.to_owned());
        if !text.starts_with('/')
            && let Some(node) = section.node(key)
        {
            section.complain(node, format!("{key} = \"{text}\" must be a whole path, from / on"));
        }
        PathBuf::from(text)
    };
    let paths = Paths {
        state: path("state", "/var/lib/band"),
        socket: path("socket", "/run/band/band.sock"),
        filters: path("filters", "/etc/band/filters"),
    };
    section.finish();
    paths
}

fn read_enforce(node: &Node, complaints: &mut Complaints) -> NftablesConfig {
    let mut section = Section::new(node, "enforce", complaints);
    let nftables = section.node("nftables");
    for later in ["redis", "asterisk", "nginx", "hook"] {
        if let Some(node) = section.node(later) {
            section.complain(node, format!("[enforce.{later}] is not part of this version yet; take the section out"));
        }
    }
    section.finish();
    let mut config = NftablesConfig { enabled: true, table: "band".to_owned() };
    let Some(node) = nftables else { return config };
    if let Value::Boolean(enabled) = node.value {
        return NftablesConfig { enabled, ..config };
    }
    let mut section = Section::new(node, "enforce.nftables", complaints);
    config.enabled = section.boolean("enabled").unwrap_or(true);
    if let Some(table) = section.string("table") {
        let legal = !table.is_empty()
            && table.len() <= 64
            && table.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'))
            && table.as_bytes()[0].is_ascii_alphabetic();
        match (legal, section.node("table")) {
            (false, Some(node)) => {
                section.complain(node, format!("table \"{table}\" must be letters, digits, - and _"))
            }
            _ => config.table = table,
        }
    }
    section.finish();
    config
}

fn read_jails(node: &Node, config: &Config, complaints: &mut Complaints) -> Vec<JailConfig> {
    if !matches!(node.value, Value::Table(_)) {
        complaints.push(node.complaint("jails are written as [jails.NAME]"));
    }
    let mut jails: Vec<JailConfig> =
        node.entries().iter().map(|(name, node)| read_jail(name, node, config, complaints)).collect();
    for name in BUILT_IN_JAILS {
        if node.get(name).is_none() {
            let empty = Node::empty(&node.file);
            let jail = read_jail(name, &empty, config, complaints);
            jails.push(JailConfig { enabled: false, ..jail });
        }
    }
    jails.sort_by(|a, b| a.name.cmp(&b.name));
    jails
}

fn read_jail(name: &str, node: &Node, config: &Config, complaints: &mut Complaints) -> JailConfig {
    let mut section = Section::new(node, format!("jails.{name}"), complaints);
    check_name(name, node, &mut section);
    let (filter, mode) = read_filter_choice(name, node, &mut section);
    let base = if name == RECIDIVE {
        let week = Span::from_seconds(604_800);
        Policy { findtime: Span::from_seconds(86_400), bantime: Some(week), ..config.defaults.clone() }
    } else {
        config.defaults.clone()
    };
    let policy = read_policy(&mut section, &base);
    let jail = JailConfig {
        name: name.to_owned(),
        enabled: section.boolean("enabled").unwrap_or(true),
        filter,
        mode,
        logs: read_logs(&mut section),
        ports: read_jail_ports(&mut section, &config.services),
        action: read_action(&mut section),
        timezone: read_timezone(&mut section),
        policy,
        node: node.clone(),
    };
    if let Some(journal) = section.node("journal") {
        section.complain(journal, "reading the journal is not part of this version yet; name the log file in logs");
    }
    section.finish();
    jail
}

fn check_name(name: &str, node: &Node, section: &mut Section<'_, '_>) {
    let legal = !name.is_empty()
        && name.len() <= 64
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'));
    if !legal {
        section.complain(node, format!("jail name \"{name}\" must be letters, digits, - and _, at most 64"));
    }
    if matches!(name, MANUAL | "all") {
        section.complain(node, format!("\"{name}\" has a meaning of its own; call the jail differently"));
    }
}

fn read_filter_choice(name: &str, node: &Node, section: &mut Section<'_, '_>) -> (String, String) {
    let normal = NORMAL.to_owned();
    match section.node("filter") {
        Some(Node { value: Value::String(text), .. }) => (text.clone(), normal),
        Some(inner) => {
            let mut choice = Section::new(inner, format!("jails.{name}.filter"), section.complaints());
            let filter = choice.string("name").unwrap_or_else(|| name.to_owned());
            let mode = choice.string("mode").unwrap_or(normal);
            choice.finish();
            (filter, mode)
        }
        None => {
            if !BUILT_IN_JAILS.contains(&name) && node.line != 0 {
                section.complain(node, format!("jail {name} needs a filter, for example filter = \"sshd\""));
            }
            (name.to_owned(), usual_mode(name).to_owned())
        }
    }
}

/// The mode of a built-in jail that does not name a filter: what probes a server without ever logging in is shut out,
/// too. `filter = "sshd"` counts failed logins only.
fn usual_mode(jail: &str) -> &'static str {
    match jail {
        "sshd" => "aggressive",
        "asterisk" => "scan",
        _ => NORMAL,
    }
}

fn read_logs(section: &mut Section<'_, '_>) -> Vec<String> {
    let mut logs = Vec::new();
    for (text, node) in section.strings("logs").unwrap_or_default() {
        if !text.starts_with('/') {
            section.complain(node, format!("log \"{text}\" must be a whole path, from / on"));
        } else if let Err(error) = glob::Pattern::new(&text) {
            section.complain(node, format!("log \"{text}\" is no valid pattern: {}", error.msg));
        } else {
            logs.push(text);
        }
    }
    logs
}

fn read_jail_ports(section: &mut Section<'_, '_>, services: &Services) -> Ports {
    let Some(texts) = section.strings("ports") else { return Ports::All };
    let mut ranges: Vec<PortRange> = Vec::new();
    for (text, node) in texts {
        match resolve(&text, services) {
            Ok(Ports::All) => return Ports::All,
            Ok(Ports::Some(more)) => ranges.extend(more),
            Err(why) => section.complain(node, why),
        }
    }
    if ranges.is_empty() { Ports::All } else { Ports::Some(merge(ranges)) }
}

fn read_action(section: &mut Section<'_, '_>) -> Action {
    match section.string("action").as_deref() {
        None | Some("drop") => Action::Drop,
        Some("reject") => Action::Reject,
        Some(other) => {
            let message = format!("action \"{other}\" is not known; write \"drop\" or \"reject\"");
            if let Some(node) = section.node("action") {
                section.complain(node, message);
            }
            Action::Drop
        }
    }
}

fn read_timezone(section: &mut Section<'_, '_>) -> Option<TimeZone> {
    let text = section.string("timezone")?;
    match parse_timezone(&text) {
        Ok(zone) => Some(zone),
        Err(why) => {
            if let Some(node) = section.node("timezone") {
                section.complain(node, why);
            }
            None
        }
    }
}

/// Reads an IANA name, a POSIX TZ string, or an offset like `+02:00`.
///
/// # Errors
/// A sentence that says what would be right.
pub fn parse_timezone(text: &str) -> Result<TimeZone, String> {
    if matches!(text, "" | "system" | "local") {
        return Ok(TimeZone::system());
    }
    if let Ok(zone) = TimeZone::get(text) {
        return Ok(zone);
    }
    if let Ok(zone) = TimeZone::posix(text) {
        return Ok(zone);
    }
    let offset = text.strip_prefix("UTC").or_else(|| text.strip_prefix("GMT")).unwrap_or(text);
    if let Ok(zone) = jiff::fmt::strtime::parse("%:z", offset).or_else(|_| jiff::fmt::strtime::parse("%z", offset))
        && let Some(offset) = zone.offset()
    {
        return Ok(TimeZone::fixed(offset));
    }
    Err(format!(
        "time zone \"{text}\" is not known; write a name like \"Europe/Paris\", an offset like \"+02:00\" or a POSIX TZ"
    ))
}
