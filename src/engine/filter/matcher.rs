//! All filters of one log at once: a chunk of whole lines comes in, matches go out. Counting is done elsewhere.
//!
//! Per line: how it begins (mostly the same bytes as the line before), then one automaton over the heads of all
//! patterns that may match there, then, for the few lines that get so far, the way to the address. Where lines do not
//! begin with something that dies early (Asterisk, nginx), a literal sweep over the whole chunk finds the candidates.

use std::net::IpAddr;
use std::sync::Arc;

use aho_corasick::packed;
use memchr::{memchr, memrchr};
use regex_automata::meta;
use smallvec::SmallVec;

use super::definition::{Definition, Joining, Pattern, Prefix, Role};
use super::prefix::{Begun, PrefixReader, hash_of};
use super::template::{Heads, Reach, Template, full_regex};
use crate::engine::address::munch;
use crate::engine::time::Timestamp;
use crate::engine::tree::Complaint;

/// So many places of the literal before the address are tried, then the full regex decides in linear time.
const REACH_TRIES_MAX: usize = 32;
/// The packed searcher gets slow with more literals than this (measured: twice at 61, not buildable at 141).
const SWEEP_LITERALS_MAX: usize = 40;

/// A filter in one mode, ready to match.
#[derive(Debug)]
pub struct Filter {
    /// The filter's name.
    pub name: String,
    /// The mode it was compiled for.
    pub mode: String,
    /// What it was made from.
    pub definition: Arc<Definition>,
    /// How lines of a session are joined.
    pub joining: Option<Joining>,
    patterns: Vec<(Template, Pattern)>,
    ignore: Vec<meta::Regex>,
}

impl Filter {
    /// Compiles `definition` for `mode`.
    ///
    /// # Errors
    /// Every pattern that is wrong, each with file and line.
    pub fn new(definition: &Arc<Definition>, mode: &str) -> Result<Self, Vec<Complaint>> {
        let Some((patterns, ignore)) = definition.of_mode(mode) else {
            let known: Vec<&str> = definition.mode_names().collect();
            let message = format!("filter {} has no mode \"{mode}\"; there are {}", definition.name, known.join(", "));
            return Err(vec![Complaint { file: Arc::from(definition.name.as_str()), line: 0, message }]);
        };
        let mut complaints = Vec::new();
        let mut compiled = Vec::with_capacity(patterns.len());
        for pattern in patterns {
            let counts = matches!(pattern.role, Role::Failure | Role::Twin | Role::Alone);
            match Template::new(pattern, counts && definition.prefix != Prefix::Nginx) {
                Ok(template) => compiled.push((template, pattern.clone())),
                Err(why) => complaints.push(pattern.node.complaint(format!("{}: {why}", pattern.label))),
            }
        }
        let mut ignored = Vec::with_capacity(ignore.len());
        for pattern in ignore {
            match full_regex(&pattern.text) {
                Ok(regex) => ignored.push(regex),
                Err(why) => complaints.push(pattern.node.complaint(format!("{}: {why}", pattern.label))),
            }
        }
        if !complaints.is_empty() {
            return Err(complaints);
        }
        Ok(Self {
            name: definition.name.clone(),
            mode: mode.to_owned(),
            definition: Arc::clone(definition),
            joining: definition.joining,
            patterns: compiled,
            ignore: ignored,
        })
    }

    /// The pattern with this number.
    pub fn pattern(&self, number: u16) -> Option<&Pattern> {
        self.patterns.get(usize::from(number)).map(|(_, pattern)| pattern)
    }
}

/// One line that matched one filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Match {
    /// Which of the log's filters.
    pub filter: u16,
    /// Which of its patterns.
    pub pattern: u16,
    /// The moment the line says.
    pub at: Option<Timestamp>,
    /// The address in it.
    pub address: Option<IpAddr>,
    /// Which session the line belongs to; 0 = none.
    pub session: u64,
    /// Which attempt of the session; 0 = not told apart.
    pub attempt: u64,
    /// Where the line stands in the chunk, without its newline.
    pub line: (u32, u32),
    /// Its number in the chunk, counted from 0.
    pub number: u32,
}

/// What a scan went over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scanned {
    /// Whole lines.
    pub lines: u64,
    /// Lines among those looked at that did not begin as they should, so have no date.
    pub undated: u64,
}

/// Several filters on one log, matched in one pass.
#[derive(Debug)]
pub struct LogMatcher {
    filters: Vec<Arc<Filter>>,
    passes: Vec<Pass>,
}

/// The filters that expect the same beginning of a line.
#[derive(Debug)]
struct Pass {
    prefix: Prefix,
    /// Program names and the group that judges their lines.
    tags: Vec<(Vec<u8>, usize)>,
    /// The group for every other program.
    other: Option<usize>,
    groups: Vec<Group>,
    sweep: Option<packed::Searcher>,
}

/// Patterns that run together.
#[derive(Debug)]
struct Group {
    heads: Heads,
    /// Filter and pattern of each head, filters in ascending order.
    of: Vec<(u16, u16)>,
}

impl LogMatcher {
    /// Puts `filters` together for one log.
    ///
    /// # Errors
    /// When their automaton would become too large.
    pub fn new(filters: Vec<Arc<Filter>>) -> Result<Self, String> {
        let mut prefixes: Vec<Prefix> = filters.iter().map(|filter| filter.definition.prefix).collect();
        prefixes.sort_unstable();
        prefixes.dedup();
        let mut passes = Vec::with_capacity(prefixes.len());
        for prefix in prefixes {
            passes.push(Pass::new(prefix, &filters)?);
        }
        Ok(Self { filters, passes })
    }

    /// The filters, in the order their numbers count.
    pub fn filters(&self) -> &[Arc<Filter>] {
        &self.filters
    }

    /// Bytes of all automata.
    pub fn memory(&self) -> usize {
        self.passes.iter().flat_map(|pass| &pass.groups).map(|group| group.heads.memory()).sum()
    }

    /// Finds every match in `chunk`, which is whole lines (the last newline may be missing).
    pub fn scan(&self, chunk: &[u8], reader: &mut PrefixReader, matches: &mut Vec<Match>) -> Scanned {
        match self.passes.as_slice() {
            [pass] => match &pass.sweep {
                // Escaped quotes make JSON lines differ from the literals, so they are read one by one. The first line of
                // a JSON log can be plain: Asterisk greets in every format alike.
                Some(sweep) if !has_json(chunk) => self.sweep(pass, sweep, chunk, reader, matches),
                _ => self.each_line(chunk, reader, matches),
            },
            _ => self.each_line(chunk, reader, matches),
        }
    }

    fn each_line(&self, chunk: &[u8], reader: &mut PrefixReader, matches: &mut Vec<Match>) -> Scanned {
        let mut scanned = Scanned::default();
        let mut at = 0;
        while at < chunk.len() {
            let end = memchr(b'\n', &chunk[at..]).map_or(chunk.len(), |length| at + length);
            let mut begun = false;
            for pass in &self.passes {
                begun |= self.line(pass, chunk, (at, end), scanned.lines, reader, matches);
            }
            scanned.lines += 1;
            scanned.undated += u64::from(!begun);
            at = end + 1;
        }
        scanned
    }

    fn sweep(
        &self,
        pass: &Pass,
        sweep: &packed::Searcher,
        chunk: &[u8],
        reader: &mut PrefixReader,
        matches: &mut Vec<Match>,
    ) -> Scanned {
        let mut scanned = Scanned::default();
        let mut at = 0;
        while let Some(hit) = sweep.find_in(chunk, aho_corasick::Span::from(at..chunk.len())) {
            let start = memrchr(b'\n', &chunk[at..hit.start()]).map_or(at, |newline| at + newline + 1);
            let end = memchr(b'\n', &chunk[hit.end()..]).map_or(chunk.len(), |length| hit.end() + length);
            scanned.lines += memchr::memchr_iter(b'\n', &chunk[at..start]).count() as u64;
            let begun = self.line(pass, chunk, (start, end), scanned.lines, reader, matches);
            scanned.lines += 1;
            scanned.undated += u64::from(!begun);
            at = (end + 1).min(chunk.len());
        }
        scanned.lines += memchr::memchr_iter(b'\n', &chunk[at..]).count() as u64;
        scanned.lines += u64::from(at < chunk.len() && chunk.last() != Some(&b'\n'));
        scanned
    }

    /// Judges one line; false if it does not begin as this pass expects.
    #[inline(always)]
    fn line(
        &self,
        pass: &Pass,
        chunk: &[u8],
        (start, end): (usize, usize),
        number: u64,
        reader: &mut PrefixReader,
        matches: &mut Vec<Match>,
    ) -> bool {
        let mut line = &chunk[start..end];
        if let [rest @ .., b'\r'] = line {
            line = rest;
        }
        let Some(begun) = reader.read(pass.prefix, line) else { return line.is_empty() };
        let Some(group) = pass.group_for(&line[begun.tag.0..begun.tag.1]) else { return true };
        let message = if begun.in_scratch { &reader.scratch[..] } else { &line[begun.start..] };
        let mut ends: SmallVec<[(u32, u32); 12]> = SmallVec::new();
        group.heads.run(message, |id, end| ends.push((id as u32, end as u32)));
        if ends.is_empty() {
            return begun.at.is_some() || pass.prefix == Prefix::None;
        }
        let position = Position { line: (start as u32, (start + line.len()) as u32), number: number as u32 };
        self.decide(pass, group, message, &begun, &mut ends, position, matches);
        begun.at.is_some()
    }

    /// The first pattern of each filter that matches whole wins.
    #[expect(clippy::too_many_arguments, reason = "the hot path passes what it has, unpacked")]
    fn decide(
        &self,
        pass: &Pass,
        group: &Group,
        message: &[u8],
        begun: &Begun,
        ends: &mut [(u32, u32)],
        position: Position,
        matches: &mut Vec<Match>,
    ) {
        if ends.len() > 1 {
            ends.sort_unstable();
        }
        let mut done: Option<u16> = None;
        for same in ends.chunk_by(|a, b| a.0 == b.0) {
            let (filter_number, pattern_number) = group.of[same[0].0 as usize];
            if done == Some(filter_number) {
                continue;
            }
            let filter = &self.filters[usize::from(filter_number)];
            let (template, _) = &filter.patterns[usize::from(pattern_number)];
            let Some(found) = template.decide(message, same) else { continue };
            // Asterisk deletes what follows an ESC; such a line is not what the server meant to write.
            if pass.prefix == Prefix::Asterisk && memchr(0x1b, message).is_some() {
                continue;
            }
            done = Some(filter_number);
            if filter.ignore.iter().any(|ignore| ignore.is_match(message)) {
                continue;
            }
            let session = match (found.session, filter.joining) {
                (_, None) => 0,
                (0, Some(_)) => begun.session,
                (session, Some(_)) => session,
            };
            matches.push(Match {
                filter: filter_number,
                pattern: pattern_number,
                at: begun.at,
                address: found.address.or(begun.address),
                session,
                attempt: found.attempt,
                line: position.line,
                number: position.number,
            });
        }
    }

    /// What `<F-USER>` and others captured in a line that gave `found`; slow, for evidence and answers to people.
    pub fn captures(&self, line: &[u8], found: &Match, reader: &mut PrefixReader) -> Vec<(String, String)> {
        let filter = &self.filters[usize::from(found.filter)];
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let Some(begun) = reader.read(filter.definition.prefix, line) else { return Vec::new() };
        let message = if begun.in_scratch { &reader.scratch[..] } else { &line[begun.start..] };
        let (template, _) = &filter.patterns[usize::from(found.pattern)];
        template.named_captures(message)
    }
}

#[derive(Clone, Copy)]
struct Position {
    line: (u32, u32),
    number: u32,
}

impl Pass {
    fn new(prefix: Prefix, filters: &[Arc<Filter>]) -> Result<Self, String> {
        let here: Vec<(u16, &Arc<Filter>)> =
            (0u16..).zip(filters).filter(|(_, filter)| filter.definition.prefix == prefix).collect();
        let mut tags: Vec<Vec<u8>> =
            here.iter().flat_map(|(_, filter)| &filter.definition.tags).map(|tag| tag.clone().into_bytes()).collect();
        tags.sort_unstable();
        tags.dedup();
        let mut groups: Vec<Group> = Vec::new();
        let mut members: Vec<Vec<u16>> = Vec::new();
        let mut group_of = |wanted: Vec<u16>| -> Result<usize, String> {
            if let Some(known) = members.iter().position(|other| *other == wanted) {
                return Ok(known);
            }
            groups.push(Group::new(filters, &wanted)?);
            members.push(wanted);
            Ok(members.len() - 1)
        };
        let mut by_tag = Vec::with_capacity(tags.len());
        for tag in tags {
            let takes = |filter: &Filter| {
                filter.definition.tags.is_empty() || filter.definition.tags.iter().any(|own| own.as_bytes() == tag)
            };
            let wanted = here.iter().filter(|(_, filter)| takes(filter)).map(|(number, _)| *number).collect();
            by_tag.push((tag.clone(), group_of(wanted)?));
        }
        let anyone: Vec<u16> =
            here.iter().filter(|(_, filter)| filter.definition.tags.is_empty()).map(|(number, _)| *number).collect();
        let other = if anyone.is_empty() { None } else { Some(group_of(anyone)?) };
        let sweep = if prefix == Prefix::Syslog { None } else { sweep_of(&here) };
        Ok(Self { prefix, tags: by_tag, other, groups, sweep })
    }

    #[inline]
    fn group_for(&self, tag: &[u8]) -> Option<&Group> {
        for (known, group) in &self.tags {
            if known == tag {
                return self.groups.get(*group);
            }
        }
        self.groups.get(self.other?)
    }
}

/// One literal of each pattern; `None` if one has none or there are too many.
fn sweep_of(filters: &[(u16, &Arc<Filter>)]) -> Option<packed::Searcher> {
    let mut literals: Vec<&[u8]> = Vec::new();
    for (_, filter) in filters {
        for (template, _) in &filter.patterns {
            literals.push(template.literal.as_deref()?);
        }
    }
    literals.sort_unstable();
    literals.dedup();
    if literals.len() > SWEEP_LITERALS_MAX {
        return None;
    }
    packed::Searcher::new(literals)
}

impl Group {
    fn new(filters: &[Arc<Filter>], wanted: &[u16]) -> Result<Self, String> {
        let mut heads = Vec::new();
        let mut of = Vec::new();
        for number in wanted {
            for (pattern, (template, _)) in (0u16..).zip(&filters[usize::from(*number)].patterns) {
                heads.push(template.head.clone());
                of.push((*number, pattern));
            }
        }
        Ok(Self { heads: Heads::new(&heads)?, of })
    }
}

/// What a whole match says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Found {
    address: Option<IpAddr>,
    session: u64,
    attempt: u64,
}

impl Template {
    /// Does the pattern match, given the ends of its head, and whose address is in it?
    #[inline]
    fn decide(&self, message: &[u8], ends: &[(u32, u32)]) -> Option<Found> {
        if !message.ends_with(&self.ending) {
            return None;
        }
        let plain = |address| Some(Found { address, session: 0, attempt: 0 });
        if self.keyed {
            return self.by_regex(message);
        }
        match &self.reach {
            Reach::Nothing => plain(None),
            Reach::Rest => self.full.is_match(message).then_some(Found { address: None, session: 0, attempt: 0 }),
            Reach::Full => self.by_regex(message),
            Reach::Direct => {
                let mut address = None;
                for (_, end) in ends {
                    let Some(found) = self.address_at(message, *end as usize) else { continue };
                    match address {
                        Some(other) if other != found => return self.by_regex(message),
                        _ => address = Some(found),
                    }
                }
                plain(Some(address?))
            }
            Reach::Literal { finder, greedy, free_min } => {
                let from = ends[0].1 as usize + free_min;
                let mut rest = message.get(from..)?;
                let mut places: SmallVec<[u32; 8]> = SmallVec::new();
                // Places may overlap: in ` from from 1.2.3.4` the blank in the middle belongs to both.
                while let Some(at) = finder.find(rest) {
                    places.push((message.len() - rest.len() + at + finder.needle().len()) as u32);
                    if places.len() > REACH_TRIES_MAX {
                        return self.by_regex(message);
                    }
                    rest = &rest[at + 1..];
                }
                let mut tries = places.iter().map(|place| *place as usize);
                let address = if *greedy {
                    tries.rev().find_map(|place| self.address_at(message, place))
                } else {
                    tries.find_map(|place| self.address_at(message, place))
                };
                plain(Some(address?))
            }
        }
    }

    /// The address that starts at `at`, if the tail follows it.
    #[inline]
    fn address_at(&self, message: &[u8], at: usize) -> Option<IpAddr> {
        let text = &message[at..];
        let (address, length) = munch(text)?;
        let Some(tail) = &self.tail else { return Some(address) };
        if tail.matches(message, at + length) {
            return Some(address);
        }
        // `2001:db8::1:5060`: the last colon may already belong to a port.
        let written = &text[..length];
        if written.first() == Some(&b'[') || address.is_ipv4() && !written.contains(&b':') {
            return None;
        }
        let shorter = memrchr(b':', written)?;
        let (address, length) = munch(&written[..shorter])?;
        (length == shorter && tail.matches(message, at + length)).then_some(address)
    }

    /// The full regex with captures; a `<HOST>` that is no address does not match.
    fn by_regex(&self, message: &[u8]) -> Option<Found> {
        let mut captures = self.full.create_captures();
        self.full.captures(message, &mut captures);
        if !captures.is_match() {
            return None;
        }
        let text = |name: &str| captures.get_group_by_name(name).map(|span| &message[span.range()]);
        let address = match text("HOST") {
            Some(written) => {
                let (address, length) = munch(written)?;
                if length != written.len() {
                    return None;
                }
                Some(address)
            }
            None => None,
        };
        let session = text("F_SESSION").map_or(0, |text| hash_of(&[text]));
        let attempt = text("F_ATTEMPT").map_or(0, |text| hash_of(&[text]));
        Some(Found { address, session, attempt })
    }

    fn named_captures(&self, message: &[u8]) -> Vec<(String, String)> {
        let mut captures = self.full.create_captures();
        self.full.captures(message, &mut captures);
        let names = self.full.group_info().all_names().filter_map(|(_, _, name)| name);
        names
            .filter_map(|name| {
                let span = captures.get_group_by_name(name)?;
                let label = name.strip_prefix("F_").unwrap_or(name).to_ascii_lowercase();
                Some((label, String::from_utf8_lossy(&message[span.range()]).into_owned()))
            })
            .collect()
    }
}

/// Does any line start as JSON does?
fn has_json(chunk: &[u8]) -> bool {
    chunk.first() == Some(&b'{') || memchr::memmem::find(chunk, b"\n{").is_some()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;
    use crate::engine::filter::definition::read_filter;
    use crate::engine::filter::stamp::StampReader;
    use crate::engine::time::Timestamp;
    use jiff::tz::TimeZone;

    #[test]
    fn json_lines_are_found_behind_a_plain_first_line() {
        let filter = include_str!("../../../filters/asterisk.toml");
        let definition = read_filter("asterisk", "asterisk.toml", filter).unwrap();
        let matcher = LogMatcher::new(vec![Arc::new(Filter::new(&definition, "normal").unwrap())]).unwrap();
        let json = concat!(
            r#"{"hostname":"h","timestamp":"2026-11-20 12:03:38","identifiers":{"lwp":1,"callid":""},"logmsg":{"location":"#,
            r#"{"filename":"res_security_log.c","function":"f","line":1},"level":"SECURITY","message":"SecurityEvent="#,
            r#"\"InvalidAccountID\",EventTV=\"2026-11-20T12:03:38.416+0100\",Severity=\"Error\",Service=\"PJSIP\","#,
            r#"EventVersion=\"1\",AccountID=\"a\",SessionID=\"b\",LocalAddress=\"IPV4/UDP/192.0.2.1/5060\","#,
            r#"RemoteAddress=\"IPV4/UDP/198.51.100.7/5060\"\n"}}"#
        );
        for before in ["", "[2026-11-20 12:00:01] Asterisk 22.1.0 built by root @ h on a x86_64\n"] {
            let mut reader = PrefixReader::new(StampReader::new(TimeZone::UTC, Timestamp::from_seconds(1_795_172_618)));
            let mut matches = Vec::new();
            matcher.scan(format!("{before}{json}\n").as_bytes(), &mut reader, &mut matches);
            assert_eq!(matches.len(), 1, "{before:?}");
        }
    }
}
