//! A filter as it is written: TOML comes in, patterns with their roles and the samples that prove them go out. Nothing is compiled here.

use std::sync::Arc;

use crate::engine::time::Span;
use crate::engine::tree::{Complaint, Complaints, Node, Section, Value};

/// How lines begin, before the text the patterns are written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Prefix {
    /// Date, host, `tag[pid]: ` of syslog in any of its forms.
    Syslog,
    /// `[date] LEVEL[thread] file: ` of Asterisk; also inside syslog or JSON.
    Asterisk,
    /// `date [level] pid#tid: *connection ` of nginx's error log, or the client at the start of its access log (in the
    /// common format, with ISO time, behind the virtual host, or as JSON); both also inside syslog.
    Nginx,
    /// A date at the start of the line, if there is one.
    None,
}

impl Prefix {
    const NAMES: [(&'static str, Self); 4] =
        [("syslog", Self::Syslog), ("asterisk", Self::Asterisk), ("nginx", Self::Nginx), ("none", Self::None)];

    /// How it is written in a filter.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, prefix)| *prefix == self).map_or("none", |(name, _)| name)
    }
}

/// What a matching line means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A failure.
    Failure,
    /// Another log's line about a failure; counts only what the failure lines of the same session have not.
    Twin,
    /// A failure only if its session ends without another one.
    Alone,
    /// A login that succeeded; what was waiting in the session is forgotten.
    Success,
    /// The session is over.
    End,
}

/// A pattern with the place it was written at.
#[derive(Clone, Debug)]
pub struct Pattern {
    /// The text of the template.
    pub text: String,
    /// What a match means.
    pub role: Role,
    /// The session ends with this line, too.
    pub ends: bool,
    /// How it is called in answers: `failregex[2]`, `aggressive.failregex[0]`, `session.alone[1]`.
    pub label: String,
    /// File and line, for complaints.
    pub node: Node,
}

/// What tells sessions apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JoinedBy {
    /// The process of the prefix, or what `<F-SESSION>` captured.
    Session,
    /// The address alone.
    Address,
    /// Both.
    AddressAndSession,
}

/// How lines of one connection are joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Joining {
    /// How long lines of one session belong together, from its first line on.
    pub window: Span,
    /// What makes the id.
    pub by: JoinedBy,
    /// At most one failure per session, unless its lines carry different `<F-ATTEMPT>`.
    pub once: bool,
}

/// Lines with the answer the filter must give.
#[derive(Clone, Debug)]
pub struct Sample {
    /// The lines, mostly one.
    pub lines: Vec<String>,
    /// Whose failure the last line completes; `None` = it is none.
    pub address: Option<String>,
    /// How many failures all lines together are.
    pub failures: usize,
    /// The mode it is for.
    pub mode: Option<String>,
    /// File and line.
    pub node: Node,
}

/// What a mode adds.
#[derive(Clone, Debug)]
pub struct Mode {
    /// Its name.
    pub name: String,
    /// Modes it includes.
    pub includes: Vec<String>,
    /// Patterns it adds.
    pub patterns: Vec<Pattern>,
    /// Ignore patterns it adds.
    pub ignore: Vec<Pattern>,
}

/// A filter file, read.
#[derive(Clone, Debug)]
pub struct Definition {
    /// Its name, without `.toml`.
    pub name: String,
    /// One line for people.
    pub description: String,
    /// Where its log usually is.
    pub logs: Vec<String>,
    /// The journal matches that give the same lines.
    pub journal: Vec<String>,
    /// How lines begin.
    pub prefix: Prefix,
    /// Program names that may write such lines (syslog only); empty = any.
    pub tags: Vec<String>,
    /// The patterns every mode has.
    pub patterns: Vec<Pattern>,
    /// A match drops the line.
    pub ignore: Vec<Pattern>,
    /// How lines are joined, if at all.
    pub joining: Option<Joining>,
    /// Further modes.
    pub modes: Vec<Mode>,
    /// Proof.
    pub samples: Vec<Sample>,
}

/// The mode that is always there.
pub const NORMAL: &str = "normal";

impl Definition {
    /// Reads a filter from its tree.
    pub fn read(name: &str, root: &Node, complaints: &mut Complaints) -> Self {
        let mut section = Section::new(root, "", complaints);
        let description = section.string("description").unwrap_or_default();
        let logs = texts(section.strings("logs"));
        let journal = texts(section.strings("journal"));
        let prefix = read_prefix(&mut section);
        let tags = texts(section.strings("tags"));
        let mut patterns = read_patterns(&mut section, "failregex", Role::Failure, "failregex");
        let ignore = read_patterns(&mut section, "ignoreregex", Role::Failure, "ignoreregex");
        let joining = section.node("session").map(|node| read_joining(node, &mut section, &mut patterns));
        let modes = section.node("modes").map(|node| read_modes(node, &mut section)).unwrap_or_default();
        let samples = section.node("sample").map(|node| read_samples(node, &mut section)).unwrap_or_default();
        section.finish();
        let definition = Self {
            name: name.to_owned(),
            description,
            logs,
            journal,
            prefix,
            tags,
            patterns,
            ignore,
            joining,
            modes,
            samples,
        };
        definition.check(root, complaints);
        definition
    }

    fn check(&self, root: &Node, complaints: &mut Complaints) {
        if self.patterns.is_empty() && self.modes.iter().all(|mode| mode.patterns.is_empty()) {
            complaints.push(root.complaint("the filter has no failregex; a filter without a pattern finds nobody"));
        }
        if self.samples.is_empty() {
            complaints.push(
                root.complaint("the filter has no [[sample]]; add at least one line with the address it must find"),
            );
        }
        if self.prefix != Prefix::Syslog && !self.tags.is_empty() {
            complaints.push(root.complaint("tags belong to prefix = \"syslog\"; other prefixes have no program name"));
        }
        for mode in &self.modes {
            for name in &mode.includes {
                if !self.modes.iter().any(|other| other.name == *name) {
                    complaints
                        .push(root.complaint(format!("mode {} includes \"{name}\", which does not exist", mode.name)));
                }
            }
        }
    }

    /// The names of its modes, `normal` first.
    pub fn mode_names(&self) -> impl Iterator<Item = &str> {
        std::iter::once(NORMAL).chain(self.modes.iter().map(|mode| mode.name.as_str()))
    }

    /// Patterns and ignore patterns of a mode; `None` if it does not exist.
    pub fn of_mode(&self, mode: &str) -> Option<(Vec<&Pattern>, Vec<&Pattern>)> {
        let mut patterns: Vec<&Pattern> = self.patterns.iter().collect();
        let mut ignore: Vec<&Pattern> = self.ignore.iter().collect();
        // A line that only ends a session is what is left when it says nothing more.
        let ends_last = |mut patterns: Vec<_>| {
            patterns.sort_by_key(|pattern: &&Pattern| pattern.role == Role::End);
            patterns
        };
        if mode == NORMAL {
            return Some((ends_last(patterns), ignore));
        }
        let wanted = self.modes.iter().find(|candidate| candidate.name == mode)?;
        for name in wanted.includes.iter().chain(std::iter::once(&wanted.name)) {
            if let Some(part) = self.modes.iter().find(|candidate| candidate.name == *name) {
                patterns.extend(&part.patterns);
                ignore.extend(&part.ignore);
            }
        }
        Some((ends_last(patterns), ignore))
    }
}

fn texts(list: Option<Vec<(String, &Node)>>) -> Vec<String> {
    list.unwrap_or_default().into_iter().map(|(text, _)| text).collect()
}

fn read_prefix(section: &mut Section<'_, '_>) -> Prefix {
    let Some(text) = section.string("prefix") else { return Prefix::None };
    match Prefix::NAMES.iter().find(|(name, _)| *name == text) {
        Some((_, prefix)) => *prefix,
        None => {
            let known: Vec<&str> = Prefix::NAMES.iter().map(|(name, _)| *name).collect();
            if let Some(node) = section.node("prefix") {
                section.complain(node, format!("prefix \"{text}\" is not known; write one of {}", known.join(", ")));
            }
            Prefix::None
        }
    }
}

fn read_patterns(section: &mut Section<'_, '_>, key: &'static str, role: Role, label: &str) -> Vec<Pattern> {
    let list = section.strings(key).unwrap_or_default();
    list.into_iter()
        .enumerate()
        .map(|(number, (text, node))| Pattern {
            text,
            role,
            ends: false,
            label: format!("{label}[{number}]"),
            node: node.clone(),
        })
        .collect()
}

fn read_joining(node: &Node, outer: &mut Section<'_, '_>, patterns: &mut Vec<Pattern>) -> Joining {
    let mut section = Section::new(node, "session", outer.complaints());
    let by = match section.string("id").as_deref() {
        None | Some("<SESSION>") => JoinedBy::Session,
        Some("<HOST>") => JoinedBy::Address,
        Some("<HOST> <SESSION>") => JoinedBy::AddressAndSession,
        Some(_) => {
            section.complain(
                node,
                "id must be '<SESSION>' (the process of the prefix, or what <F-SESSION> captured), '<HOST>' or '<HOST> <SESSION>'",
            );
            JoinedBy::Session
        }
    };
    let joining = Joining {
        window: section.span("window").unwrap_or(Span::from_seconds(300)),
        by,
        once: section.boolean("once").unwrap_or(false),
    };
    read_session_patterns(&mut section, "session.", patterns);
    section.finish();
    joining
}

fn read_session_patterns(section: &mut Section<'_, '_>, label: &str, patterns: &mut Vec<Pattern>) {
    for (key, role) in [("twin", Role::Twin), ("alone", Role::Alone), ("success", Role::Success), ("end", Role::End)] {
        for mut pattern in read_patterns(section, key, role, &format!("{label}{key}")) {
            // One text in two lists (a closing line that is all there is) is one pattern with both meanings.
            let twin = patterns.iter_mut().find(|other| other.text == pattern.text && other.role != Role::End);
            match (role, twin) {
                (Role::End, Some(other)) => other.ends = true,
                _ => {
                    pattern.ends = role == Role::End;
                    patterns.push(pattern);
                }
            }
        }
    }
}

fn read_modes(node: &Node, outer: &mut Section<'_, '_>) -> Vec<Mode> {
    let mut modes = Vec::new();
    for (name, node) in node.entries() {
        let mut section = Section::new(node, format!("modes.{name}"), outer.complaints());
        let includes = texts(section.strings("includes"));
        let mut patterns = read_patterns(&mut section, "failregex", Role::Failure, &format!("{name}.failregex"));
        read_session_patterns(&mut section, &format!("{name}.session."), &mut patterns);
        let ignore = read_patterns(&mut section, "ignoreregex", Role::Failure, &format!("{name}.ignoreregex"));
        section.finish();
        modes.push(Mode { name: name.clone(), includes, patterns, ignore });
    }
    modes
}

fn read_samples(node: &Node, outer: &mut Section<'_, '_>) -> Vec<Sample> {
    let Value::Array(items) = &node.value else {
        outer.complain(node, "samples are written as [[sample]]");
        return Vec::new();
    };
    let mut samples = Vec::new();
    for item in items {
        let mut section = Section::new(item, "[sample]", outer.complaints());
        let mut lines = texts(section.strings("lines"));
        lines.extend(section.string("line"));
        let address = section.string("address");
        let matches = section.boolean("match").unwrap_or(address.is_some());
        let failures = section.integer("failures", 0..=1000).map(|n| usize::try_from(n).unwrap_or(0));
        let mode = section.string("mode");
        if lines.is_empty() {
            section.complain(item, "a [[sample]] needs a line");
        }
        if matches != address.is_some() {
            section.complain(item, "a [[sample]] says either address = \"…\" or match = false");
        }
        section.finish();
        let failures = failures.unwrap_or(usize::from(address.is_some()));
        samples.push(Sample { lines, address, failures, mode, node: item.clone() });
    }
    samples
}

/// Reads a filter from text.
///
/// # Errors
/// Every complaint about it.
pub fn read_filter(name: &str, file: &str, text: &str) -> Result<Arc<Definition>, Vec<Complaint>> {
    let root = crate::engine::tree::parse(file, text).map_err(|complaint| vec![complaint])?;
    let mut complaints = Vec::new();
    let definition = Definition::read(name, &root, &mut complaints);
    if complaints.is_empty() { Ok(Arc::new(definition)) } else { Err(complaints) }
}
