//! What is munched as an address is one for the standard library, too.
#![no_main]

use band::engine::address::munch;

libfuzzer_sys::fuzz_target!(|text: &[u8]| {
    let Some((address, length)) = munch(text) else { return };
    let written = std::str::from_utf8(&text[..length]).expect("an address is ASCII");
    let plain = written.trim_start_matches('[').trim_end_matches(']').split('%').next().unwrap_or("");
    let parsed: std::net::IpAddr = plain.parse().expect("munched, so an address");
    assert_eq!(parsed.to_canonical(), address);
});
