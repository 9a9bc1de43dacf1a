//! No configuration breaks the reader: it is right, or there are complaints.
#![no_main]

libfuzzer_sys::fuzz_target!(|text: &str| {
    if let Err(complaints) = band::config::load_text("band.toml", text) {
        assert!(!complaints.is_empty());
    }
});
