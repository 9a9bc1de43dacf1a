//! A filter against its own samples: a definition comes in, complaints go out. The same code that reads logs judges them.

use std::sync::Arc;

use jiff::tz::TimeZone;

use super::definition::{Definition, NORMAL, Sample};
use super::matcher::{Filter, LogMatcher, Match};
use super::prefix::PrefixReader;
use super::session::{Counted, Joiner};
use super::stamp::StampReader;
use crate::engine::address::munch;
use crate::engine::time::{Span, Timestamp};
use crate::engine::tree::{Complaint, Complaints};

/// Samples are read as if seen then (2026-11-20).
const SAMPLE_NOW: Timestamp = Timestamp::from_seconds(1_795_176_000);

/// Compiles every mode of a filter and runs its samples.
///
/// # Errors
/// Every pattern that does not compile, every sample that is not answered as it says, every pattern without a sample.
pub fn prove(definition: &Arc<Definition>) -> Result<(), Complaints> {
    let mut complaints = Vec::new();
    let mut shown = vec![false; 0];
    let mut labels: Vec<(String, crate::engine::tree::Node)> = Vec::new();
    for mode in definition.mode_names() {
        let filter = match Filter::new(definition, mode) {
            Ok(filter) => Arc::new(filter),
            Err(mut wrong) => {
                complaints.append(&mut wrong);
                continue;
            }
        };
        let matcher = match LogMatcher::new(vec![Arc::clone(&filter)]) {
            Ok(matcher) => matcher,
            Err(why) => {
                complaints.push(Complaint { file: Arc::from(definition.name.as_str()), line: 0, message: why });
                continue;
            }
        };
        for number in 0.. {
            let Some(pattern) = filter.pattern(number) else { break };
            if !labels.iter().any(|(label, _)| *label == pattern.label) {
                labels.push((pattern.label.clone(), pattern.node.clone()));
                shown.push(false);
            }
        }
        for sample in &definition.samples {
            if sample.mode.as_deref().unwrap_or(NORMAL) != mode {
                continue;
            }
            let matched = try_sample(&matcher, sample, &mut complaints);
            for (index, (label, _)) in labels.iter().enumerate() {
                shown[index] |= matched.contains(label);
            }
        }
    }
    let known: Vec<&str> = definition.mode_names().collect();
    for sample in &definition.samples {
        if let Some(mode) = &sample.mode
            && !known.contains(&mode.as_str())
        {
            complaints
                .push(sample.node.complaint(format!("there is no mode \"{mode}\"; there are {}", known.join(", "))));
        }
    }
    for ((label, node), shown) in labels.iter().zip(&shown) {
        if !shown {
            complaints.push(node.complaint(format!(
                "{label} has no [[sample]] that it matches; a pattern nobody has seen work is not trusted"
            )));
        }
    }
    complaints.sort();
    complaints.dedup();
    if complaints.is_empty() { Ok(()) } else { Err(complaints) }
}

/// Runs one sample; the labels of the patterns that matched its lines.
fn try_sample(matcher: &LogMatcher, sample: &Sample, complaints: &mut Complaints) -> Vec<String> {
    let filter = &matcher.filters()[0];
    let mut reader = PrefixReader::new(StampReader::new(TimeZone::UTC, SAMPLE_NOW));
    let mut joiner = Joiner::new(filter.joining);
    let mut counted: Vec<Counted> = Vec::new();
    let mut matched = Vec::new();
    for line in &sample.lines {
        let mut matches: Vec<Match> = Vec::new();
        matcher.scan(line.as_bytes(), &mut reader, &mut matches);
        for found in &matches {
            let Some(pattern) = filter.pattern(found.pattern) else { continue };
            matched.push(pattern.label.clone());
            let at = found.at.unwrap_or(SAMPLE_NOW);
            joiner.take(found, (pattern.role, pattern.ends), at, 0, |failure| counted.push(failure));
        }
    }
    joiner.handle_timeout(SAMPLE_NOW + Span::from_seconds(100 * 366 * 86_400), |failure| counted.push(failure));
    let wanted = sample.address.as_deref().and_then(|address| munch(address.as_bytes())).map(|(address, _)| address);
    if sample.address.is_some() && wanted.is_none() {
        complaints.push(sample.node.complaint("the sample's address is not an address"));
        return matched;
    }
    let shown = sample.lines.last().map_or("", String::as_str);
    if counted.len() != sample.failures {
        let got = if counted.is_empty() { "none".to_owned() } else { counted.len().to_string() };
        complaints.push(
            sample.node.complaint(format!("the sample should be {} failure(s) but is {got}: {shown}", sample.failures)),
        );
    } else if let Some(wrong) = counted.iter().find(|failure| Some(failure.address) != wanted) {
        complaints.push(sample.node.complaint(format!("the sample's failure was laid on {}: {shown}", wrong.address)));
    }
    matched
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;
    use crate::engine::filter::definition::read_filter;

    #[track_caller]
    fn check(text: &str, expect: &str) {
        let result = read_filter("x", "x.toml", text).and_then(|definition| prove(&definition));
        match result {
            Ok(()) => assert_eq!(expect, "", "{text}"),
            Err(complaints) => {
                let all: String = complaints.iter().map(|complaint| format!("{complaint}\n")).collect();
                assert!(!expect.is_empty() && all.contains(expect), "{all}");
            }
        }
    }

    #[test]
    fn a_filter_is_only_as_good_as_its_samples() {
        let sample = "[[sample]]\nline = \"no 192.0.2.1\"\naddress = \"192.0.2.1\"\n";
        check(&format!("failregex = ['^no <HOST>$']\n{sample}"), "");
        check("failregex = ['^no <HOST>$']\n", "no [[sample]]");
        check(&format!("failregex = ['^yes <HOST>$']\n{sample}"), "should be 1 failure(s) but is none");
        check(
            &format!("failregex = ['^no <HOST>$', '^never <HOST>$']\n{sample}"),
            "x.toml:1: failregex[1] has no [[sample]]",
        );
        check(&format!("failregex = ['^no (<HOST>$']\n{sample}"), "x.toml:1: failregex[0]:");
        check(&format!("failregex = ['^no']\n{sample}"), "has no <HOST>");
        check(&format!("failregx = ['^no <HOST>$']\n{sample}"), "did you mean \"failregex\"");
        check(
            "failregex = ['^no <HOST>$']\n[[sample]]\nline = \"no 192.0.2.2\"\naddress = \"192.0.2.1\"\n",
            "laid on 192.0.2.2",
        );
    }
}
