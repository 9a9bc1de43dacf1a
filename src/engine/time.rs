//! Moments and spans as whole milliseconds; what comes in is always an argument, never the clock.

use std::fmt;
use std::ops::{Add, Sub};

/// A moment: milliseconds since 1970-01-01T00:00:00Z.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(pub i64);

/// A length of time in milliseconds, never negative when it comes out of the configuration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span(pub i64);

impl Timestamp {
    /// The moment `seconds` after 1970-01-01T00:00:00Z.
    pub const fn from_seconds(seconds: i64) -> Self {
        Self(seconds.saturating_mul(1000))
    }

    /// Whole seconds since 1970-01-01T00:00:00Z, rounded down.
    pub const fn seconds(self) -> i64 {
        self.0.div_euclid(1000)
    }
}

impl Span {
    /// A span of whole seconds.
    pub const fn from_seconds(seconds: i64) -> Self {
        Self(seconds.saturating_mul(1000))
    }

    /// Whole seconds, rounded down.
    pub const fn seconds(self) -> i64 {
        self.0.div_euclid(1000)
    }
}

impl Add<Span> for Timestamp {
    type Output = Self;
    fn add(self, span: Span) -> Self {
        Self(self.0.saturating_add(span.0))
    }
}

impl Sub<Span> for Timestamp {
    type Output = Self;
    fn sub(self, span: Span) -> Self {
        Self(self.0.saturating_sub(span.0))
    }
}

impl Sub for Timestamp {
    type Output = Span;
    fn sub(self, earlier: Self) -> Span {
        Span(self.0.saturating_sub(earlier.0))
    }
}

impl fmt::Display for Timestamp {
    /// RFC 3339 in UTC; milliseconds only when there are any.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match jiff::Timestamp::from_millisecond(self.0) {
            Ok(moment) => write!(f, "{moment}"),
            Err(_) => write!(f, "{} ms", self.0),
        }
    }
}

/// The largest span a duration may have: 100 years. Longer bans are written `"forever"`.
pub const SPAN_MAX: Span = Span::from_seconds(100 * 366 * 86_400);

/// Reads `"90s"`, `"10m"`, `"1h30m"`, `"1d"`, `"1w"`, or a bare number of seconds.
///
/// # Errors
/// A sentence that says what would be right.
pub fn parse_span(text: &str) -> Result<Span, String> {
    let wrong = || {
        format!(
            "\"{text}\" is not a duration: write seconds (600) or a sum like \"90s\", \"10m\", \"1h30m\", \"1d\", \"1w\""
        )
    };
    let trimmed = text.trim();
    if trimmed.is_empty() {
        return Err(wrong());
    }
    if let Ok(seconds) = trimmed.parse::<i64>() {
        return checked(seconds, text);
    }
    let (mut total, mut digits, mut unit) = (0i64, String::new(), String::new());
    let mut flush = |digits: &mut String, unit: &mut String| -> Option<()> {
        let count: i64 = digits.parse().ok()?;
        let factor = match unit.as_str() {
            "s" | "sec" | "second" | "seconds" => 1,
            "m" | "min" | "minute" | "minutes" => 60,
            "h" | "hour" | "hours" => 3600,
            "d" | "day" | "days" => 86_400,
            "w" | "week" | "weeks" => 604_800,
            "mo" | "month" | "months" => 2_629_800,
            "y" | "year" | "years" => 31_557_600,
            _ => return None,
        };
        total = total.checked_add(count.checked_mul(factor)?)?;
        digits.clear();
        unit.clear();
        Some(())
    };
    for c in trimmed.chars() {
        if c.is_ascii_digit() {
            if !unit.is_empty() {
                flush(&mut digits, &mut unit).ok_or_else(wrong)?;
            }
            digits.push(c);
        } else if c.is_ascii_alphabetic() {
            unit.push(c.to_ascii_lowercase());
        } else if !c.is_ascii_whitespace() {
            return Err(wrong());
        }
    }
    flush(&mut digits, &mut unit).ok_or_else(wrong)?;
    checked(total, text)
}

fn checked(seconds: i64, text: &str) -> Result<Span, String> {
    if seconds < 0 {
        return Err(format!("\"{text}\" is negative; durations count from 0"));
    }
    if seconds > SPAN_MAX.seconds() {
        return Err(format!("\"{text}\" is longer than 100 years; write \"forever\" for a ban without an end"));
    }
    Ok(Span::from_seconds(seconds))
}

/// Writes a span the way an operator would: `45s`, `10m`, `1h30m`, `2d3h`.
pub fn show_span(span: Span) -> String {
    let mut rest = span.seconds().max(0);
    if rest == 0 {
        return "0s".to_owned();
    }
    let mut out = String::new();
    for (size, unit) in [(604_800, 'w'), (86_400, 'd'), (3600, 'h'), (60, 'm'), (1, 's')] {
        if rest >= size && (unit != 'w' || rest % 604_800 == 0) {
            out.push_str(&format!("{}{unit}", rest / size));
            rest %= size;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, seconds: Option<i64>) {
        assert_eq!(parse_span(text).ok().map(Span::seconds), seconds, "{text}");
    }

    #[test]
    fn durations_are_numbers_or_sums_with_units() {
        check("600", Some(600));
        check("90s", Some(90));
        check("1h30m", Some(5400));
        check("1d 12h", Some(129_600));
        check("1w", Some(604_800));
        check("", None);
        check("10", Some(10));
        check("10x", None);
        check("m10", None);
        check("-5", None);
        check("1h-3m", None);
        check("99999999999999999999", None);
        check("200y", None);
    }

    #[test]
    fn spans_are_written_as_they_are_read() {
        for text in ["45s", "10m", "1h30m", "2d3h", "1w"] {
            assert_eq!(parse_span(text).map(show_span).as_deref(), Ok(text));
        }
    }
}
