//! No text of a log, whole or in pieces, breaks a filter, and the same text gives the same answer twice.
#![no_main]

use std::sync::{Arc, OnceLock};

use band::config::filters::BUILT_IN;
use band::engine::filter::definition::read_filter;
use band::engine::filter::matcher::{Filter, LogMatcher};
use band::engine::filter::prefix::PrefixReader;
use band::engine::filter::stamp::StampReader;
use band::engine::time::Timestamp;

fn matcher() -> &'static LogMatcher {
    static MATCHER: OnceLock<LogMatcher> = OnceLock::new();
    MATCHER.get_or_init(|| {
        let mut filters = Vec::new();
        for (name, text) in BUILT_IN {
            let definition = read_filter(name, name, text).expect("built in");
            let last = definition.mode_names().last().expect("normal").to_owned();
            filters.push(Arc::new(Filter::new(&definition, &last).expect("built in")));
        }
        LogMatcher::new(filters).expect("built in")
    })
}

libfuzzer_sys::fuzz_target!(|text: &[u8]| {
    let scan = || {
        let now = Timestamp::from_seconds(1_795_176_000);
        let mut reader = PrefixReader::new(StampReader::new(jiff::tz::TimeZone::UTC, now));
        let mut matches = Vec::new();
        let scanned = matcher().scan(text, &mut reader, &mut matches);
        (matches, scanned)
    };
    assert_eq!(scan(), scan());
});
