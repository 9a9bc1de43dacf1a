//! Where to start in a file seen for the first time: a moment comes in, the offset of the first line at or after it goes
//! out. Binary search over byte offsets: about 16 reads for 2 million lines (measured: 80 us), never the whole file.
//!
//! Logs are only nearly sorted, so the caller asks for a moment a little earlier than it needs. A line without a date
//! (a continuation) belongs to the dated line before it. It changes nothing and passes nothing on.

use std::os::fd::AsFd;

use rustix::io::{pread, retry_on_intr};

use crate::engine::time::Timestamp;

/// How far lines without a date are followed from one probe.
const PROBE_BYTES: usize = 64 * 1024;
/// When the search has closed in to this, the rest is read line by line.
const CLOSE_BYTES: u64 = 4096;

/// Where to start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Start {
    pub(super) offset: u64,
    /// The offset is inside a line (one longer than a probe), whose rest must be skipped.
    pub(super) inside_line: bool,
    /// How far the file goes now; lines before it are backlog.
    pub(super) end: u64,
}

/// Finds the first line whose moment is at or after `target`. A file in which no line has a date, however small, is
/// started at its end (`size` is where that was when watching began): without dates nobody can say that its lines are not months old, and old lines must not ban.
pub(super) fn locate(
    file: impl AsFd,
    size: u64,
    target: Timestamp,
    stamp_of: &mut dyn FnMut(&[u8]) -> Option<Timestamp>,
) -> Start {
    let mut search = Search { file, buffer: vec![0; PROBE_BYTES], stamp_of };
    let end = search.written_end(size);
    let (mut low, mut high) = (0, end);
    while high - low > CLOSE_BYTES {
        let middle = low + (high - low) / 2;
        match search.first_dated(middle, high, None) {
            Some((line, moment)) if moment < target => low = line,
            // Nothing dated here counts as "late enough": starting too early costs time, too late loses lines.
            Some(_) | None => high = middle,
        }
    }
    // `high` may lie inside the line looked for.
    let offset = match search.first_dated(low, end, Some(target)) {
        Some((line, _)) => line,
        // A long stretch without dates ended the search too soon.
        None if search.wanted_at_end(end, target) => low,
        None => return search.last_line(end),
    };
    Start { offset, inside_line: false, end }
}

struct Search<'a, F> {
    file: F,
    buffer: Vec<u8>,
    stamp_of: &'a mut dyn FnMut(&[u8]) -> Option<Timestamp>,
}

impl<F: AsFd> Search<'_, F> {
    /// Fills the buffer from `offset` on; an error counts as the end of the file.
    fn read(&mut self, offset: u64) -> usize {
        retry_on_intr(|| pread(&self.file, self.buffer.as_mut_slice(), offset)).unwrap_or(0)
    }

    /// The end of what was written: NULs behind it are space reserved in advance.
    fn written_end(&mut self, size: u64) -> u64 {
        let (mut low, mut high) = (0, size);
        let mut step = size.saturating_sub(1);
        // Invariant: something is written before `low`, nothing from `high` on.
        while low < high {
            let length = self.read(step).min(usize::try_from(high - step).unwrap_or(usize::MAX));
            match self.buffer[..length].iter().rposition(|byte| *byte != 0) {
                Some(last) => low = step + last as u64 + 1,
                None => high = step,
            }
            step = low + (high - low) / 2;
        }
        low
    }

    /// The first line that starts after `from` (or at it, if a line starts there), before `until`, and has a date (one
    /// at or after `target`, if given). Looks at one probe's length, or, with a target, as long as lines are older.
    fn first_dated(&mut self, from: u64, until: u64, target: Option<Timestamp>) -> Option<(u64, Timestamp)> {
        // One byte earlier, so that a line starting exactly at `from` is found by the newline before it.
        let mut base = from.saturating_sub(1);
        let mut in_line = from > 0;
        while base < until {
            let length = self.read(base).min(usize::try_from(until - base).unwrap_or(usize::MAX));
            let (mut at, mut older) = (0, false);
            while let Some(newline) = memchr::memchr(b'\n', &self.buffer[at..length]) {
                if !in_line {
                    let line = &self.buffer[at..at + newline];
                    let text = &line[line.iter().take_while(|byte| **byte == 0).count()..];
                    match (self.stamp_of)(text) {
                        Some(moment) if target.is_none_or(|target| moment >= target) => {
                            return Some((base + at as u64, moment));
                        }
                        Some(_) => older = true,
                        None => {}
                    }
                }
                in_line = false;
                at += newline + 1;
            }
            if !older || at == 0 {
                return None;
            }
            base += at as u64;
        }
        None
    }

    fn wanted_at_end(&mut self, end: u64, target: Timestamp) -> bool {
        self.first_dated(end.saturating_sub(PROBE_BYTES as u64), end, Some(target)).is_some()
    }

    /// The end of the file, or the start of its unfinished last line.
    fn last_line(&mut self, end: u64) -> Start {
        let near = end.saturating_sub(PROBE_BYTES as u64);
        let length = self.read(near).min(usize::try_from(end - near).unwrap_or(usize::MAX));
        match memchr::memrchr(b'\n', &self.buffer[..length]) {
            Some(newline) => Start { offset: near + newline as u64 + 1, inside_line: false, end },
            None => Start { offset: near, inside_line: near > 0, end },
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests may fail loudly")]
    use super::*;
    use std::io::Write;

    /// A line's moment is its leading number, in seconds.
    fn stamp(line: &[u8]) -> Option<Timestamp> {
        let digits = line.iter().take_while(|byte| byte.is_ascii_digit()).count();
        let seconds = std::str::from_utf8(&line[..digits]).ok()?.parse().ok()?;
        Some(Timestamp::from_seconds(seconds))
    }

    #[track_caller]
    fn check(content: &[u8], target: i64, expect: usize) -> usize {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        let mut probes = 0;
        let start = locate(&file, content.len() as u64, Timestamp::from_seconds(target), &mut |line| {
            probes += 1;
            stamp(line)
        });
        assert_eq!(start.offset, expect as u64, "target {target}");
        probes
    }

    fn dated(seconds: std::ops::Range<i64>) -> Vec<u8> {
        seconds.flat_map(|second| format!("{second} sshd[1]: Failed password for root\n").into_bytes()).collect()
    }

    #[test]
    fn the_first_line_at_or_after_the_moment_is_found_with_few_probes() {
        let content = dated(100_000..200_000);
        let line = content.len() / 100_000;
        for target in [0, 100_000, 100_001, 150_000, 199_999] {
            let expect = (target - 100_000).max(0) as usize * line;
            assert!(check(&content, target, expect) < 300, "the whole file was read");
        }
        check(&content, 200_000, content.len());
    }

    #[test]
    fn small_files_and_files_without_dates_start_right() {
        check(b"", 5, 0);
        check(b"10 a\n20 b\n30 c\n", 20, 5);
        check(b"10 a\n20 b\n30 c\n", 0, 0);
        check(b"no date\nnone either\n", 0, 20);
        check(b"no date\nunfinis", 0, 8);
        check(&b"no date at all\n".repeat(20_000), 0, 300_000);
        check(&b"x".repeat(200_000), 0, 200_000 - PROBE_BYTES);
    }

    #[test]
    fn continuation_lines_belong_to_the_line_before() {
        let content: Vec<u8> =
            (1000..9000).flat_map(|second| format!("{second} error\n  at a\n  at b\n").into_bytes()).collect();
        check(&content, 5000, 4000 * content.len() / 8000);
    }

    #[test]
    fn reserved_space_is_not_part_of_the_log() {
        let mut content = dated(1000..2000);
        let written = content.len();
        content.resize(written + 3_000_000, 0);
        check(&content, 1500, written / 2);
        check(&content, 5000, written);
    }

    #[test]
    fn an_undated_stretch_does_not_hide_dated_lines() {
        let mut content = b"banner without a date\n".repeat(10_000);
        content.extend(dated(1000..2000));
        let offset = check_offset(&content, 1999);
        assert!(offset <= (content.len() - dated(1999..2000).len()) as u64, "started after the line");
    }

    fn check_offset(content: &[u8], target: i64) -> u64 {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        locate(&file, content.len() as u64, Timestamp::from_seconds(target), &mut stamp).offset
    }
}
