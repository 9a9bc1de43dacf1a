//! One pattern: the template comes in, a head, the way to the address and a tail go out. Several heads become one automaton elsewhere.
//!
//! A pattern is cut at `<HOST>`. What stands before it is a **head** (a regular language whose end is known) and, mostly,
//! one free part (`.*`) with a literal behind it. To match is then: run all heads at once, search the literal, parse the
//! address, check the tail. Where a pattern cannot be cut like that, its full regex decides; slower, never different.

use regex_automata::dfa::{Automaton, StartKind, dense};
use regex_automata::nfa::thompson::{self, NFA};
use regex_automata::util::primitives::StateID;
use regex_automata::util::start;
use regex_automata::{Anchored, MatchKind, meta};
use regex_syntax::ParserBuilder;
use regex_syntax::hir::{Class, Hir, HirKind, Look};

use super::definition::Pattern;

/// An automaton of one pattern may not grow beyond this, or the filter is refused.
pub const DFA_BYTES_MAX: usize = 8 << 20;

/// `<HOST>` as a regex: four octets, or IPv6 with or without brackets, a dotted quad at its end, a zone.
const HOST: &str = r"(?P<HOST>(?:(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])\.){3}(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])|\[(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f.]{0,15}(?:%[0-9A-Za-z._-]{1,15})?\]|(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f.]{0,15}(?:%[0-9A-Za-z._-]{1,15})?)";

/// How the address is reached once the head has matched.
#[derive(Debug)]
pub enum Reach {
    /// A free part, then this literal, then the address.
    Literal {
        /// What stands directly before the address.
        finder: Box<memchr::memmem::Finder<'static>>,
        /// The last place counts (`.*`), not the first (`.*?`).
        greedy: bool,
        /// The free part has at least this many bytes.
        free_min: usize,
    },
    /// The address begins where the head ends.
    Direct,
    /// The pattern has no address; the head is all of it.
    Nothing,
    /// The pattern has no address, and all of it would make too large a head.
    Rest,
    /// Only the full regex can tell.
    Full,
}

/// A compiled pattern, apart from its head, which runs together with the others.
#[derive(Debug)]
pub struct Template {
    /// What must match at the start of the message.
    pub head: Hir,
    /// From the head to the address.
    pub reach: Reach,
    /// What must follow the address; `None` = anything may.
    pub tail: Option<Tail>,
    /// The whole pattern, for captures and for what cannot be cut.
    pub full: meta::Regex,
    /// Some fixed text every match contains, as long as possible.
    pub literal: Option<Vec<u8>>,
    /// What every match ends with; most lines that only begin like the pattern are told apart by it at once.
    pub ending: Vec<u8>,
    /// It captures `<F-SESSION>`, `<F-ATTEMPT>`: these decide, so captures are needed for every match.
    pub keyed: bool,
}

/// What follows the address, as an automaton that starts anywhere in the line.
#[derive(Debug)]
pub struct Tail {
    dfa: dense::DFA<Vec<u32>>,
}

impl Tail {
    fn new(hir: &Hir) -> Result<Self, String> {
        let nfa = nfa_of(std::slice::from_ref(hir))?;
        let dfa = dense::Builder::new()
            .configure(
                dense::Config::new()
                    .start_kind(StartKind::Anchored)
                    .dfa_size_limit(Some(DFA_BYTES_MAX))
                    .determinize_size_limit(Some(4 * DFA_BYTES_MAX)),
            )
            .build_from_nfa(&nfa)
            .map_err(|error| format!("what follows <HOST> is too large: {error}"))?;
        Ok(Self { dfa })
    }

    /// Does `text[at..]` begin with the tail?
    pub fn matches(&self, text: &[u8], at: usize) -> bool {
        let before = at.checked_sub(1).and_then(|before| text.get(before)).copied();
        let config = start::Config::new().anchored(Anchored::Yes).look_behind(before);
        let Ok(mut state) = self.dfa.start_state(&config) else { return false };
        for &byte in &text[at..] {
            state = self.dfa.next_state(state, byte);
            if self.dfa.is_special_state(state) {
                if self.dfa.is_match_state(state) {
                    return true;
                }
                if self.dfa.is_dead_state(state) || self.dfa.is_quit_state(state) {
                    return false;
                }
            }
        }
        self.dfa.is_match_state(self.dfa.next_eoi_state(state))
    }
}

/// Turns `<HOST>`, `<ADDR>` and `<F-NAME>…</F-NAME>` into a regex.
///
/// # Errors
/// An unknown tag, or one that is not closed.
pub fn expand(template: &str) -> Result<String, String> {
    let mut out = String::with_capacity(template.len() + HOST.len());
    let mut rest = template;
    let mut open: Vec<String> = Vec::new();
    while let Some(at) = rest.find('<') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let Some(end) = rest.find('>') else { break };
        let tag = &rest[1..end];
        // `\<` is a literal, and so is the `(?<name>` of a group.
        let escaped = out.ends_with('\\') || out.ends_with("(?") || out.ends_with("(?P");
        if escaped || !is_tag(tag) {
            out.push('<');
            rest = &rest[1..];
            continue;
        }
        match tag {
            "HOST" | "ADDR" => out.push_str(HOST),
            _ if tag.starts_with("F-") => {
                let name = tag[2..].replace('-', "_");
                out.push_str("(?P<F_");
                out.push_str(&name);
                out.push('>');
                open.push(tag.to_owned());
            }
            _ if tag.starts_with("/F-") && open.last().map(String::as_str) == Some(&tag[1..]) => {
                out.push(')');
                open.pop();
            }
            _ if tag.starts_with("/F-") => return Err(format!("<{tag}> closes nothing that is open")),
            _ => return Err(format!("<{tag}> is not known; there are <HOST>, <ADDR> and <F-NAME>…</F-NAME>")),
        }
        rest = &rest[end + 1..];
    }
    out.push_str(rest);
    match open.pop() {
        Some(tag) => Err(format!("<{tag}> is never closed by </{tag}>")),
        None => Ok(out),
    }
}

fn is_tag(tag: &str) -> bool {
    let name = tag.strip_prefix('/').unwrap_or(tag);
    name.starts_with(|c: char| c.is_ascii_uppercase())
        && name.len() > 1
        && name.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || matches!(c, '-' | '_'))
}

fn parse(regex: &str) -> Result<Hir, String> {
    ParserBuilder::new().unicode(false).utf8(false).build().parse(regex).map_err(|error| plain(&error.to_string()))
}

/// A regex error in one line.
fn plain(error: &str) -> String {
    let last = error.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("not a regex");
    last.trim().trim_start_matches("error: ").to_owned()
}

fn nfa_of(hirs: &[Hir]) -> Result<NFA, String> {
    thompson::Compiler::new()
        .configure(
            thompson::Config::new()
                .utf8(false)
                .which_captures(thompson::WhichCaptures::None)
                .nfa_size_limit(Some(DFA_BYTES_MAX)),
        )
        .build_many_from_hir(hirs)
        .map_err(|error| plain(&error.to_string()))
}

/// The full regex of a template, on bytes.
///
/// # Errors
/// What is wrong with it.
pub fn full_regex(template: &str) -> Result<meta::Regex, String> {
    let hir = parse(&expand(template)?)?;
    build_full(&hir)
}

fn build_full(hir: &Hir) -> Result<meta::Regex, String> {
    meta::Builder::new()
        .configure(meta::Config::new().utf8_empty(false).nfa_size_limit(Some(DFA_BYTES_MAX)))
        .build_from_hir(hir)
        .map_err(|error| plain(&error.to_string()))
}

impl Template {
    /// Compiles one pattern. `host_needed`: the prefix does not have the address, so the pattern must.
    ///
    /// # Errors
    /// One sentence on what is wrong with it.
    pub fn new(pattern: &Pattern, host_needed: bool) -> Result<Self, String> {
        let expanded = expand(&pattern.text)?;
        let hosts = expanded.matches("(?P<HOST>").count();
        if hosts > 1 {
            return Err("<HOST> stands in it twice; write one pattern for each".to_owned());
        }
        if hosts == 0 && host_needed {
            return Err("it has no <HOST>; whose failure would it be?".to_owned());
        }
        let hir = parse(&expanded)?;
        let full = build_full(&hir)?;
        if hir.properties().minimum_len() == Some(0) {
            return Err("it matches an empty line, and so every line".to_owned());
        }
        let keyed = expanded.contains("(?P<F_SESSION>") || expanded.contains("(?P<F_ATTEMPT>");
        let literal = longest_literal(&hir);
        let ending = fixed_ending(&hir);
        let (head, reach, tail) = cut(&hir)?;
        Ok(Self { head, reach, tail, full, literal, ending, keyed })
    }
}

fn cut(hir: &Hir) -> Result<(Hir, Reach, Option<Tail>), String> {
    let elements: &[Hir] = match hir.kind() {
        HirKind::Concat(elements) => elements,
        _ => std::slice::from_ref(hir),
    };
    let full = || Ok((Hir::empty(), Reach::Full, None));
    let Some((first, elements)) = elements.split_first() else { return full() };
    if !matches!(first.kind(), HirKind::Look(Look::Start)) {
        return full();
    }
    let is_host =
        |hir: &Hir| matches!(hir.kind(), HirKind::Capture(capture) if capture.name.as_deref() == Some("HOST"));
    let Some(host) = elements.iter().position(is_host) else {
        let has_host = hir.properties().explicit_captures_len() > 0 && format!("{hir:?}").contains("\"HOST\"");
        if has_host {
            // Inside a group or an alternative: as many leading elements as are plain serve as head.
            let plain = elements.iter().take_while(|element| element.properties().explicit_captures_len() == 0).count();
            return Ok((concat(&elements[..plain]), Reach::Full, None));
        }
        // Loops of several patterns in one automaton multiply, so only what stands before the first one is its head.
        let plain = elements.iter().take_while(|element| !has_free_part(element)).count();
        if plain < elements.len() {
            return Ok((concat(&elements[..plain]), Reach::Rest, None));
        }
        return Ok((concat(elements), Reach::Nothing, None));
    };
    let (before, after) = (&elements[..host], &elements[host + 1..]);
    let tail = if after.is_empty() { None } else { Some(Tail::new(&concat(after))?) };
    if let [head @ .., free, last] = before
        && let Some((free_min, greedy)) = free_part(free)
        && let HirKind::Literal(literal) = last.kind()
        && (greedy || !head.iter().any(has_free_part))
    {
        let finder = Box::new(memchr::memmem::Finder::new(&literal.0).into_owned());
        return Ok((concat(head), Reach::Literal { finder, greedy, free_min }, tail));
    }
    Ok((concat(before), Reach::Direct, tail))
}

fn concat(elements: &[Hir]) -> Hir {
    Hir::concat(elements.to_vec())
}

/// `.*` or `.+`, perhaps captured: its least length and whether it is greedy.
fn free_part(hir: &Hir) -> Option<(usize, bool)> {
    match hir.kind() {
        HirKind::Capture(capture) => free_part(&capture.sub),
        HirKind::Repetition(repetition)
            if repetition.max.is_none() && repetition.min <= 1 && is_dot(&repetition.sub) =>
        {
            Some((repetition.min as usize, repetition.greedy))
        }
        _ => None,
    }
}

fn has_free_part(hir: &Hir) -> bool {
    match hir.kind() {
        HirKind::Repetition(repetition) => repetition.max.is_none(),
        HirKind::Capture(capture) => has_free_part(&capture.sub),
        HirKind::Concat(parts) | HirKind::Alternation(parts) => parts.iter().any(has_free_part),
        HirKind::Empty | HirKind::Literal(_) | HirKind::Class(_) | HirKind::Look(_) => false,
    }
}

/// Any byte, or any but a newline; lines have none.
fn is_dot(hir: &Hir) -> bool {
    match hir.kind() {
        HirKind::Class(Class::Bytes(class)) => {
            let mut missing = class.clone();
            missing.negate();
            missing.ranges().iter().all(|range| range.start() == b'\n' && range.end() == b'\n')
        }
        _ => false,
    }
}

/// The text before the `$` at the end of a pattern; empty if there is none.
fn fixed_ending(hir: &Hir) -> Vec<u8> {
    let HirKind::Concat(elements) = hir.kind() else { return Vec::new() };
    match elements.as_slice() {
        [.., literal, end] if matches!(end.kind(), HirKind::Look(Look::End)) => match literal.kind() {
            HirKind::Literal(literal) => literal.0.to_vec(),
            _ => Vec::new(),
        },
        _ => Vec::new(),
    }
}

/// The longest text that every match contains, from 5 bytes on (shorter ones are found everywhere).
fn longest_literal(hir: &Hir) -> Option<Vec<u8>> {
    fn walk(hir: &Hir, best: &mut Vec<u8>) {
        match hir.kind() {
            HirKind::Literal(literal) if literal.0.len() > best.len() => *best = literal.0.to_vec(),
            HirKind::Concat(parts) => parts.iter().for_each(|part| walk(part, best)),
            HirKind::Capture(capture) => walk(&capture.sub, best),
            HirKind::Repetition(repetition) if repetition.min > 0 => walk(&repetition.sub, best),
            _ => {}
        }
    }
    let mut best = Vec::new();
    walk(hir, &mut best);
    (best.len() >= 5).then_some(best)
}

/// All heads of one group of patterns as one automaton, run from the start of the message.
#[derive(Debug)]
pub struct Heads {
    dfa: dense::DFA<Vec<u32>>,
    start: StateID,
}

impl Heads {
    /// Builds the automaton.
    ///
    /// # Errors
    /// When it would become too large.
    pub fn new(heads: &[Hir]) -> Result<Self, String> {
        let nfa = nfa_of(heads)?;
        let dfa = dense::Builder::new()
            .configure(
                dense::Config::new()
                    .start_kind(StartKind::Anchored)
                    .match_kind(MatchKind::All)
                    .dfa_size_limit(Some(4 * DFA_BYTES_MAX))
                    .determinize_size_limit(Some(16 * DFA_BYTES_MAX)),
            )
            .build_from_nfa(&nfa)
            .map_err(|error| format!("the patterns are too large together: {error}"))?;
        let start = dfa
            .start_state(&start::Config::new().anchored(Anchored::Yes))
            .map_err(|error| format!("the patterns cannot be started: {error}"))?;
        Ok(Self { dfa, start })
    }

    /// Calls `found(pattern, end)` for every head that matches, at each of its ends, in order of position.
    #[inline]
    pub fn run(&self, message: &[u8], mut found: impl FnMut(usize, usize)) {
        let dfa = &self.dfa;
        let mut state = self.start;
        for (at, &byte) in message.iter().enumerate() {
            state = dfa.next_state(state, byte);
            if dfa.is_special_state(state) {
                if dfa.is_match_state(state) {
                    // Matches show one byte late: the match ended before this byte.
                    for index in 0..dfa.match_len(state) {
                        found(dfa.match_pattern(state, index).as_usize(), at);
                    }
                } else if dfa.is_dead_state(state) || dfa.is_quit_state(state) {
                    return;
                }
            }
        }
        state = dfa.next_eoi_state(state);
        if dfa.is_match_state(state) {
            for index in 0..dfa.match_len(state) {
                found(dfa.match_pattern(state, index).as_usize(), message.len());
            }
        }
    }

    /// Bytes of the automaton.
    pub fn memory(&self) -> usize {
        self.dfa.memory_usage()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    #[track_caller]
    fn reach(template: &str, expect: &str) {
        let hir = parse(&expand(template).unwrap()).unwrap();
        let (_, reach, _) = cut(&hir).unwrap();
        let got = match reach {
            Reach::Literal { greedy: true, .. } => "last",
            Reach::Literal { greedy: false, .. } => "first",
            Reach::Direct => "direct",
            Reach::Nothing => "nothing",
            Reach::Rest => "rest",
            Reach::Full => "full",
        };
        assert_eq!(got, expect, "{template}");
    }

    #[test]
    fn patterns_are_cut_where_that_is_exact() {
        reach(r"^Failed \S+ for (?:invalid user )?<F-USER>.*</F-USER> from <HOST> port \d+ ssh2?$", "last");
        reach(r"^user .*? at <HOST>", "first");
        reach(r"^Connection from <HOST> port \d+$", "direct");
        reach(r"^Accepted (?:password|publickey) for", "nothing");
        reach(r"^Accepted \S+ for", "rest");
        reach(r"Failed .* from <HOST>", "full");
        reach(r"^(?:a|<HOST>) b", "full");
        reach(r"^.*x.*? at <HOST>$", "direct");
    }

    #[track_caller]
    fn expands(template: &str, expect: Result<&str, &str>) {
        match (expand(template), expect) {
            (Ok(got), Ok(expect)) => assert_eq!(got.replace(HOST, "H"), expect),
            (Err(why), Err(part)) => assert!(why.contains(part), "{why}"),
            (got, expect) => assert_eq!(got.is_ok(), expect.is_ok(), "{template}"),
        }
    }

    #[test]
    fn tags_become_groups_and_unknown_tags_are_named() {
        expands("^from <HOST>$", Ok("^from H$"));
        expands("<F-USER>.*</F-USER> <ADDR>", Ok("(?P<F_USER>.*) H"));
        expands("<sip:x> <HOST>", Ok("<sip:x> H"));
        expands(r"\<HOST> <HOST>", Ok(r"\<HOST> H"));
        expands("<HOTS>", Err("<HOTS> is not known"));
        expands("<F-USER>.*", Err("never closed"));
        expands("</F-USER>", Err("closes nothing"));
    }
}
