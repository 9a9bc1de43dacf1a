//! The commands that talk to the daemon, and those about the configuration and generated files.

use std::io::Write;
use std::path::PathBuf;

use serde_json::{Value, json};

use super::replay::complaints;
use super::show::{Table, clean};
use super::{CONFIG, FAILED, Failure, OK, Outcome, UNAVAILABLE};
use crate::config::{DEFAULT_FILE, load};
use crate::control::client::{Client, Error};
use crate::control::protocol::{REQUEST_BYTES_MAX, Reply, Request};
use crate::engine::address::{parse_net, show_net};

/// The words of `banctl list`.
#[derive(clap::Args, Debug)]
pub struct ListWords {
    /// Only bans of this jail.
    #[arg(long, short)]
    jail: Option<String>,
    /// Only bans that this address or network touches.
    net: Option<String>,
}

/// The words of `banctl ban`.
#[derive(clap::Args, Debug)]
pub struct BanWords {
    /// Addresses or networks.
    #[arg(required = true, value_name = "ADDRESS|NET")]
    nets: Vec<String>,
    /// The jail it belongs to (its ports, its list); `manual` shuts out everything.
    #[arg(long, short)]
    jail: Option<String>,
    /// How long: `90s`, `1h`, `7d`, `forever`; the jail's bantime if left out.
    #[arg(long = "for", value_name = "SPAN")]
    span: Option<String>,
    /// Why, for those who look later.
    #[arg(long)]
    reason: Option<String>,
}

/// The words of `banctl unban`.
#[derive(clap::Args, Debug)]
pub struct UnbanWords {
    /// Addresses or networks; a network lets in everything inside it.
    #[arg(required_unless_present = "all", value_name = "ADDRESS|NET")]
    nets: Vec<String>,
    /// Everybody.
    #[arg(long, conflicts_with = "nets")]
    all: bool,
    /// Only from this jail.
    #[arg(long, short)]
    jail: Option<String>,
}

/// The words of `banctl why`.
#[derive(clap::Args, Debug)]
pub struct WhyWords {
    /// The address or network.
    #[arg(value_name = "ADDRESS|NET")]
    net: String,
}

/// The words of `banctl allow`.
#[derive(clap::Subcommand, Debug)]
pub enum AllowWords {
    /// Never ban this network, from now on; bans inside it are lifted at once.
    Add {
        /// The network.
        net: String,
        /// Only for so long.
        #[arg(long = "for", value_name = "SPAN")]
        span: Option<String>,
        /// Why, for those who look later.
        #[arg(long)]
        note: Option<String>,
    },
    /// Take a network off the list.
    Remove {
        /// The network.
        net: String,
    },
    /// Everything on the list.
    List,
}

/// The words of `banctl jail`.
#[derive(clap::Subcommand, Debug)]
pub enum JailWords {
    /// All jails.
    List,
    /// One jail.
    Show {
        /// Its name.
        name: String,
    },
}

/// The words of `banctl config`.
#[derive(clap::Subcommand, Debug)]
pub enum ConfigWords {
    /// Every complaint about a configuration, at once.
    Check {
        /// The configuration's file.
        file: Option<PathBuf>,
    },
}

/// The words of `banctl generate`.
#[derive(clap::Subcommand, Debug)]
pub enum GenerateWords {
    /// The systemd unit.
    Unit,
    /// A configuration to start from.
    Config,
}

/// The systemd unit, as it is installed.
pub const UNIT: &str = include_str!("../../packaging/band.service");
/// The configuration, as it is installed.
pub const EXAMPLE: &str = include_str!("../../packaging/band.toml");

/// A network takes 46 bytes at most (`"ffff:…:ffff/128",`), so many leave room for the rest of a request.
const NETS_PER_REQUEST: usize = REQUEST_BYTES_MAX / 64;

/// How to reach the daemon, and how to show what it says.
#[derive(Debug)]
pub struct Daemon {
    /// Its socket.
    pub socket: PathBuf,
    /// JSON instead of tables.
    pub json: bool,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let code = if matches!(error, Error::Absent(_)) { UNAVAILABLE } else { FAILED };
        Self::with_code(code, error.to_string())
    }
}

impl Daemon {
    fn ask(&self, request: &Request) -> Result<Reply, Failure> {
        let reply = Client::connect(&self.socket)?.ask(request)?;
        if reply.ok {
            return Ok(reply);
        }
        let code = if reply.code == OK { FAILED } else { reply.code };
        Err(Failure::with_code(code, reply.message))
    }

    /// Asks, and shows the data as JSON or as `people` want it.
    fn show(
        &self,
        request: &Request,
        out: &mut dyn Write,
        people: impl FnOnce(&Reply, &mut dyn Write) -> Outcome,
    ) -> Outcome {
        let reply = self.ask(request)?;
        if self.json { Ok(writeln!(out, "{}", reply.data)?) } else { people(&reply, out) }
    }

    /// Asks for many networks in as many requests as it takes; nothing is asked before everything is understood. A part
    /// that is refused does not keep the others back.
    fn in_parts(&self, nets: &[String], request: impl Fn(Vec<String>) -> Request, out: &mut dyn Write) -> Outcome {
        let read = |net: &String| parse_net(net).map(|net| show_net(&net));
        let nets = nets.iter().map(read).collect::<Result<Vec<_>, _>>().map_err(Failure::new)?;
        if nets.len() <= NETS_PER_REQUEST {
            return self.show(&request(nets), out, message);
        }
        let (mut data, mut refused) = (Vec::new(), None);
        for part in nets.chunks(NETS_PER_REQUEST) {
            match self.ask(&request(part.to_vec())) {
                Ok(reply) if self.json => data.extend(items(&reply.data).cloned()),
                Ok(reply) => message(&reply, out)?,
                Err(failure) if failure.code == UNAVAILABLE => return Err(failure),
                Err(failure) => drop(refused.get_or_insert(failure)),
            }
        }
        match refused {
            Some(failure) => Err(failure),
            None if self.json => Ok(writeln!(out, "{}", json!(data))?),
            None => Ok(()),
        }
    }

    /// `banctl status`.
    pub fn status(&self, out: &mut dyn Write) -> Outcome {
        self.show(&Request::Status, out, |reply, out| status(&reply.data, out))
    }

    /// `banctl list`.
    pub fn list(&self, words: &ListWords, out: &mut dyn Write) -> Outcome {
        let request = Request::List { jail: words.jail.clone(), net: words.net.clone() };
        self.show(&request, out, |reply, out| {
            let mut table = Table::new(&["ADDRESS", "JAIL", "UNTIL", "FAILURES", "ORIGIN"]);
            for ban in items(&reply.data) {
                let until = if ban["until"].is_null() { "forever".to_owned() } else { local(&ban["until"]) };
                table.row(&[
                    &text(&ban["address"]),
                    &text(&ban["jail"]),
                    &until,
                    &ban["failures"].to_string(),
                    &text(&ban["origin"]),
                ]);
            }
            if table.is_empty() {
                return Ok(writeln!(out, "nobody is banned")?);
            }
            Ok(table.write(out)?)
        })
    }

    /// `banctl ban`.
    pub fn ban(&self, words: &BanWords, out: &mut dyn Write) -> Outcome {
        let request = |nets| Request::Ban {
            nets,
            jail: words.jail.clone(),
            span: words.span.clone(),
            reason: words.reason.clone(),
        };
        self.in_parts(&words.nets, request, out)
    }

    /// `banctl unban`.
    pub fn unban(&self, words: &UnbanWords, out: &mut dyn Write) -> Outcome {
        let request = |nets| Request::Unban { nets, all: words.all, jail: words.jail.clone() };
        self.in_parts(&words.nets, request, out)
    }

    /// `banctl why`.
    pub fn why(&self, words: &WhyWords, out: &mut dyn Write) -> Outcome {
        self.show(&Request::Why { net: words.net.clone() }, out, |reply, out| why(&reply.data, out))
    }

    /// `banctl allow`.
    pub fn allow(&self, words: &AllowWords, out: &mut dyn Write) -> Outcome {
        match words {
            AllowWords::Add { net, span, note } => {
                let request = Request::AllowAdd { net: net.clone(), span: span.clone(), note: note.clone() };
                self.show(&request, out, message)
            }
            AllowWords::Remove { net } => self.show(&Request::AllowRemove { net: net.clone() }, out, message),
            AllowWords::List => self.show(&Request::AllowList, out, |reply, out| {
                let mut table = Table::new(&["NETWORK", "FROM", "UNTIL", "NOTE"]);
                for entry in items(&reply.data) {
                    let until = if entry["until"].is_null() { "-".to_owned() } else { local(&entry["until"]) };
                    table.row(&[&text(&entry["network"]), &text(&entry["from"]), &until, &text(&entry["note"])]);
                }
                Ok(table.write(out)?)
            }),
        }
    }

    /// `banctl reload`.
    pub fn reload(&self, out: &mut dyn Write) -> Outcome {
        self.show(&Request::Reload, out, message)
    }

    /// `banctl rules`.
    pub fn rules(&self, out: &mut dyn Write) -> Outcome {
        self.show(&Request::Rules, out, |reply, out| Ok(out.write_all(text(&reply.data).as_bytes())?))
    }

    /// `banctl watch`.
    pub fn watch(&self, out: &mut dyn Write) -> Outcome {
        let mut client = Client::connect(&self.socket)?;
        let reply = client.ask(&Request::Watch)?;
        if !reply.ok {
            return Err(Failure::with_code(reply.code, reply.message));
        }
        out.flush()?;
        while let Some(line) = client.next_line()? {
            if self.json {
                out.write_all(line.as_bytes())?;
            } else if let Ok(event) = serde_json::from_str::<Value>(&line) {
                let (what, jail, address) = (text(&event["event"]), text(&event["jail"]), text(&event["address"]));
                let until = if event["until"].is_string() {
                    format!(" until {}", local(&event["until"]))
                } else {
                    String::new()
                };
                writeln!(out, "{} {what:8} {address} ({jail}){until}", local(&event["at"]))?;
            }
            out.flush()?;
        }
        Err(Failure::with_code(UNAVAILABLE, "band has stopped"))
    }

    /// `banctl jail`.
    pub fn jail(&self, words: &JailWords, out: &mut dyn Write) -> Outcome {
        let reply = self.ask(&Request::JailList)?;
        let wanted = match words {
            JailWords::List => None,
            JailWords::Show { name } => Some(name.as_str()),
        };
        let jails: Vec<&Value> =
            items(&reply.data).filter(|jail| wanted.is_none_or(|name| jail["name"] == name)).collect();
        if let (true, Some(name)) = (jails.is_empty(), wanted) {
            return Err(Failure::new(format!("there is no jail \"{name}\"; banctl jail list shows them")));
        }
        if self.json {
            return Ok(writeln!(out, "{}", json!(jails))?);
        }
        let mut table = Table::new(&["JAIL", "ON", "FILTER", "ATTEMPTS", "WITHIN", "BLOCK FOR", "PORTS"]);
        for jail in jails {
            let on = if jail["enabled"] == true { "yes" } else { "no" };
            let cells = ["filter", "maxretry", "findtime", "bantime", "ports"].map(|key| text(&jail[key]));
            let filter = cells[0].trim_end_matches("[normal]");
            table.row(&[&text(&jail["name"]), on, filter, &cells[1], &cells[2], &cells[3], &cells[4]]);
        }
        Ok(table.write(out)?)
    }
}

fn message(reply: &Reply, out: &mut dyn Write) -> Outcome {
    Ok(writeln!(out, "{}", clean(&reply.message).replace("\\n", "\n"))?)
}

fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        other => other.to_string(),
    }
}

/// A moment of the wire in the local zone.
fn local(value: &Value) -> String {
    match value.as_str().map(super::replay::parse_moment) {
        Some(Ok(at)) => super::show::moment(Some(at)),
        _ => text(value),
    }
}

fn status(data: &Value, out: &mut dyn Write) -> Outcome {
    let protected = data["protected"].as_bool().unwrap_or(false);
    writeln!(out, "{}", if protected { "protected" } else { "NOT PROTECTED" })?;
    for reason in items(&data["reasons"]) {
        writeln!(out, "  {}", text(reason))?;
    }
    writeln!(out, "band {}, up {} s, {} bans", text(&data["version"]), data["uptime_s"], data["bans"])?;
    let mut jails = Table::new(&["JAIL", "FAILURES", "BANS", "LOG", "STATE", "LINES", "LAST LINE"]);
    for jail in items(&data["jails"]).filter(|jail| jail["enabled"] == true) {
        let (name, failures, bans) = (text(&jail["name"]), jail["failures"].to_string(), jail["bans"].to_string());
        let mut first = true;
        for log in items(&jail["logs"]) {
            let head = if first { [name.as_str(), &failures, &bans] } else { ["", "", ""] };
            let cells = [text(&log["path"]), text(&log["state"]), log["lines"].to_string(), local(&log["last_line"])];
            jails.row(&[head[0], head[1], head[2], &cells[0], &cells[1], &cells[2], &cells[3]]);
            first = false;
        }
        if first {
            jails.row(&[&name, &failures, &bans, "-", "-", "-", "-"]);
        }
    }
    jails.write(out)?;
    for enforcer in items(&data["enforcers"]) {
        let error = if enforcer["error"].is_null() { String::new() } else { format!(": {}", text(&enforcer["error"])) };
        writeln!(
            out,
            "{}: {}, {} pending{error}",
            text(&enforcer["name"]),
            text(&enforcer["state"]),
            enforcer["pending"]
        )?;
    }
    let latency = &data["latency_us"]["line_to_kernel"];
    if latency["count"].as_u64().unwrap_or(0) > 0 {
        writeln!(
            out,
            "line read to kernel ban: p50 {} us, p99 {} us, max {} us",
            latency["p50"], latency["p99"], latency["max"]
        )?;
    }
    Ok(())
}

fn why(data: &Value, out: &mut dyn Write) -> Outcome {
    let net = text(&data["address"]);
    if let Some(reason) = data["allowed"].as_str() {
        writeln!(out, "{net} is never banned: {reason}")?;
    }
    if items(&data["bans"]).next().is_none() {
        writeln!(out, "{net} is not banned")?;
    }
    for ban in items(&data["bans"]) {
        let until =
            if ban["until"].is_null() { "forever".to_owned() } else { format!("until {}", local(&ban["until"])) };
        let (address, jail, origin) = (text(&ban["address"]), text(&ban["jail"]), text(&ban["origin"]));
        writeln!(out, "{address} is banned in {jail} {until}")?;
        writeln!(out, "  since {} ({origin}, ban number {})", local(&ban["since"]), ban["count"])?;
        if ban["reason"].as_str().is_some_and(|reason| !reason.is_empty()) {
            writeln!(out, "  reason: {}", clean(&text(&ban["reason"])))?;
        }
        if let Some(packets) = ban["packets"].as_u64() {
            writeln!(out, "  {packets} packets dropped since")?;
        }
        if let Some(problem) = ban["problem"].as_str() {
            writeln!(out, "  but: {problem}")?;
        }
    }
    for window in items(&data["windows"]) {
        writeln!(
            out,
            "{} of {} failures in {} ({})",
            window["failures"],
            window["maxretry"],
            text(&window["findtime"]),
            text(&window["jail"])
        )?;
    }
    for line in items(&data["evidence"]) {
        writeln!(out, "  {} {} {}", local(&line["at"]), text(&line["jail"]), text(&line["file"]))?;
        writeln!(out, "    {}", clean(&text(&line["line"])))?;
    }
    Ok(())
}

/// Runs `banctl config`.
pub fn config(words: &ConfigWords, json: bool, out: &mut dyn Write) -> Outcome {
    let ConfigWords::Check { file } = words;
    let file = file.clone().unwrap_or_else(|| PathBuf::from(DEFAULT_FILE));
    match load(&file) {
        Ok(loaded) => {
            if json {
                return Ok(writeln!(out, "{}", json!({"ok": true, "complaints": []}))?);
            }
            let names: Vec<&str> = loaded.config.enabled().map(|jail| jail.name.as_str()).collect();
            let jails = if names.is_empty() {
                "no jail is switched on".to_owned()
            } else {
                format!("jails: {}", names.join(", "))
            };
            Ok(writeln!(out, "{}: right; {jails}", file.display())?)
        }
        Err(wrong) if json => {
            let lines: Vec<Value> =
                wrong.iter().map(|w| json!({"file": &*w.file, "line": w.line, "message": w.message})).collect();
            writeln!(out, "{}", json!({"ok": false, "complaints": lines}))?;
            Err(Failure::with_code(CONFIG, ""))
        }
        Err(wrong) => Err(complaints(&wrong)),
    }
}

/// Runs `banctl generate`.
pub fn generate(words: &GenerateWords, out: &mut dyn Write) -> Outcome {
    let text = match words {
        GenerateWords::Unit => UNIT,
        GenerateWords::Config => EXAMPLE,
    };
    Ok(out.write_all(text.as_bytes())?)
}
