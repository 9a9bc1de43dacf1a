//! TOML with its line numbers: text comes in, a tree that knows file and line of every value goes out, and complaints
//! are gathered instead of stopping at the first.

use std::fmt;
use std::sync::Arc;

use toml_edit::{Document, Item, TableLike, Value as TomlValue};

use crate::engine::time::{Span, parse_span};

/// One thing that is wrong in a file, with what would be right.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Complaint {
    /// The file, as it was named.
    pub file: Arc<str>,
    /// The line, counted from 1; 0 = the file as a whole.
    pub line: u32,
    /// One sentence.
    pub message: String,
}

impl fmt::Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.file, self.message),
            line => write!(f, "{}:{line}: {}", self.file, self.message),
        }
    }
}

/// Everything that is wrong so far.
pub type Complaints = Vec<Complaint>;

/// A value with the place it was written at.
#[derive(Clone, Debug)]
pub struct Node {
    /// The file it stands in.
    pub file: Arc<str>,
    /// The line it stands on, counted from 1.
    pub line: u32,
    /// What was written.
    pub value: Value,
}

/// What can be written in TOML (dates are not used here and read as strings).
#[derive(Clone, Debug)]
pub enum Value {
    /// Text.
    String(String),
    /// A whole number.
    Integer(i64),
    /// A number with a fraction.
    Float(f64),
    /// `true` or `false`.
    Boolean(bool),
    /// A list.
    Array(Vec<Node>),
    /// Keys with values, in the order they were written.
    Table(Vec<(String, Node)>),
}

impl Node {
    /// An empty table, for a section that is not there.
    pub fn empty(file: &Arc<str>) -> Self {
        Self { file: Arc::clone(file), line: 0, value: Value::Table(Vec::new()) }
    }

    /// A complaint about this value.
    pub fn complaint(&self, message: impl Into<String>) -> Complaint {
        Complaint { file: Arc::clone(&self.file), line: self.line, message: message.into() }
    }

    /// The value of `key`, if this is a table that has it.
    pub fn get(&self, key: &str) -> Option<&Self> {
        match &self.value {
            Value::Table(entries) => entries.iter().find(|(name, _)| name == key).map(|(_, node)| node),
            _ => None,
        }
    }

    /// The entries of a table; none of anything else.
    pub fn entries(&self) -> &[(String, Self)] {
        match &self.value {
            Value::Table(entries) => entries,
            _ => &[],
        }
    }

    /// Lays `other` over this tree: tables merge, everything else is replaced.
    pub fn merge(&mut self, other: Self) {
        match (&mut self.value, other.value) {
            (Value::Table(mine), Value::Table(theirs)) => {
                for (key, node) in theirs {
                    match mine.iter_mut().find(|(name, _)| *name == key) {
                        Some((_, existing)) => existing.merge(node),
                        None => mine.push((key, node)),
                    }
                }
                self.line = if self.line == 0 { other.line } else { self.line };
            }
            (_, value) => *self = Self { file: other.file, line: other.line, value },
        }
    }

    fn kind(&self) -> &'static str {
        match self.value {
            Value::String(_) => "text",
            Value::Integer(_) => "a number",
            Value::Float(_) => "a number with a fraction",
            Value::Boolean(_) => "true or false",
            Value::Array(_) => "a list",
            Value::Table(_) => "a section",
        }
    }
}

/// Reads TOML.
///
/// # Errors
/// One complaint with the line where the text stops being TOML.
pub fn parse(file: &str, text: &str) -> Result<Node, Complaint> {
    let name: Arc<str> = Arc::from(file);
    let lines = Lines::new(text);
    match Document::parse(text) {
        Ok(document) => Ok(Node {
            file: Arc::clone(&name),
            line: 1,
            value: Value::Table(table(document.as_table(), &name, &lines, 1)),
        }),
        Err(error) => {
            let line = error.span().map_or(0, |span| lines.line_of(span.start));
            Err(Complaint {
                file: name,
                line,
                message: format!("not valid TOML: {}", error.message().replace('\n', ", ")),
            })
        }
    }
}

struct Lines(Vec<usize>);

impl Lines {
    fn new(text: &str) -> Self {
        Self(text.bytes().enumerate().filter(|(_, b)| *b == b'\n').map(|(at, _)| at).collect())
    }

    fn line_of(&self, offset: usize) -> u32 {
        u32::try_from(self.0.partition_point(|newline| *newline < offset) + 1).unwrap_or(u32::MAX)
    }
}

fn table(table: &dyn TableLike, file: &Arc<str>, lines: &Lines, line: u32) -> Vec<(String, Node)> {
    table
        .iter()
        .map(|(key, item)| {
            let here = table
                .get_key_value(key)
                .and_then(|(key, _)| key.span())
                .or_else(|| item.span())
                .map_or(line, |span| lines.line_of(span.start));
            (key.to_owned(), item_node(item, file, lines, here))
        })
        .collect()
}

fn item_node(item: &Item, file: &Arc<str>, lines: &Lines, line: u32) -> Node {
    let line = item.span().map_or(line, |span| lines.line_of(span.start));
    let value = match item {
        Item::None => Value::Table(Vec::new()),
        Item::Value(value) => return value_node(value, file, lines, line),
        Item::Table(inner) => Value::Table(table(inner, file, lines, line)),
        Item::ArrayOfTables(tables) => Value::Array(
            tables
                .iter()
                .map(|inner| {
                    let line = inner.span().map_or(line, |span| lines.line_of(span.start));
                    Node { file: Arc::clone(file), line, value: Value::Table(table(inner, file, lines, line)) }
                })
                .collect(),
        ),
    };
    Node { file: Arc::clone(file), line, value }
}

fn value_node(value: &TomlValue, file: &Arc<str>, lines: &Lines, line: u32) -> Node {
    let line = value.span().map_or(line, |span| lines.line_of(span.start));
    let value = match value {
        TomlValue::String(text) => Value::String(text.value().clone()),
        TomlValue::Integer(number) => Value::Integer(*number.value()),
        TomlValue::Float(number) => Value::Float(*number.value()),
        TomlValue::Boolean(flag) => Value::Boolean(*flag.value()),
        TomlValue::Datetime(date) => Value::String(date.value().to_string()),
        TomlValue::Array(array) => {
            Value::Array(array.iter().map(|inner| value_node(inner, file, lines, line)).collect())
        }
        TomlValue::InlineTable(inner) => Value::Table(table(inner, file, lines, line)),
    };
    Node { file: Arc::clone(file), line, value }
}

/// Takes known keys out of one table; what it was never asked for is an unknown key at the end.
pub struct Section<'n, 'c> {
    node: &'n Node,
    path: String,
    asked: Vec<&'static str>,
    complaints: &'c mut Complaints,
}

impl<'n, 'c> Section<'n, 'c> {
    /// Opens `node`, which is called `path` in complaints.
    pub fn new(node: &'n Node, path: impl Into<String>, complaints: &'c mut Complaints) -> Self {
        let path = path.into();
        if !matches!(node.value, Value::Table(_)) {
            complaints.push(node.complaint(format!("{path} is {}; it must be a section like [{path}]", node.kind())));
        }
        Self { node, path, asked: Vec::new(), complaints }
    }

    /// The node of `key`, whatever it holds.
    pub fn node(&mut self, key: &'static str) -> Option<&'n Node> {
        self.asked.push(key);
        self.node.get(key)
    }

    /// Adds a complaint about `node`.
    pub fn complain(&mut self, node: &Node, message: impl Into<String>) {
        self.complaints.push(node.complaint(message));
    }

    /// The list of complaints, for those who check further.
    pub fn complaints(&mut self) -> &mut Complaints {
        self.complaints
    }

    fn wrong_kind(&mut self, key: &str, node: &Node, wanted: &str) {
        let message = format!("{key} is {}; it must be {wanted}", node.kind());
        self.complaints.push(node.complaint(message));
    }

    /// Text.
    pub fn string(&mut self, key: &'static str) -> Option<String> {
        let node = self.node(key)?;
        match &node.value {
            Value::String(text) => Some(text.clone()),
            _ => {
                self.wrong_kind(key, node, "text in quotes");
                None
            }
        }
    }

    /// `true` or `false`.
    pub fn boolean(&mut self, key: &'static str) -> Option<bool> {
        let node = self.node(key)?;
        match &node.value {
            Value::Boolean(flag) => Some(*flag),
            _ => {
                self.wrong_kind(key, node, "true or false");
                None
            }
        }
    }

    /// A whole number within `range`.
    pub fn integer(&mut self, key: &'static str, range: std::ops::RangeInclusive<i64>) -> Option<i64> {
        let node = self.node(key)?;
        match &node.value {
            Value::Integer(number) if range.contains(number) => Some(*number),
            Value::Integer(number) => {
                let message = format!("{key} = {number} is out of range; write {} to {}", range.start(), range.end());
                self.complaints.push(node.complaint(message));
                None
            }
            _ => {
                self.wrong_kind(key, node, "a whole number");
                None
            }
        }
    }

    /// A number, with or without a fraction.
    pub fn number(&mut self, key: &'static str) -> Option<f64> {
        let node = self.node(key)?;
        match &node.value {
            #[expect(clippy::cast_precision_loss, reason = "factors are small")]
            Value::Integer(number) => Some(*number as f64),
            Value::Float(number) if number.is_finite() => Some(*number),
            _ => {
                self.wrong_kind(key, node, "a number");
                None
            }
        }
    }

    /// A duration longer than nothing.
    pub fn span(&mut self, key: &'static str) -> Option<Span> {
        let node = self.node(key)?;
        let parsed = match &node.value {
            Value::Integer(seconds) => parse_span(&seconds.to_string()),
            Value::String(text) => parse_span(text),
            _ => {
                self.wrong_kind(key, node, "a number of seconds or a duration like \"10m\"");
                return None;
            }
        };
        match parsed {
            Ok(Span(0)) => {
                self.complaints.push(node.complaint(format!("{key} must be longer than nothing")));
                None
            }
            Ok(span) => Some(span),
            Err(why) => {
                self.complaints.push(node.complaint(format!("{key}: {why}")));
                None
            }
        }
    }

    /// A duration, or `None` inside for `"forever"` and `-1`.
    pub fn span_or_forever(&mut self, key: &'static str) -> Option<Option<Span>> {
        let node = self.node(key)?;
        let forever = match &node.value {
            Value::Integer(number) => *number == -1,
            Value::String(text) => matches!(text.trim(), "forever" | "-1"),
            _ => false,
        };
        if forever {
            return Some(None);
        }
        self.asked.pop();
        self.span(key).map(Some)
    }

    /// A list of text; a single text counts as a list of one.
    pub fn strings(&mut self, key: &'static str) -> Option<Vec<(String, &'n Node)>> {
        let node = self.node(key)?;
        match &node.value {
            Value::String(text) => Some(vec![(text.clone(), node)]),
            Value::Array(items) => {
                let mut out = Vec::with_capacity(items.len());
                for item in items {
                    match &item.value {
                        Value::String(text) => out.push((text.clone(), item)),
                        _ => self.wrong_kind(key, item, "a list of texts in quotes"),
                    }
                }
                Some(out)
            }
            _ => {
                self.wrong_kind(key, node, "a list of texts in quotes");
                None
            }
        }
    }

    /// Complains about every key nobody asked for, naming the nearest known one.
    pub fn finish(self) {
        for (key, node) in self.node.entries() {
            if self.asked.iter().any(|asked| asked == key) {
                continue;
            }
            let place = if self.path.is_empty() { String::new() } else { format!(" in [{}]", self.path) };
            let hint = match nearest(key, self.asked.iter().copied()) {
                Some(known) => format!("did you mean \"{known}\"?"),
                None => format!("known here: {}", self.asked.join(", ")),
            };
            self.complaints.push(node.complaint(format!("unknown key \"{key}\"{place}; {hint}")));
        }
    }
}

/// The known word closest to `word`, if any is close.
pub fn nearest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let limit = if word.len() < 4 { 1 } else { (word.len() / 3).clamp(2, 3) };
    known
        .map(|candidate| (distance(word, candidate), candidate))
        .filter(|(distance, candidate)| *distance <= limit || (word.len() > 3 && candidate.starts_with(word)))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Letters to change, add or take away (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let changed = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    #[test]
    fn every_complaint_names_file_line_and_remedy() {
        let root =
            parse("band.toml", "[defaults]\nmaxrety = 3\nfindtime = \"10 x\"\nbantime = true\nmaxretry = 0\n").unwrap();
        let mut complaints = Vec::new();
        let mut section = Section::new(root.get("defaults").unwrap(), "defaults", &mut complaints);
        section.integer("maxretry", 1..=1000);
        section.span("findtime");
        section.span_or_forever("bantime");
        section.finish();
        let text: Vec<String> = complaints.iter().map(ToString::to_string).collect();
        assert!(
            text.iter()
                .any(|line| line.starts_with("band.toml:2: unknown key \"maxrety\"") && line.contains("maxretry")),
            "{text:?}"
        );
        assert!(
            text.iter().any(|line| line.starts_with("band.toml:3: findtime: \"10 x\" is not a duration")),
            "{text:?}"
        );
        assert!(text.iter().any(|line| line.starts_with("band.toml:4: bantime is true or false")), "{text:?}");
        assert!(text.iter().any(|line| line.starts_with("band.toml:5: maxretry = 0 is out of range")), "{text:?}");
    }

    #[test]
    fn broken_toml_is_one_complaint_with_its_line() {
        let complaint = parse("x.toml", "a = 1\nb = [\n").unwrap_err();
        assert!(complaint.line >= 2 && complaint.message.starts_with("not valid TOML"), "{complaint}");
        let twice = parse("x.toml", "[jails.a]\n[jails.a]\n").unwrap_err();
        assert!(twice.message.contains("duplicate"), "{twice}");
    }

    #[test]
    fn later_files_win_and_tables_merge() {
        let mut first = parse("a", "[d]\nx = 1\ny = 2\n").unwrap();
        first.merge(parse("b", "[d]\ny = 3\n[e]\nz = 4\n").unwrap());
        let d = first.get("d").unwrap();
        assert!(matches!(d.get("x").unwrap().value, Value::Integer(1)));
        assert!(matches!(d.get("y").unwrap().value, Value::Integer(3)) && &*d.get("y").unwrap().file == "b");
        assert!(first.get("e").unwrap().get("z").is_some());
    }
}
