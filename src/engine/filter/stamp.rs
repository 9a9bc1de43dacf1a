//! The moment a log line says: bytes come in, a `Timestamp` and its length go out. Never asks the clock; `now` is set from outside.
//!
//! Understood at the start of the text: syslog (`Nov 20 10:48:06`, no year, no zone), asctime, RFC 3339 and its
//! relatives (`2026-11-20T10:48:06.123+01:00`, blank for `T`, `,` for `.`, zone left out), nginx error
//! (`2026/11/20 10:55:16`), Common Log Format (`20/Nov/2026:10:55:26 +0000`), and seconds since 1970.
//!
//! Rules, as fail2ban documents them: a stamp without a year is of this year, or of the last one when that would be
//! more than 24 h ahead; a stamp without a zone is in the jail's zone. An hour that occurs twice (clocks put back) is
//! the first one until the log has passed it.

use jiff::civil::DateTime;
use jiff::tz::{AmbiguousOffset, TimeZone};

use crate::engine::time::{Span, Timestamp};

/// How far ahead of `now` a stamp without a year may be before it counts as last year's.
const YEAR_AHEAD_MAX: Span = Span::from_seconds(86_400);
/// Offsets change on quarters of an hour, nowhere more often.
const ZONE_BLOCK_SECONDS: i64 = 900;

/// Reads stamps of one log; remembers the last one, so that a repeated second costs a comparison.
#[derive(Clone, Debug)]
pub struct StampReader {
    zone: TimeZone,
    now: Timestamp,
    now_year: i64,
    last: Timestamp,
    memo_text: [u8; 24],
    memo_length: usize,
    memo_shape: Shape,
    memo_civil: i64,
    block: i64,
    block_offset: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    Syslog,
    Iso,
    Slash,
    Clf,
}

impl StampReader {
    /// A reader for stamps in `zone` (where they name none), seen around `now`.
    pub fn new(zone: TimeZone, now: Timestamp) -> Self {
        let mut reader = Self {
            zone,
            now: Timestamp(i64::MIN),
            now_year: 0,
            last: Timestamp(i64::MIN),
            memo_text: [0; 24],
            memo_length: 0,
            memo_shape: Shape::Syslog,
            memo_civil: 0,
            block: i64::MIN,
            block_offset: 0,
        };
        reader.set_now(now);
        reader
    }

    /// Tells the reader the time; stamps without a year depend on it. True if that may change what was read before.
    pub fn set_now(&mut self, now: Timestamp) -> bool {
        if (now - self.now).0.abs() < 3_600_000 {
            return false;
        }
        self.now = now;
        let year = jiff::Timestamp::from_millisecond(now.0)
            .map_or(1970, |moment| i64::from(self.zone.to_datetime(moment).year()));
        self.now_year = year;
        self.memo_length = 0;
        true
    }

    /// The moment written at the start of `text` and the bytes it takes (with its zone, without a blank behind).
    pub fn read(&mut self, text: &[u8]) -> Option<(Timestamp, usize)> {
        let known = self.memo_length;
        if known != 0 && text.len() >= known && text[..known] == self.memo_text[..known] {
            return self.finish(text, known, self.memo_shape, self.memo_civil);
        }
        let (civil, length, shape) = match *text.first()? {
            b'A'..=b'Z' | b'a'..=b'z' => self.read_named(text)?,
            b'0'..=b'9' => match read_numbered(text) {
                Some(read) => read,
                None => return read_epoch(text),
            },
            _ => return None,
        };
        if length <= self.memo_text.len() && length <= text.len() {
            self.memo_text[..length].copy_from_slice(&text[..length]);
            self.memo_length = length;
            self.memo_shape = shape;
            self.memo_civil = civil;
        }
        self.finish(text, length, shape, civil)
    }

    /// Adds fraction and zone, which follow the second.
    fn finish(&mut self, text: &[u8], mut at: usize, shape: Shape, civil: i64) -> Option<(Timestamp, usize)> {
        let (millis, length) = read_fraction(&text[at..]);
        at += length;
        let written = match shape {
            Shape::Iso => read_zone(&text[at..]),
            Shape::Clf if text.get(at) == Some(&b' ') => {
                read_zone(&text[at + 1..]).map(|(zone, length)| (zone, length + 1))
            }
            Shape::Syslog | Shape::Slash | Shape::Clf => None,
        };
        let offset = match written {
            Some((offset, length)) => {
                at += length;
                offset
            }
            None => self.offset_at(civil)?,
        };
        let moment = Timestamp((civil - offset) * 1000 + millis);
        self.last = moment;
        Some((moment, at))
    }

    /// Seconds to subtract from civil time to reach UTC.
    fn offset_at(&mut self, civil: i64) -> Option<i64> {
        let block = civil.div_euclid(ZONE_BLOCK_SECONDS);
        if block == self.block {
            return Some(self.block_offset);
        }
        let local = DateTime::from_parts(jiff::civil::Date::new(1970, 1, 1).ok()?, jiff::civil::Time::midnight())
            .checked_add(jiff::SignedDuration::from_secs(civil))
            .ok()?;
        let offset = match self.zone.to_ambiguous_timestamp(local).offset() {
            AmbiguousOffset::Unambiguous { offset } => {
                self.block = block;
                self.block_offset = i64::from(offset.seconds());
                return Some(self.block_offset);
            }
            AmbiguousOffset::Gap { before, .. } => before,
            AmbiguousOffset::Fold { before, after } => {
                let first = Timestamp::from_seconds(civil - i64::from(before.seconds()));
                let passed = self.last > first + Span::from_seconds(300);
                if passed { after } else { before }
            }
        };
        Some(i64::from(offset.seconds()))
    }

    /// `Nov 20 10:48:06`, `Nov 20 2026 10:48:06`, `Fri Nov 20 10:48:06 2026`.
    fn read_named(&self, text: &[u8]) -> Option<(i64, usize, Shape)> {
        let mut at = 0;
        if weekday(text) {
            at = 4;
        }
        let month = month_number(text.get(at..at + 3)?)?;
        at += 3;
        if text.get(at) != Some(&b' ') {
            return None;
        }
        at += 1 + usize::from(text.get(at + 1) == Some(&b' '));
        let (day, digits) = number(text.get(at..)?, 1, 2)?;
        at += digits;
        if text.get(at) != Some(&b' ') {
            return None;
        }
        at += 1;
        let mut year = None;
        if let Some((written, 4)) = number(&text[at..], 4, 4)
            && text.get(at + 4) == Some(&b' ')
        {
            year = Some(written);
            at += 5;
        }
        let second = time_of_day(text.get(at..)?)?;
        at += 8;
        if year.is_none()
            && text.get(at) == Some(&b' ')
            && let Some((written, 4)) = number(&text[at + 1..], 4, 4)
            && written >= 1970
            && !text.get(at + 5).is_some_and(u8::is_ascii_alphanumeric)
        {
            year = Some(written);
            at += 5;
        }
        let civil = match year {
            Some(year) => days(year, month, day)? * 86_400 + second,
            None => self.without_year(month, day, second)?,
        };
        Some((civil, at, Shape::Syslog))
    }

    fn without_year(&self, month: i64, day: i64, second: i64) -> Option<i64> {
        // Four years back at most: 29 February needs its leap year.
        for year in (self.now_year - 4..=self.now_year + 1).rev() {
            let Some(days) = days(year, month, day) else { continue };
            let civil = days * 86_400 + second;
            let roughly = Timestamp::from_seconds(civil - self.block_offset);
            let ahead_max = if year > self.now_year { Span::from_seconds(43_200) } else { YEAR_AHEAD_MAX };
            if roughly <= self.now + ahead_max {
                return Some(civil);
            }
        }
        None
    }
}

/// `2026-11-20T10:48:06`, `2026/11/20 10:48:06`, `20/Nov/2026:10:48:06`.
fn read_numbered(text: &[u8]) -> Option<(i64, usize, Shape)> {
    let separator = *text.get(4)?;
    if matches!(separator, b'-' | b'/') {
        let (year, _) = number(text, 4, 4)?;
        let (month, _) = number(text.get(5..)?, 2, 2)?;
        let (day, _) = number(text.get(8..)?, 2, 2)?;
        if *text.get(7)? != separator || !matches!(text.get(10)?, b'T' | b' ' | b't') {
            return None;
        }
        let second = time_of_day(text.get(11..)?)?;
        let shape = if separator == b'-' { Shape::Iso } else { Shape::Slash };
        return Some((days(year, month, day)? * 86_400 + second, 19, shape));
    }
    if text.get(2) == Some(&b'/') && text.get(6) == Some(&b'/') && text.get(11) == Some(&b':') {
        let (day, _) = number(text, 2, 2)?;
        let month = month_number(text.get(3..6)?)?;
        let (year, _) = number(text.get(7..)?, 4, 4)?;
        let second = time_of_day(text.get(12..)?)?;
        return Some((days(year, month, day)? * 86_400 + second, 20, Shape::Clf));
    }
    None
}

/// `1795171686` or `1795171686.391`.
fn read_epoch(text: &[u8]) -> Option<(Timestamp, usize)> {
    let (seconds, mut at) = number(text, 10, 10)?;
    let (millis, length) = read_fraction(&text[at..]);
    at += length;
    (!text.get(at).is_some_and(u8::is_ascii_alphanumeric)).then_some((Timestamp(seconds * 1000 + millis), at))
}

/// `.391816` or `,391` behind a second: its milliseconds and the bytes it takes.
fn read_fraction(text: &[u8]) -> (i64, usize) {
    if !matches!(text.first(), Some(b'.' | b',')) || !text.get(1).is_some_and(u8::is_ascii_digit) {
        return (0, 0);
    }
    let (mut millis, mut scale, mut at) = (0, 100, 1);
    while let Some(digit) = text.get(at).filter(|b| b.is_ascii_digit()) {
        millis += i64::from(digit - b'0') * scale;
        scale /= 10;
        at += 1;
    }
    (millis, at)
}

/// `Z`, `+01:00`, `+0100`, `+01`, ` +0100`; seconds east of UTC.
fn read_zone(text: &[u8]) -> Option<(i64, usize)> {
    let blank = usize::from(text.first() == Some(&b' ') && matches!(text.get(1), Some(b'+' | b'-')));
    let text = &text[blank..];
    let sign = match text.first()? {
        b'Z' | b'z' if !text.get(1).is_some_and(u8::is_ascii_alphanumeric) => return Some((0, 1)),
        b'+' => 1,
        b'-' => -1,
        _ => return None,
    };
    let hours = two_digits(text, 1)?;
    let colon = usize::from(text.get(3) == Some(&b':'));
    let (minutes, length) = match two_digits(text, 3 + colon) {
        Some(minutes) => (minutes, 5 + colon),
        None => (0, 3),
    };
    (hours < 24 && minutes < 60).then_some((sign * (hours * 3600 + minutes * 60), blank + length))
}

fn two_digits(text: &[u8], at: usize) -> Option<i64> {
    let (tens, ones) = (text.get(at)?, text.get(at + 1)?);
    (tens.is_ascii_digit() && ones.is_ascii_digit()).then(|| i64::from((tens - b'0') * 10 + (ones - b'0')))
}

fn time_of_day(text: &[u8]) -> Option<i64> {
    let b = text.get(..8)?;
    let digit = |at: usize| -> Option<i64> { b[at].is_ascii_digit().then(|| i64::from(b[at] - b'0')) };
    if b[2] != b':' || b[5] != b':' {
        return None;
    }
    let hour = digit(0)? * 10 + digit(1)?;
    let minute = digit(3)? * 10 + digit(4)?;
    let second = digit(6)? * 10 + digit(7)?;
    (hour < 24 && minute < 60 && second <= 60).then_some(hour * 3600 + minute * 60 + second)
}

/// Between `least` and `most` digits; fails when another digit follows.
fn number(text: &[u8], least: usize, most: usize) -> Option<(i64, usize)> {
    let mut value = 0i64;
    let mut length = 0;
    while length < most
        && let Some(digit) = text.get(length).filter(|b| b.is_ascii_digit())
    {
        value = value * 10 + i64::from(digit - b'0');
        length += 1;
    }
    (length >= least && !text.get(length).is_some_and(u8::is_ascii_digit)).then_some((value, length))
}

fn weekday(text: &[u8]) -> bool {
    text.get(3) == Some(&b' ')
        && matches!(text.get(..3), Some(b"Mon" | b"Tue" | b"Wed" | b"Thu" | b"Fri" | b"Sat" | b"Sun"))
}

fn month_number(name: &[u8]) -> Option<i64> {
    Some(match name {
        b"Jan" => 1,
        b"Feb" => 2,
        b"Mar" => 3,
        b"Apr" => 4,
        b"May" => 5,
        b"Jun" => 6,
        b"Jul" => 7,
        b"Aug" => 8,
        b"Sep" => 9,
        b"Oct" => 10,
        b"Nov" => 11,
        b"Dec" => 12,
        _ => return None,
    })
}

/// Days since 1970-01-01 of a date of the Gregorian calendar; `None` for a day that does not exist.
fn days(year: i64, month: i64, day: i64) -> Option<i64> {
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let length = match month {
        2 if leap => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        1..=12 => 31,
        _ => return None,
    };
    if !(1..=length).contains(&day) || !(1970..=9999).contains(&year) {
        return None;
    }
    // Years are counted from March, so that the leap day is the last one.
    let shifted = if month <= 2 { year - 1 } else { year };
    let era = shifted.div_euclid(400);
    let year_of_era = shifted.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    Some(era * 146_097 + day_of_era - 719_468)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    fn at(text: &str) -> Timestamp {
        Timestamp(text.parse::<jiff::Timestamp>().unwrap().as_millisecond())
    }

    #[track_caller]
    fn check(zone: &str, now: &str, text: &str, expect: Option<(&str, usize)>) {
        let mut reader = StampReader::new(TimeZone::get(zone).unwrap(), at(now));
        let expect = expect.map(|(moment, length)| (at(moment), length));
        for round in ["first", "from memory"] {
            assert_eq!(reader.read(text.as_bytes()), expect, "{text} in {zone}, {round}");
        }
    }

    #[test]
    fn every_form_of_stamp_is_read() {
        let now = "2026-11-20T12:00:00Z";
        check("UTC", now, "Nov 20 10:48:06 host x", Some(("2026-11-20T10:48:06Z", 15)));
        check("UTC", now, "Nov  2 10:48:06 host x", Some(("2026-11-02T10:48:06Z", 15)));
        check("UTC", now, "Nov 2 10:48:06 host x", Some(("2026-11-02T10:48:06Z", 14)));
        check("Europe/Berlin", now, "Nov 20 10:48:06 host", Some(("2026-11-20T09:48:06Z", 15)));
        check("UTC", now, "Fri Nov 20 10:48:06 2026", Some(("2026-11-20T10:48:06Z", 24)));
        check("UTC", now, "Nov 20 2024 10:48:06 h", Some(("2024-11-20T10:48:06Z", 20)));
        check("UTC", now, "2026-11-20T10:48:06.391816+00:00 h", Some(("2026-11-20T10:48:06.391Z", 32)));
        check("UTC", now, "2026-11-20T10:48:06+0100 h", Some(("2026-11-20T09:48:06Z", 24)));
        check("UTC", now, "2026-11-20T10:48:06Z", Some(("2026-11-20T10:48:06Z", 20)));
        check("Asia/Tokyo", now, "2026-11-20 10:48:06,391", Some(("2026-11-20T01:48:06.391Z", 23)));
        check("UTC", now, "2026-11-20 10:48:06] NOTICE", Some(("2026-11-20T10:48:06Z", 19)));
        check("UTC", now, "2026/11/20 10:55:16 [error]", Some(("2026-11-20T10:55:16Z", 19)));
        check("UTC", now, "20/Nov/2026:10:55:26 +0230] \"GET", Some(("2026-11-20T08:25:26Z", 26)));
        check("UTC", now, "1795171686.391 x", Some(("2026-11-20T10:48:06.391Z", 14)));
        check("UTC", now, "1795171686", Some(("2026-11-20T10:48:06Z", 10)));
        check("UTC", now, "Feb 30 10:48:06", None);
        check("UTC", now, "2026-13-20T10:48:06", None);
        check("UTC", now, "Nov 20 25:48:06", None);
        check("UTC", now, "hello", None);
        check("UTC", now, "", None);
        check("UTC", now, "Nov", None);
    }

    #[test]
    fn a_stamp_without_a_year_is_of_this_year_unless_that_is_ahead() {
        check("UTC", "2027-01-01T00:00:10Z", "Dec 31 23:59:59 h", Some(("2026-12-31T23:59:59Z", 15)));
        check("UTC", "2026-12-31T23:59:50Z", "Jan  1 00:00:01 h", Some(("2027-01-01T00:00:01Z", 15)));
        check("UTC", "2026-11-20T12:00:00Z", "Nov 21 11:59:00 h", Some(("2026-11-21T11:59:00Z", 15)));
        check("UTC", "2026-11-20T12:00:00Z", "Nov 21 12:01:00 h", Some(("2025-11-21T12:01:00Z", 15)));
        check("UTC", "2026-03-01T12:00:00Z", "Feb 29 12:00:00 h", Some(("2024-02-29T12:00:00Z", 15)));
    }

    #[test]
    fn an_hour_that_comes_twice_is_the_first_until_the_log_has_passed_it() {
        let mut reader = StampReader::new(TimeZone::get("Europe/Berlin").unwrap(), at("2026-10-25T12:00:00Z"));
        let mut read = |text: &str| reader.read(text.as_bytes()).unwrap().0;
        assert_eq!(read("Oct 25 01:59:59 h"), at("2026-10-24T23:59:59Z"));
        assert_eq!(read("Oct 25 02:30:00 h"), at("2026-10-25T00:30:00Z"));
        assert_eq!(read("Oct 25 02:59:59 h"), at("2026-10-25T00:59:59Z"));
        assert_eq!(read("Oct 25 02:00:01 h"), at("2026-10-25T01:00:01Z"));
        assert_eq!(read("Oct 25 03:00:00 h"), at("2026-10-25T02:00:00Z"));
    }

    #[test]
    fn an_hour_that_never_was_is_read_with_the_offset_before_it() {
        check("Europe/Berlin", "2026-04-20T12:00:00Z", "Mar 29 02:30:00 h", Some(("2026-03-29T01:30:00Z", 15)));
    }
}
