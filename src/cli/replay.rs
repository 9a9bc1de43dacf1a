//! `banctl replay`: which files, which jails, and how the answer is shown.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use jiff::tz::TimeZone;
use serde_json::json;

use super::show::{Table, moment};
use super::{CONFIG, Failure, Outcome, USAGE};
use crate::config::filters::FilterShelf;
use crate::config::schema::{BUILT_IN_JAILS, JailConfig, MANUAL, RECIDIVE, parse_timezone};
use crate::config::{DEFAULT_FILE, Loaded, load, load_text};
use crate::engine::address::show_net;
use crate::engine::allowlist::Allowlist;
use crate::engine::core::Fate;
use crate::engine::effect::Effect;
use crate::engine::filter::matcher::Filter;
use crate::engine::time::Timestamp;
use crate::engine::tree::Complaints;
use crate::replay::{Event, Replay, ReplayFile, ReplayJail, Summary};

/// The words of `banctl replay`.
#[derive(clap::Args, Debug)]
pub struct ReplayWords {
    /// The configuration whose jails judge.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// These jails judge every file, switched on or not.
    #[arg(long, value_name = "JAIL")]
    jail: Vec<String>,
    /// This filter judges every file, with [defaults].
    #[arg(long, value_name = "NAME", conflicts_with = "jail")]
    filter: Option<String>,
    /// The filter's mode.
    #[arg(long, requires = "filter")]
    mode: Option<String>,
    /// "Now" for stamps without a year (RFC 3339 or seconds since 1970).
    #[arg(long, value_name = "TIME", value_parser = parse_moment)]
    now: Option<Timestamp>,
    /// The zone of stamps without one: a name, an offset or a POSIX TZ.
    #[arg(long, value_name = "TZ", value_parser = parse_timezone)]
    timezone: Option<TimeZone>,
    /// Only the summary.
    #[arg(long, short)]
    quiet: bool,
    /// Log files; `-` = standard input.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
}

/// Reads a moment as people type it.
pub fn parse_moment(text: &str) -> Result<Timestamp, String> {
    if let Ok(moment) = text.parse::<jiff::Timestamp>() {
        return Ok(Timestamp(moment.as_millisecond()));
    }
    if let Ok(seconds) = text.parse::<i64>() {
        return Ok(Timestamp::from_seconds(seconds));
    }
    let civil = text
        .parse::<jiff::civil::DateTime>()
        .map_err(|_| format!("\"{text}\" is not a moment; write 2026-11-20T10:00:00Z or seconds since 1970"))?;
    let zoned = TimeZone::system().to_zoned(civil).map_err(|error| error.to_string())?;
    Ok(Timestamp(zoned.timestamp().as_millisecond()))
}

/// The clock, for "now".
pub fn clock() -> Timestamp {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timestamp(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

/// All complaints as one failure.
pub fn complaints(complaints: &Complaints) -> Failure {
    let lines: Vec<String> = complaints.iter().map(ToString::to_string).collect();
    Failure::with_code(CONFIG, lines.join("\nbanctl: "))
}

/// The configuration named, or the usual one, or (if there is none) all defaults.
pub fn configuration(named: Option<&Path>) -> Result<Loaded, Failure> {
    let loaded = match named {
        Some(file) => load(file),
        None if Path::new(DEFAULT_FILE).exists() => load(Path::new(DEFAULT_FILE)),
        None => load_text("(defaults)", ""),
    };
    loaded.map_err(|wrong| complaints(&wrong))
}

/// Runs `banctl replay`.
pub fn run(words: &ReplayWords, json: bool, out: &mut dyn Write) -> Outcome {
    let loaded = configuration(words.config.as_deref())?;
    let jails = choose_jails(words, &loaded)?;
    let files = words.files.iter().map(|path| route(path, words, &jails)).collect::<Result<Vec<_>, _>>()?;
    let replay = Replay {
        jails: jails.into_iter().map(|(_, jail)| jail).collect(),
        files,
        allow: Allowlist::new(&loaded.config.allow),
        tracked_max: loaded.config.tracked_max,
        now: words.now.unwrap_or_else(clock),
        workers: 0,
    };
    let started = Instant::now();
    let mut last_shown = Instant::now();
    let progress_wanted = super::stderr_is_for_people();
    let mut progress = |bytes: u64| {
        if progress_wanted && last_shown.elapsed().as_millis() > 500 {
            last_shown = Instant::now();
            let _ = write!(std::io::stderr(), "\r{} MB read", bytes / 1_000_000);
        }
    };
    let mut attackers = Table::new(&["ADDRESS", "JAIL", "FAILURES", "BANNED AT", "UNTIL"]);
    let mut broken: Option<std::io::Error> = None;
    let summary = replay
        .run(
            !words.quiet,
            &mut |event| {
                if json {
                    if let Err(error) = write_event(event, out) {
                        broken.get_or_insert(error);
                    }
                } else if let Event::Effect { effect: Effect::Ban(ban), jail } = event {
                    let failures = ban.failures.to_string();
                    attackers.row(&[
                        &show_net(&ban.net),
                        jail,
                        &failures,
                        &moment(Some(ban.since)),
                        &moment(ban.until),
                    ]);
                }
            },
            &mut progress,
        )
        .map_err(Failure::new)?;
    if let Some(error) = broken {
        return Err(error.into());
    }
    if progress_wanted {
        let _ = write!(std::io::stderr(), "\r                    \r");
    }
    let seconds = started.elapsed().as_secs_f64();
    if json {
        return Ok(write_summary(&summary, seconds, out)?);
    }
    if !words.quiet {
        attackers.write(out)?;
    }
    let Summary { lines, bytes, failures, bans, undated } = summary;
    writeln!(
        out,
        "{lines} lines ({bytes} bytes), {failures} failures, {bans} bans, {undated} lines without a date; {seconds:.3} s"
    )?;
    Ok(())
}

fn choose_jails(words: &ReplayWords, loaded: &Loaded) -> Result<Vec<(JailConfig, ReplayJail)>, Failure> {
    let shelf = FilterShelf::new(&loaded.config.paths.filters);
    let zone =
        |jail: &JailConfig| words.timezone.clone().or_else(|| jail.timezone.clone()).unwrap_or_else(TimeZone::system);
    let replay_jail = |jail: &JailConfig, filter: Arc<Filter>| {
        (
            jail.clone(),
            ReplayJail { name: jail.name.clone(), filter, policy: jail.policy.clone(), timezone: zone(jail) },
        )
    };
    if let Some(name) = &words.filter {
        let mode = words.mode.as_deref().unwrap_or(crate::engine::filter::definition::NORMAL);
        let filter = filter_named(name, mode, &shelf)?;
        let timezone = words.timezone.clone().unwrap_or_else(TimeZone::system);
        let policy = loaded.config.defaults.clone();
        let jail = ReplayJail { name: name.clone(), filter, policy, timezone };
        let Some(base) = loaded.config.jails.first() else { return Err(Failure::new("there are no jails")) };
        return Ok(vec![(base.clone(), jail)]);
    }
    if words.jail.is_empty() {
        return Ok(loaded.jails.iter().map(|(jail, filter)| replay_jail(jail, Arc::clone(filter))).collect());
    }
    let mut chosen = Vec::new();
    for name in &words.jail {
        let Some(jail) =
            loaded.config.jails.iter().find(|jail| jail.name == *name && name != RECIDIVE && name != MANUAL)
        else {
            let names: Vec<&str> = loaded.config.jails.iter().map(|jail| jail.name.as_str()).collect();
            return Err(Failure::with_code(
                USAGE,
                format!("there is no jail \"{name}\" that reads lines; there are {}", names.join(", ")),
            ));
        };
        chosen.push(replay_jail(jail, filter_named(&jail.filter, &jail.mode, &shelf)?));
    }
    Ok(chosen)
}

/// A filter by name, or by the path of its file.
pub fn filter_named(name: &str, mode: &str, shelf: &FilterShelf) -> Result<Arc<Filter>, Failure> {
    let definition = if name.contains('/') || name.ends_with(".toml") {
        FilterShelf::load_file(Path::new(name))
    } else {
        shelf.load(name)
    };
    let definition = definition.map_err(|wrong| complaints(&wrong))?;
    Filter::new(&definition, mode).map(Arc::new).map_err(|wrong| complaints(&wrong))
}

fn route(path: &Path, words: &ReplayWords, jails: &[(JailConfig, ReplayJail)]) -> Result<ReplayFile, Failure> {
    if words.filter.is_some() || !words.jail.is_empty() {
        return Ok(ReplayFile { path: path.to_owned(), jails: (0..jails.len()).collect() });
    }
    let whole = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let whole = whole.to_string_lossy();
    let claims = |(jail, replay): &(JailConfig, ReplayJail)| {
        let logs = if jail.logs.is_empty() { &replay.filter.definition.logs } else { &jail.logs };
        logs.iter().any(|log| glob::Pattern::new(log).is_ok_and(|pattern| pattern.matches(&whole)))
    };
    let claimed: Vec<usize> =
        jails.iter().enumerate().filter(|(_, jail)| claims(jail)).map(|(index, _)| index).collect();
    if claimed.is_empty() {
        return Err(Failure::with_code(
            USAGE,
            format!(
                "no jail that is switched on reads {}; name one with --jail (there are {}) or a filter with --filter",
                path.display(),
                BUILT_IN_JAILS.join(", ")
            ),
        ));
    }
    Ok(ReplayFile { path: path.to_owned(), jails: claimed })
}

fn write_event(event: &Event<'_>, out: &mut dyn Write) -> std::io::Result<()> {
    let value = match event {
        Event::Failure { failure, jail, user, place } => {
            let mut value = json!({
                "event": "failure", "jail": jail, "address": failure.address.to_string(), "at": failure.at.to_string(),
            });
            if let Some(user) = user {
                value["user"] = json!(user);
            }
            if let Some((file, line)) = place {
                value["file"] = json!(file.file_name().unwrap_or(file.as_os_str()).to_string_lossy());
                value["line"] = json!(line);
            }
            match failure.fate {
                Fate::Allowed => value["allowed"] = json!(true),
                Fate::AlreadyBanned => value["banned_already"] = json!(true),
                Fate::Counted | Fate::Banned | Fate::Forgiven => {}
            }
            value
        }
        Event::Effect { effect, jail } => match effect {
            Effect::Ban(ban) | Effect::Extend(ban) => json!({
                "event": if matches!(effect, Effect::Ban(_)) { "ban" } else { "extend" },
                "jail": jail, "address": show_net(&ban.net), "at": ban.since.to_string(),
                "until": ban.until.map(|until| until.to_string()), "failures": ban.failures, "count": ban.count,
            }),
            Effect::Unban { ban, .. } => json!({
                "event": "unban", "jail": jail, "address": show_net(&ban.net),
                "at": ban.until.map(|until| until.to_string()),
            }),
        },
    };
    serde_json::to_writer(&mut *out, &value)?;
    out.write_all(b"\n")
}

fn write_summary(summary: &Summary, seconds: f64, out: &mut dyn Write) -> std::io::Result<()> {
    let value = json!({
        "event": "summary", "lines": summary.lines, "bytes": summary.bytes, "failures": summary.failures,
        "bans": summary.bans, "undated": summary.undated, "seconds": (seconds * 1e6).round() / 1e6,
    });
    serde_json::to_writer(&mut *out, &value)?;
    out.write_all(b"\n")
}
