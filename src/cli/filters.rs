//! `banctl filter`: list, show, check, and the test that explains every line.

use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::tz::TimeZone;
use serde_json::json;

use super::replay::{clock, complaints, configuration, filter_named, parse_moment};
use super::show::{Table, clean};
use super::{CONFIG, Failure, Outcome};
use crate::config::filters::FilterShelf;
use crate::config::schema::parse_timezone;
use crate::engine::filter::definition::{NORMAL, Role};
use crate::engine::filter::matcher::{Filter, LogMatcher, Match};
use crate::engine::filter::prefix::PrefixReader;
use crate::engine::filter::proof::prove;
use crate::engine::filter::session::{Counted, Joiner};
use crate::engine::filter::stamp::StampReader;
use crate::engine::time::{SPAN_MAX, Timestamp};

/// The words of `banctl filter`.
#[derive(clap::Subcommand, Debug)]
pub enum FilterWords {
    /// Every filter there is, built in or from a file.
    List {
        /// The configuration that says where filters are.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// A filter's text.
    Show {
        /// Its name.
        name: String,
        /// The configuration that says where filters are.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Runs the samples of filters.
    Check {
        /// Names or files; all if none is named.
        names: Vec<String>,
        /// The configuration that says where filters are.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Line by line: does it count, whose is it, which pattern, why not.
    Test(TestWords),
}

/// The words of `banctl filter test`.
#[derive(clap::Args, Debug)]
pub struct TestWords {
    /// A filter's name, or its file.
    name: String,
    /// The filter's mode.
    #[arg(long, default_value = NORMAL)]
    mode: String,
    /// "Now" for stamps without a year.
    #[arg(long, value_name = "TIME", value_parser = parse_moment)]
    now: Option<Timestamp>,
    /// The zone of stamps without one.
    #[arg(long, value_name = "TZ", value_parser = parse_timezone)]
    timezone: Option<TimeZone>,
    /// Lines are journal messages: `host program[pid]: …` without a stamp.
    #[arg(long)]
    journal: bool,
    /// The configuration that says where filters are.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The lines; `-` or nothing = standard input.
    file: Option<PathBuf>,
}

/// Runs `banctl filter`.
pub fn run(words: &FilterWords, json: bool, out: &mut dyn Write) -> Outcome {
    let config = match words {
        FilterWords::List { config } | FilterWords::Show { config, .. } | FilterWords::Check { config, .. } => config,
        FilterWords::Test(words) => &words.config,
    };
    let shelf = FilterShelf::new(configuration(config.as_deref())?.config.paths.filters);
    match words {
        FilterWords::List { .. } => list(&shelf, json, out),
        FilterWords::Show { name, .. } => {
            let (_, text) = shelf.text(name).map_err(|wrong| complaints(&vec![wrong]))?;
            Ok(out.write_all(text.as_bytes())?)
        }
        FilterWords::Check { names, .. } => check(names, &shelf, json, out),
        FilterWords::Test(words) => test(words, &shelf, json, out),
    }
}

fn list(shelf: &FilterShelf, json: bool, out: &mut dyn Write) -> Outcome {
    let mut table = Table::new(&["FILTER", "MODES", "DESCRIPTION"]);
    let mut values = Vec::new();
    for name in shelf.names() {
        match shelf.load(&name) {
            Ok(definition) => {
                let modes: Vec<&str> = definition.mode_names().collect();
                table.row(&[&name, &modes.join(" "), &definition.description]);
                values.push(json!({"name": name, "modes": modes, "description": definition.description, "logs": definition.logs}));
            }
            Err(wrong) => {
                let why = wrong.first().map_or_else(String::new, ToString::to_string);
                table.row(&[&name, "-", &format!("does not load: {why}")]);
                values.push(json!({"name": name, "error": why}));
            }
        }
    }
    if json { Ok(writeln!(out, "{}", json!(values))?) } else { Ok(table.write(out)?) }
}

fn check(names: &[String], shelf: &FilterShelf, json: bool, out: &mut dyn Write) -> Outcome {
    let all = if names.is_empty() { shelf.names() } else { names.to_vec() };
    let mut wrong = Vec::new();
    let mut values = Vec::new();
    for name in &all {
        let path = Path::new(name);
        let loaded =
            if name.contains('/') || name.ends_with(".toml") { FilterShelf::load_file(path) } else { shelf.load(name) };
        let proven = loaded.and_then(|definition| prove(&definition).map(|()| definition));
        match proven {
            Ok(definition) => {
                let samples = definition.samples.len();
                values.push(json!({"name": name, "ok": true, "samples": samples, "complaints": []}));
                if !json {
                    writeln!(out, "{name}: {samples} samples, all as they should be")?;
                }
            }
            Err(mut complaints) => {
                let lines: Vec<String> = complaints.iter().map(ToString::to_string).collect();
                values.push(json!({"name": name, "ok": false, "complaints": lines}));
                wrong.append(&mut complaints);
            }
        }
    }
    if json {
        writeln!(out, "{}", json!(values))?;
    }
    match (wrong.is_empty(), json) {
        (true, _) => Ok(()),
        (false, true) => Err(Failure::with_code(CONFIG, "")),
        (false, false) => Err(complaints(&wrong)),
    }
}

/// What is known of one line once everything is read.
struct Verdict {
    text: String,
    found: Option<Match>,
    captures: Vec<(String, String)>,
    counted: Vec<Counted>,
    begun: bool,
}

fn test(words: &TestWords, shelf: &FilterShelf, json: bool, out: &mut dyn Write) -> Outcome {
    let filter = filter_named(&words.name, &words.mode, shelf)?;
    let matcher = LogMatcher::new(vec![Arc::clone(&filter)]).map_err(Failure::new)?;
    let now = words.now.unwrap_or_else(clock);
    let zone = words.timezone.clone().unwrap_or_else(TimeZone::system);
    let mut reader = PrefixReader::new(StampReader::new(zone, now));
    reader.undated = words.journal;
    let mut joiner = Joiner::new(filter.joining);
    let mut verdicts: Vec<Verdict> = Vec::new();
    let mut last = now;
    let mut late: Vec<Counted> = Vec::new();
    let mut input: Box<dyn BufRead> = match &words.file {
        Some(path) if path != Path::new("-") => {
            let file =
                std::fs::File::open(path).map_err(|error| Failure::new(format!("{}: {error}", path.display())))?;
            Box::new(std::io::BufReader::new(file))
        }
        _ => Box::new(std::io::BufReader::new(std::io::stdin())),
    };
    let mut line = Vec::new();
    loop {
        line.clear();
        if input.read_until(b'\n', &mut line)? == 0 {
            break;
        }
        if line.last() == Some(&b'\n') {
            line.pop();
        }
        let mut matches = Vec::new();
        let scanned = matcher.scan(&line, &mut reader, &mut matches);
        let found = matches.first().copied();
        let mark = verdicts.len() as u64;
        if let Some(found) = &found
            && let Some(pattern) = filter.pattern(found.pattern)
        {
            last = found.at.unwrap_or(last);
            joiner.take(found, (pattern.role, pattern.ends), last, mark, |counted| late.push(counted));
        }
        let captures = found.map(|found| matcher.captures(&line, &found, &mut reader)).unwrap_or_default();
        let text = String::from_utf8_lossy(&line).into_owned();
        verdicts.push(Verdict { text, found, captures, counted: Vec::new(), begun: scanned.undated == 0 });
    }
    joiner.handle_timeout(last + SPAN_MAX, |counted| late.push(counted));
    for counted in late {
        if let Some(verdict) = verdicts.get_mut(usize::try_from(counted.mark).unwrap_or(usize::MAX)) {
            verdict.counted.push(counted);
        }
    }
    for (number, verdict) in verdicts.iter().enumerate() {
        if json {
            write_json(number + 1, verdict, &filter, out)?
        } else {
            write_text(number + 1, verdict, &filter, out)?
        }
    }
    if !json {
        let counted: usize = verdicts.iter().map(|verdict| verdict.counted.len()).sum();
        writeln!(out, "{} lines, {counted} failures", verdicts.len())?;
    }
    Ok(())
}

fn write_json(number: usize, verdict: &Verdict, filter: &Filter, out: &mut dyn Write) -> Outcome {
    let Some(counted) = verdict.counted.first() else {
        let mut value = json!({"line": number, "match": false});
        value["reason"] = json!(reason(verdict, filter));
        return Ok(writeln!(out, "{value}")?);
    };
    let label = filter.pattern(counted.pattern).map_or("", |pattern| pattern.label.as_str());
    let at = verdict.found.and_then(|found| found.at);
    let mut value = json!({
        "line": number, "match": true, "address": counted.address.to_string(),
        "at": at.map(|at| at.to_string()), "pattern": label,
    });
    for (name, text) in &verdict.captures {
        if name != "HOST" && name != "host" {
            value[name] = json!(text);
        }
    }
    if verdict.counted.len() > 1 {
        value["failures"] = json!(verdict.counted.len());
    }
    Ok(writeln!(out, "{value}")?)
}

fn write_text(number: usize, verdict: &Verdict, filter: &Filter, out: &mut dyn Write) -> Outcome {
    let shown = clean(&verdict.text);
    match verdict.counted.first() {
        Some(counted) => {
            let label = filter.pattern(counted.pattern).map_or("", |pattern| pattern.label.as_str());
            writeln!(out, "{number}: FAILURE of {} by {label}", counted.address)?;
        }
        None => writeln!(out, "{number}: no failure ({})", reason(verdict, filter))?,
    }
    Ok(writeln!(out, "    {shown}")?)
}

/// Why a line is no failure, or no further one.
fn reason(verdict: &Verdict, filter: &Filter) -> &'static str {
    let Some(found) = verdict.found else {
        return if verdict.begun {
            "no pattern matches"
        } else {
            "it does not begin as the filter's prefix says, or has no date"
        };
    };
    match filter.pattern(found.pattern).map(|pattern| pattern.role) {
        Some(Role::Success) => "a login that succeeded",
        Some(Role::End) => "the end of a session",
        Some(Role::Alone) => "its session has another failure or a success",
        Some(Role::Twin) => "the same attempt was counted by another line",
        Some(Role::Failure) | None => "the same attempt was counted before",
    }
}
