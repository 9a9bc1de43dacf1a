//! What `banctl` asks and what it is told: a request comes in, a reply goes out, after the kernel's word where it matters.

use ipnet::IpNet;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::sync::oneshot;

use super::enforcer::Task;
use super::pipeline::Core;
use crate::config::ports::{Ports, Protocol};
use crate::config::schema::{JailConfig, MANUAL};
use crate::control::protocol::{Reply, Request};
use crate::control::server::{Answer, Asked, WATCH_QUEUE};
use crate::enforce::outbox::Key;
use crate::engine::address::{parse_net, show_net};
use crate::engine::allowlist::By;
use crate::engine::effect::{Ban, JailId, Origin};
use crate::engine::time::{Span, Timestamp, parse_span, show_span};
use crate::logs::State;
use crate::store::Record;

/// A plain refusal.
const FAILED: u8 = 1;

fn reply(answer: oneshot::Sender<Answer>, reply: Reply) {
    // Who does not wait for the answer does not need it.
    let _ = answer.send(Answer::Reply(reply));
}

impl Core {
    /// Answers one request.
    pub(super) fn answer(&mut self, asked: Asked, at: Timestamp) {
        let Asked { request, answer } = asked;
        match request {
            Request::Status => {
                let data = self.status(at);
                reply(answer, Reply::data(data));
            }
            Request::List { jail, net } => reply(answer, self.list(jail.as_deref(), net.as_deref())),
            Request::Ban { nets, jail, span, reason } => {
                match self.ban(&nets, jail.as_deref(), span.as_deref(), reason, at) {
                    Ok(data) => self.confirm(answer, format!("banned {}", joined(&nets)), data, at),
                    Err(why) => self.confirm_failure(answer, why, at),
                }
            }
            Request::Unban { nets, all, jail } => match self.unban(&nets, all, jail.as_deref(), at) {
                Ok(lifted) => {
                    let names: Vec<String> = lifted.iter().map(|ban| show_net(&ban.net)).collect();
                    let data = json!(lifted.iter().map(|ban| self.ban_json(ban)).collect::<Vec<_>>());
                    self.confirm(answer, format!("let in again: {}", joined(&names)), data, at);
                }
                Err(why) => reply(answer, Reply::failed(FAILED, why)),
            },
            Request::Why { net } => self.why(&net, answer, at),
            Request::AllowAdd { net, span, note } => match self.allow(&net, span.as_deref(), note, at) {
                Ok(message) => self.confirm(answer, message, Value::Null, at),
                Err(why) => reply(answer, Reply::failed(FAILED, why)),
            },
            Request::AllowRemove { net } => match self.disallow(&net) {
                Ok(message) => self.confirm(answer, message, Value::Null, at),
                Err(why) => reply(answer, Reply::failed(FAILED, why)),
            },
            Request::AllowList => {
                let data = self.allow_list();
                reply(answer, Reply::data(data));
            }
            Request::Watch => {
                let (send, receive) = mpsc::channel(WATCH_QUEUE);
                self.watchers.push(send);
                let _ = answer.send(Answer::Stream(receive));
            }
            Request::JailList => {
                let data = json!(self.config.jails.iter().map(jail_json).collect::<Vec<_>>());
                reply(answer, Reply::data(data));
            }
            Request::Rules => {
                self.enforcer.put(Task::Describe(Box::new(move |text| reply(answer, Reply::data(json!(text))))));
            }
            // The main thread reads the configuration and gives it to us as an order.
            Request::Reload => reply(answer, Reply::failed(FAILED, "reload is done elsewhere")),
        }
    }

    /// Answers once the kernel holds what was asked.
    fn confirm(&mut self, answer: oneshot::Sender<Answer>, message: String, data: Value, at: Timestamp) {
        self.flush_effects(at);
        self.enforcer.put(Task::Confirm(Box::new(move |result| {
            reply(
                answer,
                match result {
                    Ok(()) => Reply::done(message, data),
                    Err(why) => Reply::failed(
                        FAILED,
                        format!("kept, but not in the kernel yet: {why}; band goes on trying (banctl status)"),
                    ),
                },
            );
        })));
    }

    /// Some of it was done and some refused: the refusal is told once the rest is in force.
    fn confirm_failure(&mut self, answer: oneshot::Sender<Answer>, why: String, at: Timestamp) {
        self.flush_effects(at);
        self.enforcer.put(Task::Confirm(Box::new(move |_| reply(answer, Reply::failed(FAILED, why)))));
    }

    fn jail_named(&self, name: &str) -> Result<JailId, String> {
        let configured = self.config.jails.iter().any(|jail| jail.name == name);
        match self.engine.find(name) {
            Some(id) if configured || name == MANUAL || self.engine.ledger().iter().any(|ban| ban.jail == id) => Ok(id),
            _ => {
                let names: Vec<&str> = self.config.enabled().map(|jail| jail.name.as_str()).collect();
                Err(format!("there is no jail \"{name}\" that is on; there are {}", names.join(", ")))
            }
        }
    }

    fn list(&self, jail: Option<&str>, net: Option<&str>) -> Reply {
        let jail = match jail.map(|name| self.jail_named(name)).transpose() {
            Ok(jail) => jail,
            Err(why) => return Reply::failed(FAILED, why),
        };
        let net = match net.map(parse_net).transpose() {
            Ok(net) => net,
            Err(why) => return Reply::failed(FAILED, why),
        };
        let meant = |ban: &&Ban| {
            jail.is_none_or(|jail| jail == ban.jail)
                && net.is_none_or(|net| net.contains(&ban.net) || ban.net.contains(&net))
        };
        let bans = self.engine.ledger().bans();
        Reply::data(json!(bans.into_iter().filter(meant).map(|ban| self.ban_json(ban)).collect::<Vec<_>>()))
    }

    fn ban_json(&self, ban: &Ban) -> Value {
        json!({
            "address": show_net(&ban.net), "jail": self.engine.name(ban.jail), "since": ban.since.to_string(),
            "until": ban.until.map(|until| until.to_string()), "failures": ban.failures, "count": ban.count,
            "origin": ban.origin.to_string(), "reason": ban.reason,
        })
    }

    fn ban(
        &mut self,
        nets: &[String],
        jail: Option<&str>,
        span: Option<&str>,
        reason: Option<String>,
        at: Timestamp,
    ) -> Result<Value, String> {
        let name = jail.unwrap_or(MANUAL);
        let id = self.jail_named(name)?;
        let usual = self.engine.jail(id).map_or(self.config.defaults.bantime, |jail| jail.policy.bantime);
        let span = match span {
            None => usual,
            Some("forever" | "-1") => None,
            Some(text) => match parse_span(text)? {
                Span(0) => {
                    return Err("a ban must last longer than nothing; to let somebody in use banctl unban".to_owned());
                }
                span => Some(span),
            },
        };
        // Nothing is done before everything is understood.
        let parsed = nets.iter().map(|net| parse_net(net)).collect::<Result<Vec<IpNet>, String>>()?;
        let (mut done, mut refused) = (Vec::new(), Vec::new());
        for net in parsed {
            let ban = Ban {
                jail: id,
                net,
                since: at,
                until: span.map(|span| at + span),
                failures: 0,
                count: 1,
                origin: Origin::Manual,
                reason: reason.clone().unwrap_or_default(),
            };
            match self.engine.ban(ban, true) {
                Ok(()) => {
                    done.push(self.engine.ledger().get(id, &net).map(|ban| self.ban_json(ban)).unwrap_or_default())
                }
                Err(why) => refused.push(why),
            }
        }
        if refused.is_empty() { Ok(json!(done)) } else { Err(refused.join("; ")) }
    }

    fn unban(&mut self, nets: &[String], all: bool, jail: Option<&str>, at: Timestamp) -> Result<Vec<Ban>, String> {
        let jail = jail.map(|name| self.jail_named(name)).transpose()?;
        if all {
            let lifted = self.engine.unban_all(jail);
            self.forgive(&lifted, at);
            return Ok(lifted);
        }
        if nets.is_empty() {
            return Err("name an address or network, or --all".to_owned());
        }
        let parsed = nets.iter().map(|net| parse_net(net)).collect::<Result<Vec<IpNet>, String>>()?;
        let mut lifted = Vec::new();
        let mut unknown = Vec::new();
        for net in parsed {
            let found = self.engine.unban(&net, jail);
            if found.is_empty() {
                unknown.push(show_net(&net));
            }
            lifted.extend(found);
        }
        self.forgive(&lifted, at);
        if lifted.is_empty() {
            return Err(format!("{} is not banned; its failures, if any, are forgotten", joined(&unknown)));
        }
        Ok(lifted)
    }

    /// A restart reads the same lines again; they must not ban whom somebody let in.
    fn forgive(&mut self, lifted: &[Ban], at: Timestamp) {
        for ban in lifted {
            self.engine.forgive(ban.jail, ban.net, at);
        }
    }

    fn allow(&mut self, net: &str, span: Option<&str>, note: Option<String>, at: Timestamp) -> Result<String, String> {
        let net = parse_net(net)?;
        let until = span.map(parse_span).transpose()?.map(|span| at + span);
        let note = note.unwrap_or_default();
        self.keep.record(Record::Allow { net: net.to_string(), until: until.map(|until| until.0), note: note.clone() });
        self.engine.allow.add(net, until, note);
        let lifted = self.engine.lift_allowed();
        self.forgive(&lifted, at);
        self.flush_effects(at);
        self.install();
        let also = if lifted.is_empty() { String::new() } else { format!("; {} bans lifted", lifted.len()) };
        Ok(format!("{} is never banned from now on{also}", show_net(&net)))
    }

    fn disallow(&mut self, net: &str) -> Result<String, String> {
        let net = parse_net(net)?;
        self.engine.allow.remove(net)?;
        self.keep.record(Record::Disallow { net: net.to_string() });
        self.install();
        Ok(format!("{} is off the allowlist", show_net(&net)))
    }

    fn allow_list(&self) -> Value {
        let mut entries: Vec<_> = self.engine.allow.entries().iter().collect();
        entries.sort_by_key(|entry| (entry.by, entry.net));
        let entries = entries.into_iter().map(|entry| {
            let from = match entry.by {
                By::Configuration => "configuration",
                By::Hand => "hand",
                By::Own => "own",
            };
            json!({"network": show_net(&entry.net), "from": from, "until": entry.until.map(|until| until.to_string()), "note": entry.note})
        });
        json!(entries.collect::<Vec<_>>())
    }

    fn why(&mut self, text: &str, answer: oneshot::Sender<Answer>, at: Timestamp) {
        let net = match parse_net(text) {
            Ok(net) => net,
            Err(why) => return reply(answer, Reply::failed(FAILED, why)),
        };
        let touches = |other: &IpNet| net.contains(other) || other.contains(&net);
        let mut bans: Vec<Value> = Vec::new();
        let mut keys: Vec<Key> = Vec::new();
        for ban in self.engine.ledger().bans().into_iter().filter(|ban| touches(&ban.net)) {
            bans.push(self.ban_json(ban));
            keys.push((self.scopes.of(self.engine.name(ban.jail)), ban.net));
        }
        let allowed =
            self.engine.allow.entries().iter().find(|entry| entry.net.contains(&net)).map(|entry| match entry.by {
                By::Configuration => format!("{} is in [allow] of the configuration", show_net(&entry.net)),
                By::Hand => format!("{} was allowed by hand {}", show_net(&entry.net), entry.note),
                By::Own => format!("{} is this machine's own ({})", show_net(&entry.net), entry.note),
            });
        let evidence = self.evidence.against(&net).into_iter().map(|line| {
            json!({
                "at": line.at.to_string(), "jail": self.engine.name(line.jail), "file": &*line.file,
                "pattern": &*line.pattern, "line": line.text,
            })
        });
        let windows = self.engine.jails().filter_map(|jail| {
            let counted = crate::engine::address::counted_net(net.addr(), jail.policy.ipv6_prefix);
            let failures = self.engine.failures_in_window(jail.id, &counted, at);
            (failures > 0).then(|| json!({
                "jail": &*jail.name, "failures": failures, "maxretry": jail.policy.maxretry, "findtime": show_span(jail.policy.findtime),
            }))
        });
        let mut data = json!({
            "address": show_net(&net), "bans": bans, "allowed": allowed,
            "evidence": evidence.collect::<Vec<_>>(), "windows": windows.collect::<Vec<_>>(),
        });
        let on = self.config.nftables.enabled;
        self.enforcer.put(Task::Ask(
            keys,
            Box::new(move |held| {
                for (index, held) in held.into_iter().enumerate() {
                    let ban = &mut data["bans"][index];
                    match held {
                        Some(held) => ban["packets"] = json!(held.packets),
                        None if on => ban["problem"] = json!("the kernel does not hold it; see banctl status"),
                        None => {}
                    }
                }
                reply(answer, Reply::data(data));
            }),
        ));
    }

    fn status(&self, at: Timestamp) -> Value {
        let jails: Vec<Value> = self.config.jails.iter().map(|jail| self.jail_status(jail)).collect();
        let (enforcer, latency, mut reasons) = self.enforcer_status();
        if self.config.enabled().next().is_none() {
            reasons.push("no jail is switched on; write [jails.sshd] into the configuration".to_owned());
        }
        for jail in &jails {
            let logs: Vec<&Value> = jail["logs"].as_array().into_iter().flatten().collect();
            let reads = jail["name"] != crate::config::schema::RECIDIVE;
            if jail["enabled"] == true
                && reads
                && logs.iter().all(|log| log["state"] == "waiting" || log["state"] == "unreadable")
            {
                reasons.push(format!("jail {} has no log it can read", jail["name"].as_str().unwrap_or("?")));
            }
        }
        json!({
            "version": env!("CARGO_PKG_VERSION"), "uptime_s": self.started.elapsed().as_secs(), "now": at.to_string(),
            "protected": reasons.is_empty(), "reasons": reasons, "complaints": self.complaints, "bans": self.engine.ledger().len(),
            "jails": jails, "enforcers": [enforcer], "latency_us": {"line_to_kernel": latency},
            "memory": {"rss_bytes": rss_bytes(), "tracked_addresses": self.engine.tracked()},
        })
    }

    fn enforcer_status(&self) -> (Value, Value, Vec<String>) {
        let Ok(standing) = self.standing.lock() else { return (Value::Null, Value::Null, Vec::new()) };
        let state = match (standing.on, &standing.error) {
            (false, _) => "off",
            (true, Some(_)) => "degraded",
            (true, None) => "ok",
        };
        let reasons = match state {
            "off" => vec!["[enforce.nftables] is off: bans are kept, but nobody is shut out".to_owned()],
            "degraded" => vec![format!("the kernel: {}", standing.error.as_deref().unwrap_or(""))],
            _ => Vec::new(),
        };
        let quantile = |q| standing.latency.value_at_quantile(q);
        let latency = json!({
            "count": standing.latency.len(), "p50": quantile(0.5), "p99": quantile(0.99), "max": standing.latency.max(),
        });
        let enforcer = json!({
            "name": "nftables", "state": state, "pending": standing.pending, "error": standing.error, "held": standing.held,
            "repairs": standing.repairs, "repaired_after": standing.repaired_after,
        });
        (enforcer, latency, reasons)
    }

    fn jail_status(&self, jail: &JailConfig) -> Value {
        let id = self.engine.find(&jail.name);
        let running = self.running.iter().find(|running| Some(running.id) == id);
        let known = id.and_then(|id| self.engine.jail(id));
        let bans = id.map_or(0, |id| self.engine.ledger().standing(id));
        let mut logs: Vec<Value> = Vec::new();
        for source in self.sources.values() {
            let reads = running
                .is_some_and(|running| running.requests.iter().any(|request| source.info.requests.contains(request)));
            if !reads {
                continue;
            }
            let (state, why) = match &source.info.state {
                State::Waiting => ("waiting", None),
                State::Reading => ("reading", None),
                State::CaughtUp => ("ok", None),
                State::Unreadable(why) => ("unreadable", Some(why.clone())),
                State::Polling(why) => ("polling", Some(why.clone())),
                State::SameAs(path) => ("same", Some(format!("is read as {}", path.display()))),
            };
            logs.push(json!({
                "path": source.info.path.display().to_string(), "state": state, "why": why, "offset": source.info.offset,
                "lines": source.lines, "failures": id.and_then(|id| source.failures.get(&id)).copied().unwrap_or(0),
                "last_line": source.last_line.map(|at| at.to_string()), "lines_cut": source.info.lines_cut,
                "rotations": source.info.rotations, "undated": source.undated, "too_old": source.passed.too_old, "off": source.passed.off,
            }));
        }
        logs.sort_by_key(|log| log["path"].as_str().unwrap_or("").to_owned());
        json!({
            "name": jail.name, "enabled": jail.enabled, "failures": known.map_or(0, |jail| jail.failures), "bans": bans, "logs": logs,
        })
    }
}

fn joined(names: &[String]) -> String {
    match names {
        [] => "nobody".to_owned(),
        _ if names.len() <= 10 => names.join(", "),
        _ => format!("{}, … ({} in all)", names[..10].join(", "), names.len()),
    }
}

fn jail_json(jail: &JailConfig) -> Value {
    let ports = match &jail.ports {
        Ports::All => "all".to_owned(),
        Ports::Some(ranges) => {
            let texts: Vec<String> = ranges
                .iter()
                .map(|range| match range.protocol {
                    Protocol::Icmp => "echo-request".to_owned(),
                    Protocol::Tcp | Protocol::Udp | Protocol::Sctp => {
                        let protocol = format!("{:?}", range.protocol).to_lowercase();
                        if range.first == range.last {
                            format!("{}/{protocol}", range.first)
                        } else {
                            format!("{}-{}/{protocol}", range.first, range.last)
                        }
                    }
                })
                .collect();
            texts.join(" ")
        }
    };
    json!({
        "name": jail.name, "enabled": jail.enabled, "filter": format!("{}[{}]", jail.filter, jail.mode), "maxretry": jail.policy.maxretry,
        "findtime": show_span(jail.policy.findtime), "bantime": jail.policy.bantime.map_or("forever".to_owned(), show_span),
        "ipv6_prefix": jail.policy.ipv6_prefix, "ports": ports, "action": format!("{:?}", jail.action).to_lowercase(), "logs": jail.logs,
    })
}

/// Memory in use, from the kernel's account of this process.
fn rss_bytes() -> u64 {
    let pages =
        std::fs::read_to_string("/proc/self/statm").ok().and_then(|text| text.split(' ').nth(1)?.parse::<u64>().ok());
    pages.unwrap_or(0) * rustix::param::page_size() as u64
}
