//! How a line begins: a line comes in; its moment, its program, its session and where its message starts go out.
//!
//! One reader serves one log and remembers the last date and host, because the next line mostly has the same.

use std::hash::{BuildHasher, Hasher};
use std::net::IpAddr;

use foldhash::fast::FixedState;
use memchr::{memchr, memrchr};

use super::definition::Prefix;
use super::stamp::StampReader;
use crate::engine::address::munch;
use crate::engine::time::Timestamp;

/// What stands before the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Begun {
    /// The moment of the line, if it says one.
    pub at: Option<Timestamp>,
    /// Where the message starts in the line, or 0 when it was put together in the reader's scratch.
    pub start: usize,
    /// The message is in the scratch (it came out of JSON).
    pub in_scratch: bool,
    /// The program's name, as a range of the line (syslog only).
    pub tag: (usize, usize),
    /// The process that wrote it, with its host; 0 = unknown.
    pub session: u64,
    /// The address, where the prefix has it (access logs).
    pub address: Option<IpAddr>,
}

/// Reads how the lines of one log begin.
#[derive(Clone, Debug)]
pub struct PrefixReader {
    stamps: StampReader,
    /// Message put together from a JSON line.
    pub scratch: Vec<u8>,
    /// Lines are journal messages: `host tag[pid]: …` without a stamp.
    pub undated: bool,
    memo: Vec<u8>,
    memo_at: Timestamp,
    memo_host: u64,
}

/// A number for a text, the same in every run (sessions are compared between logs of one run only).
pub fn hash_of(parts: &[&[u8]]) -> u64 {
    let mut hasher = FixedState::with_seed(0x6261_6e64).build_hasher();
    for part in parts {
        hasher.write_usize(part.len());
        hasher.write(part);
    }
    hasher.finish() | 1
}

impl PrefixReader {
    /// A reader that takes its stamps from `stamps`.
    pub fn new(stamps: StampReader) -> Self {
        Self { stamps, scratch: Vec::new(), undated: false, memo: Vec::new(), memo_at: Timestamp(0), memo_host: 0 }
    }

    /// Tells the reader the time; stamps without a year depend on it.
    pub fn set_now(&mut self, now: Timestamp) {
        if self.stamps.set_now(now) {
            self.memo.clear();
        }
    }

    /// Reads the beginning of `line` (without its newline); `None` = it does not begin like that.
    #[inline(always)]
    pub fn read(&mut self, prefix: Prefix, line: &[u8]) -> Option<Begun> {
        match prefix {
            Prefix::Syslog => self.syslog(line),
            Prefix::Asterisk => self.inside(line, Self::asterisk),
            Prefix::Nginx => self.inside(line, Self::nginx),
            Prefix::None => Some(self.plain(line)),
        }
    }

    /// Tries the line as it is, then what syslog carries inside.
    #[inline(never)]
    fn inside(&mut self, line: &[u8], read: fn(&mut Self, &[u8]) -> Option<Begun>) -> Option<Begun> {
        // Without a date of its own a line is only believed inside syslog: a raw packet dump has none either.
        if let Some(begun) = read(self, line)
            && begun.at.is_some()
        {
            return Some(begun);
        }
        let outer = self.syslog(line)?;
        let inner = read(self, &line[outer.start..])?;
        let start = if inner.in_scratch { 0 } else { outer.start + inner.start };
        Some(Begun { at: inner.at.or(outer.at), start, tag: outer.tag, ..inner })
    }

    #[inline(never)]
    fn plain(&mut self, line: &[u8]) -> Begun {
        let opening = usize::from(line.first() == Some(&b'['));
        match self.stamps.read(&line[opening..]) {
            Some((at, length)) => {
                let mut start = opening + length;
                while matches!(line.get(start), Some(b']' | b' ' | b':')) {
                    start += 1;
                }
                Begun { at: Some(at), start, ..EMPTY }
            }
            None => EMPTY,
        }
    }

    #[inline(always)]
    fn syslog(&mut self, line: &[u8]) -> Option<Begun> {
        let known = self.memo.len();
        if known != 0 && line.len() > known && starts_alike(line, &self.memo) {
            return self.tagged(line, known, self.memo_at, self.memo_host);
        }
        self.syslog_anew(line)
    }

    #[inline(never)]
    fn syslog_anew(&mut self, line: &[u8]) -> Option<Begun> {
        if self.undated {
            let start = memchr(b' ', line)? + 1;
            return self
                .tagged(line, start, Timestamp(0), hash_of(&[&line[..start]]))
                .map(|begun| Begun { at: None, ..begun });
        }
        let mut at = 0;
        let mut structured = false;
        if line.first() == Some(&b'<') {
            let close = line.iter().take(5).position(|b| *b == b'>')?;
            at = close + 1;
            structured = line.get(at) == Some(&b'1') && line.get(at + 1) == Some(&b' ');
            at += if structured { 2 } else { 0 };
        }
        let (moment, length) = self.stamps.read(&line[at..])?;
        let after_stamp = at + length;
        if line.get(after_stamp) != Some(&b' ') {
            return None;
        }
        let host_start = after_stamp + 1;
        let host_end = host_start + memchr(b' ', &line[host_start..])?;
        let host = hash_of(&[&line[host_start..host_end]]);
        let start = host_end + 1;
        if structured {
            return structured_rest(line, start, moment, host);
        }
        self.memo.clear();
        self.memo.extend_from_slice(&line[..start]);
        self.memo_at = moment;
        self.memo_host = host;
        self.tagged(line, start, moment, host)
    }

    /// `tag[pid]: message`, `tag: message`; also a second host name before the tag, as rsyslog templates write it.
    #[inline(always)]
    fn tagged(&self, line: &[u8], start: usize, at: Timestamp, host: u64) -> Option<Begun> {
        let mut start = start;
        for _ in 0..2 {
            let mut end = start;
            while end < line.len() && !matches!(line[end], b'[' | b':' | b' ') {
                end += 1;
            }
            match line.get(end)? {
                b'[' => {
                    let (pid, close) = pid_until(line, end + 1, b']')?;
                    let session = session_of(host, pid);
                    if line.get(close + 1) != Some(&b':') {
                        return None;
                    }
                    return Some(Begun {
                        at: Some(at),
                        start: past_blank(line, close + 2),
                        tag: (start, end),
                        session,
                        ..EMPTY
                    });
                }
                b':' => {
                    return Some(Begun { at: Some(at), start: past_blank(line, end + 1), tag: (start, end), ..EMPTY });
                }
                _ => start = end + 1,
            }
        }
        None
    }

    fn asterisk(&mut self, line: &[u8]) -> Option<Begun> {
        if line.first() == Some(&b'{') {
            return self.asterisk_json(line);
        }
        let mut at = 0;
        let mut moment = None;
        if line.first() == Some(&b'[') {
            let (stamp, length) = self.stamps.read(line.get(1..)?)?;
            moment = Some(stamp);
            at = 1 + length;
            if line.get(at) != Some(&b']') || line.get(at + 1) != Some(&b' ') {
                return None;
            }
            at += 2;
        }
        let level = line[at..].iter().take_while(|b| b.is_ascii_uppercase()).count();
        at += level;
        if level < 3 || line.get(at) != Some(&b'[') {
            return None;
        }
        // Thread, then the call in a second pair of brackets.
        while line.get(at) == Some(&b'[') {
            at += 1 + memchr(b']', line.get(at + 1..)?)? + 1;
        }
        at += usize::from(line.get(at) == Some(&b':'));
        if line.get(at) != Some(&b' ') {
            return None;
        }
        at += 1;
        let file_end = at + memchr(b':', &line[at..])?;
        at = file_end + 1;
        if line.get(at).is_some_and(u8::is_ascii_digit) {
            // `file.c:114 function: ` and `file.c:114 in function: `
            while line.get(at).is_some_and(u8::is_ascii_digit) {
                at += 1;
            }
            if let Some(rest) = line.get(at..).and_then(|rest| rest.strip_prefix(b" in ")) {
                at = line.len() - rest.len();
            } else {
                at += 1;
            }
            let name = line.get(at..)?.iter().take_while(|b| b.is_ascii_alphanumeric() || **b == b'_').count();
            if name == 0 || line.get(at + name) != Some(&b':') {
                return None;
            }
            at += name + 1;
        }
        (line.get(at) == Some(&b' ')).then_some(Begun { at: moment, start: at + 1, ..EMPTY })
    }

    fn asterisk_json(&mut self, line: &[u8]) -> Option<Begun> {
        let object: serde_json::Value = serde_json::from_slice(line).ok()?;
        let message = object.get("logmsg")?.get("message")?.as_str()?;
        let moment = object
            .get("timestamp")
            .and_then(|stamp| stamp.as_str())
            .and_then(|stamp| self.stamps.read(stamp.as_bytes()));
        self.scratch.clear();
        self.scratch.extend_from_slice(message.trim_end_matches(['\n', '\r']).as_bytes());
        Some(Begun { at: moment.map(|(at, _)| at), in_scratch: true, ..EMPTY })
    }

    fn nginx(&mut self, line: &[u8]) -> Option<Begun> {
        match line.get(4) {
            Some(b'/') => self.nginx_error(line),
            _ => self.nginx_access(line),
        }
    }

    fn nginx_error(&mut self, line: &[u8]) -> Option<Begun> {
        let (moment, length) = self.stamps.read(line)?;
        let rest = line.get(length..)?.strip_prefix(b" [")?;
        let rest = &rest[memchr(b']', &rest[..rest.len().min(16)])?..];
        let rest = rest.strip_prefix(b"] ")?;
        let colon = memchr(b':', &rest[..rest.len().min(32)])?;
        if !rest[..colon].iter().all(|b| b.is_ascii_digit() || *b == b'#') || rest.get(colon + 1) != Some(&b' ') {
            return None;
        }
        let mut rest = &rest[colon + 2..];
        if rest.first() == Some(&b'*') {
            let digits = rest[1..].iter().take_while(|b| b.is_ascii_digit()).count();
            if rest.get(1 + digits) == Some(&b' ') {
                rest = &rest[digits + 2..];
            }
        }
        Some(Begun { at: Some(moment), start: line.len() - rest.len(), ..EMPTY })
    }

    /// `ADDRESS - user [date] "request" …`; the message starts at the user. The first quote ends what is unquoted,
    /// because the server writes a quote in a user name as `\x22`.
    fn nginx_access(&mut self, line: &[u8]) -> Option<Begun> {
        if line.first() == Some(&b'{') {
            return self.nginx_access_json(line);
        }
        let (address, end) = leading_address(line)?;
        let start = line.get(end..)?.strip_prefix(b" - ").map(|rest| line.len() - rest.len())?;
        let quote = start + memchr(b'"', &line[start..])?;
        let head = line[start..quote].strip_suffix(b"] ")?;
        let date = start + memrchr(b'[', head)? + 1;
        let (moment, _) = self.stamps.read(&line[date..])?;
        Some(Begun { at: Some(moment), start, address: Some(address), ..EMPTY })
    }

    fn nginx_access_json(&mut self, line: &[u8]) -> Option<Begun> {
        let object: serde_json::Value = serde_json::from_slice(line).ok()?;
        let text = |key: &str| object.get(key).and_then(|value| value.as_str()).unwrap_or("");
        let (address, _) = munch(text("remote_addr").as_bytes())?;
        let moment = ["time_iso8601", "time", "time_local", "timestamp", "@timestamp"]
            .iter()
            .find_map(|key| self.stamps.read(text(key).as_bytes()))
            .or_else(|| self.stamps.read(object.get("msec")?.to_string().as_bytes()));
        let number = |key: &str| object.get(key).map(|value| value.to_string().replace('"', "")).unwrap_or_default();
        let user = match text("remote_user") {
            "" => "-",
            user => user,
        };
        let agent = if object.get("http_user_agent").is_some() { text("http_user_agent") } else { text("ua") };
        self.scratch.clear();
        let quote_free = |text: &str| text.replace('"', "\\x22").replace('\n', "\\x0A");
        let message = format!(
            "{} [-] \"{}\" {} {} \"{}\" \"{}\"",
            quote_free(user),
            quote_free(text("request")),
            number("status"),
            number("bytes"),
            quote_free(text("referer")),
            quote_free(agent)
        );
        self.scratch.extend_from_slice(message.as_bytes());
        Some(Begun { at: moment.map(|(at, _)| at), in_scratch: true, address: Some(address), ..EMPTY })
    }
}

/// Nothing known.
const EMPTY: Begun = Begun { at: None, start: 0, in_scratch: false, tag: (0, 0), session: 0, address: None };

#[inline]
fn past_blank(line: &[u8], at: usize) -> usize {
    if line.get(at) == Some(&b' ') { at + 1 } else { at.min(line.len()) }
}

/// Does `line`, which is longer, start with `known`? Two overlapping words of 16 bytes answer for most.
#[inline(always)]
fn starts_alike(line: &[u8], known: &[u8]) -> bool {
    let length = known.len();
    let word = |text: &[u8], at: usize| text[at..].first_chunk::<16>().map(|word| u128::from_ne_bytes(*word));
    match length {
        16..=32 => word(line, 0) == word(known, 0) && word(line, length - 16) == word(known, length - 16),
        _ => line[..length] == *known,
    }
}

/// A number for the process id up to `end`, mostly its digits, and where it ends.
#[inline(always)]
fn pid_until(line: &[u8], start: usize, end: u8) -> Option<(u64, usize)> {
    let mut value = 0u64;
    for (at, byte) in line.iter().enumerate().skip(start) {
        if *byte == end {
            return Some((value, at));
        }
        value = value.wrapping_mul(31).wrapping_add(u64::from(*byte));
    }
    None
}

/// A session number from host and process.
#[inline(always)]
fn session_of(host: u64, pid: u64) -> u64 {
    (host ^ pid.wrapping_mul(0x9e37_79b9_7f4a_7c15)) | 1
}

/// The rest of RFC 5424 behind the host: `app procid msgid [structured data] message`.
fn structured_rest(line: &[u8], start: usize, at: Timestamp, host: u64) -> Option<Begun> {
    let app_end = start + memchr(b' ', &line[start..])?;
    let (pid, pid_end) = pid_until(line, app_end + 1, b' ')?;
    let id_end = pid_end + 1 + memchr(b' ', line.get(pid_end + 1..)?)?;
    let mut data = id_end + 1;
    if line.get(data) == Some(&b'-') {
        data += 1;
    } else {
        let mut quoted = false;
        while data < line.len() {
            match line[data] {
                b'\\' if quoted => data += 1,
                b'"' => quoted = !quoted,
                b']' if !quoted && line.get(data + 1) != Some(&b'[') => break,
                _ => {}
            }
            data += 1;
        }
        data += 1;
    }
    // rsyslog keeps the blank that stood before the message, so there may be two.
    let message = past_blank(line, past_blank(line, data.min(line.len())));
    let session = session_of(host, pid);
    Some(Begun { at: Some(at), start: message, tag: (start, app_end), session, ..EMPTY })
}

/// The client at the start of an access line, or behind the virtual host that some formats put first.
fn leading_address(line: &[u8]) -> Option<(IpAddr, usize)> {
    if let Some((address, end)) = munch(line)
        && line.get(end) == Some(&b' ')
        && line.get(end + 1) == Some(&b'-')
    {
        return Some((address, end));
    }
    let second = memchr(b' ', &line[..line.len().min(300)])? + 1;
    let (address, length) = munch(&line[second..])?;
    Some((address, second + length))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;
    use jiff::tz::TimeZone;

    fn reader() -> PrefixReader {
        PrefixReader::new(StampReader::new(TimeZone::UTC, Timestamp::from_seconds(1_795_176_000)))
    }

    #[track_caller]
    fn check(prefix: Prefix, line: &str, expect: Option<(&str, &str)>) {
        let mut reader = reader();
        let got = reader.read(prefix, line.as_bytes()).map(|begun| {
            let message = if begun.in_scratch { &reader.scratch[..] } else { &line.as_bytes()[begun.start..] };
            (begun.at.map_or("none".to_owned(), |at| at.to_string()), String::from_utf8_lossy(message).into_owned())
        });
        assert_eq!(got, expect.map(|(at, message)| (at.to_owned(), message.to_owned())), "{line}");
    }

    #[test]
    fn syslog_in_every_form_begins_the_same_message() {
        let expect = Some(("2026-11-20T10:48:13Z", "Failed password"));
        for line in [
            "Nov 20 10:48:13 pbx1 sshd[102]: Failed password",
            "Nov 20 10:48:13 pbx1 sshd: Failed password",
            "<38>Nov 20 10:48:13 pbx1 sshd[102]: Failed password",
            "2026-11-20T10:48:13+00:00 pbx1 sshd[102]: Failed password",
            "<38>1 2026-11-20T10:48:13+00:00 pbx1 sshd 102 - -  Failed password",
            "<38>1 2026-11-20T10:48:13+00:00 pbx1 sshd 102 - [a x=\"] y\"] Failed password",
            "2026-11-20 10:48:13 auth.warn sshd[102]: Failed password",
            "Nov 20 10:48:13 web1 web1 sshd: Failed password",
        ] {
            check(Prefix::Syslog, line, expect);
        }
        check(Prefix::Syslog, "no date here", None);
        check(Prefix::Syslog, "Nov 20 10:48:13 pbx1", None);
        check(Prefix::Syslog, "", None);
    }

    #[test]
    fn asterisk_is_read_from_files_syslog_and_json() {
        let expect = Some(("2026-11-20T12:00:05Z", "Request 'X'"));
        for line in [
            "[Nov 20 12:00:05] NOTICE[114] res_pjsip/pjsip_distributor.c: Request 'X'",
            "[Nov 20 12:00:05] NOTICE[114][C-0000000a] chan_sip.c: Request 'X'",
            "[2026-11-20 12:00:05] NOTICE[114]: res_pjsip/pjsip_distributor.c:722 log_failed_request: Request 'X'",
            "2026-11-20T12:00:05+00:00 voip asterisk[80]: NOTICE[114]: a/b.c:722 in log_failed_request: Request 'X'",
            r#"{"timestamp":"Nov 20 12:00:05","logmsg":{"level":"NOTICE","message":"Request 'X'\n"}}"#,
        ] {
            check(Prefix::Asterisk, line, expect);
        }
        check(Prefix::Asterisk, "Contact: <sip:x> NOTICE[1] a.c: forged without a date", None);
        check(Prefix::Asterisk, "NOTICE[1] a.c: forged without a date", None);
        check(Prefix::Asterisk, "[Nov 20 12:00:05] hello", None);
    }

    #[test]
    fn nginx_error_and_access_lines_are_read() {
        check(
            Prefix::Nginx,
            "2026/11/20 10:55:26 [error] 113#113: *20 limiting requests",
            Some(("2026-11-20T10:55:26Z", "limiting requests")),
        );
        let message = "al [x] ice [20/Nov/2026:10:55:26 +0000] \"GET / HTTP/1.1\" 401 1";
        let expect = Some(("2026-11-20T10:55:26Z", message));
        check(Prefix::Nginx, &format!("198.51.100.20 - {message}"), expect);
        check(Prefix::Nginx, &format!("www.example.net:80 198.51.100.20 - {message}"), expect);
        check(Prefix::Nginx, &format!("192.0.2.1:80 198.51.100.20 - {message}"), expect);
        check(Prefix::Nginx, &format!("Nov 20 10:55:26 web1 nginx: 2001:db8::1 - {message}"), expect);
        check(Prefix::Nginx, "unix: - - [20/Nov/2026:10:55:26 +0000] \"GET / HTTP/1.1\" 401 1", None);
        let json = r#"{"time":"2026-11-20T10:55:26+00:00","remote_addr":"198.51.100.20","remote_user":"a\"b","request":"GET /x\" HTTP/1.1","status":404,"bytes":15,"referer":"","ua":"c"}"#;
        check(
            Prefix::Nginx,
            json,
            Some(("2026-11-20T10:55:26Z", "a\\x22b [-] \"GET /x\\x22 HTTP/1.1\" 404 15 \"\" \"c\"")),
        );
    }

    #[test]
    fn the_memory_of_the_last_date_never_changes_what_is_read() {
        let mut reader = reader();
        let first = reader.read(Prefix::Syslog, b"Nov 20 10:48:13 a sshd[1]: x").unwrap();
        let again = reader.read(Prefix::Syslog, b"Nov 20 10:48:13 a sshd[1]: y").unwrap();
        assert_eq!(first, again);
        let other_host = reader.read(Prefix::Syslog, b"Nov 20 10:48:13 b sshd[1]: x").unwrap();
        assert_ne!(other_host.session, first.session);
        assert!(reader.read(Prefix::Syslog, b"Nov 20 10:48:13 a ").is_none());
        assert!(reader.read(Prefix::Syslog, b"Nov 20 10:48:13 a x").is_none());
    }
}
