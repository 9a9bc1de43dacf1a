//! The whole room against real files: temporary directories, real events, no sleeps.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests may fail loudly")]

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use tempfile::TempDir;

use super::watch::Watcher;
use super::*;

/// A tailer, what it gave, and a directory to play in.
pub(super) struct Bench {
    dir: TempDir,
    tailer: Tailer,
    now: Timestamp,
    pub(super) got: BTreeMap<PathBuf, Vec<u8>>,
    /// Log, offset, live, lines cut and length of each chunk.
    chunks: Vec<(LogId, u64, bool, u32, usize)>,
}

const NOW: Timestamp = Timestamp::from_seconds(1_000_000);

impl Bench {
    pub(super) fn new() -> Self {
        Self::with(Tailer::new().unwrap())
    }

    fn with(tailer: Tailer) -> Self {
        let dir = TempDir::new().unwrap();
        Self { dir, tailer, now: NOW, got: BTreeMap::new(), chunks: Vec::new() }
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().canonicalize().unwrap().join(name)
    }

    pub(super) fn watch(&mut self, names: &[&str]) -> Vec<Complaint> {
        let request = |name: &&str| Request {
            pattern: self.path(name).to_str().unwrap().to_owned(),
            since: Span::from_seconds(600),
        };
        let requests: Vec<Request> = names.iter().map(request).collect();
        self.tailer.watch(&requests)
    }

    pub(super) fn turn(&mut self) -> Turn {
        let names: BTreeMap<LogId, PathBuf> = self.tailer.logs().into_iter().map(|log| (log.id, log.path)).collect();
        let (got, chunks) = (&mut self.got, &mut self.chunks);
        self.tailer.turn(self.now, &mut |_, line| stamp(line), &mut |chunk| {
            assert!(chunk.bytes.ends_with(b"\n") && chunk.bytes.len() <= CHUNK_BYTES + 1);
            let path = names.get(&chunk.log).expect("lines of a log that was not announced");
            got.entry(path.clone()).or_default().extend_from_slice(chunk.bytes);
            chunks.push((chunk.log, chunk.offset, chunk.live, chunk.cut_lines, chunk.bytes.len()));
        })
    }

    /// Turns until there is nothing to do at once.
    pub(super) fn settle(&mut self) {
        for _ in 0..10_000 {
            if !self.turn().more {
                return;
            }
        }
        panic!("the tailer never comes to rest: {:?}", self.tailer.logs());
    }

    /// Waits for an event; false if none comes.
    pub(super) fn wait(&self, milliseconds: i64) -> bool {
        let timeout = Timespec { tv_sec: milliseconds / 1000, tv_nsec: (milliseconds % 1000) * 1_000_000 };
        poll(&mut [PollFd::new(&self.tailer.fd(), PollFlags::IN)], Some(&timeout)).unwrap() > 0
    }

    /// What a log gave since it was last asked, after waiting for an event.
    #[track_caller]
    fn expect(&mut self, name: &str, expect: &str) {
        let path = self.path(name);
        loop {
            self.settle();
            if self.got.get(&path).map_or(0, Vec::len) >= expect.len() || !self.wait(2000) {
                break;
            }
        }
        self.expect_now(name, expect);
    }

    #[track_caller]
    fn expect_now(&mut self, name: &str, expect: &str) {
        self.settle();
        let got = self.got.remove(&self.path(name)).unwrap_or_default();
        assert_eq!(String::from_utf8_lossy(&got), expect, "{name}");
    }

    fn info(&self, name: &str) -> LogInfo {
        let path = self.path(name);
        self.tailer.logs().into_iter().find(|log| log.path == path).expect(name)
    }

    pub(super) fn append(&self, name: &str, text: impl AsRef<[u8]>) {
        append(&self.path(name), text.as_ref());
    }
}

pub(super) fn append(path: &Path, bytes: &[u8]) {
    OpenOptions::new().create(true).append(true).open(path).unwrap().write_all(bytes).unwrap();
}

/// A line's moment is its leading number, in seconds.
fn stamp(line: &[u8]) -> Option<Timestamp> {
    let digits = line.iter().take_while(|byte| byte.is_ascii_digit()).count();
    Some(Timestamp::from_seconds(std::str::from_utf8(&line[..digits]).ok()?.parse().ok()?))
}

#[test]
fn a_file_seen_first_starts_where_its_lines_are_as_old_as_asked() {
    let mut bench = Bench::new();
    let lines: Vec<String> = (990_000..1_000_000).map(|second| format!("{second} line\n")).collect();
    bench.append("a.log", lines.concat());
    bench.append("undated.log", "one\ntwo\n");
    assert_eq!(bench.watch(&["a.log", "undated.log"]), []);
    // 600 s asked for, 60 s margin, and the line of that very second.
    bench.expect("a.log", &lines[10_000 - 660..].concat());
    bench.expect_now("undated.log", "");
    assert!(bench.chunks.iter().all(|chunk| !chunk.2), "backlog passed as live");
    bench.append("a.log", "1000001 new\n");
    bench.append("undated.log", "three\n");
    bench.expect("a.log", "1000001 new\n");
    bench.expect("undated.log", "three\n");
    assert!(bench.chunks.iter().rev().take(2).all(|chunk| chunk.2), "live lines passed as backlog");
    assert_eq!(bench.info("a.log").state, State::CaughtUp);
}

#[test]
fn backlog_and_live_lines_are_told_apart_within_one_read() {
    let mut bench = Bench::new();
    bench.append("a.log", "999999 a\n999999 b");
    bench.watch(&["a.log"]);
    bench.expect("a.log", "999999 a\n");
    bench.append("a.log", " end\n999999 c\n");
    bench.expect("a.log", "999999 b end\n999999 c\n");
    let seen: Vec<_> = bench.chunks.iter().map(|chunk| (chunk.1, chunk.2)).collect();
    assert_eq!(seen, [(0, false), (9, false), (22, true)]);
}

#[test]
fn a_file_that_appears_later_is_read_from_its_first_byte() {
    let mut bench = Bench::new();
    assert_eq!(bench.watch(&["a.log"]), []);
    bench.settle();
    assert_eq!(bench.info("a.log").state, State::Waiting);
    bench.append("a.log", "100 long ago\nundated\n");
    bench.expect("a.log", "100 long ago\nundated\n");
    assert!(bench.chunks[0].2);
}

#[test]
fn an_unfinished_line_waits_for_its_newline() {
    let mut bench = Bench::new();
    bench.watch(&["a.log"]);
    bench.append("a.log", "half ");
    assert!(bench.wait(2000));
    bench.expect_now("a.log", "");
    bench.append("a.log", "whole\r\nnext ha");
    bench.expect("a.log", "half whole\r\n");
    // Its file is rotated away and falls silent: now it is a line.
    fs::rename(bench.path("a.log"), bench.path("a.log.1")).unwrap();
    bench.append("a.log", "new\n");
    bench.expect("a.log", "new\n");
    assert_eq!(bench.tailer.poll_timeout(), Some(NOW + Span::from_seconds(600)));
    bench.now = NOW + Span::from_seconds(600);
    bench.expect_now("a.log", "next ha\n");
    assert_eq!(bench.tailer.poll_timeout(), None);
}

#[test]
fn long_lines_are_cut_once_and_counted() {
    let mut bench = Bench::new();
    bench.watch(&["a.log"]);
    let (fits, long) = ("f".repeat(LINE_BYTES_MAX), "x".repeat(3 * LINE_BYTES_MAX));
    bench.append("a.log", format!("a\n{fits}\n{long}\nb\n"));
    bench.expect("a.log", &format!("a\n{fits}\n{}\nb\n", "x".repeat(LINE_BYTES_MAX)));
    // Longer than the buffer, and written in pieces.
    for _ in 0..9 {
        bench.append("a.log", "y".repeat(LINE_BYTES_MAX));
        bench.settle();
    }
    bench.append("a.log", "\nc\n");
    bench.expect("a.log", &format!("{}\nc\n", "y".repeat(LINE_BYTES_MAX)));
    assert_eq!(bench.info("a.log").lines_cut, 2);
    assert_eq!(bench.chunks.iter().map(|chunk| chunk.3).sum::<u32>(), 2);
}

#[test]
fn nuls_at_the_end_are_not_there_yet_and_nuls_before_a_line_are_skipped() {
    let mut bench = Bench::new();
    bench.watch(&["a.log"]);
    let file = File::create(bench.path("a.log")).unwrap();
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 1 << 20).unwrap();
    file.write_all_at(b"one\n", 0).unwrap();
    bench.expect("a.log", "one\n");
    file.write_all_at(b"two\n", 4).unwrap();
    bench.expect("a.log", "two\n");
    assert_eq!(bench.info("a.log").offset, 8);
    // Zeros in the middle, as a power cut leaves them: small, and larger than the buffer.
    bench.watch(&["a.log", "b.log"]);
    for gap in [1000, 700_000] {
        bench.append("b.log", "before\n");
        bench.append("b.log", vec![0; gap]);
        bench.append("b.log", "after\n");
    }
    bench.expect("b.log", "before\nafter\nbefore\nafter\n");
    let sparse = File::create(bench.path("c.log")).unwrap();
    sparse.write_all_at(b"far\n", 50 << 20).unwrap();
    bench.append("c.log", vec![0; 600_000]);
    bench.append("c.log", "end\n");
    fs::rename(bench.path("c.log"), bench.path("b.log")).unwrap();
    bench.expect("b.log", "far\nend\n");
}

#[test]
fn lines_still_written_to_a_renamed_file_are_read() {
    let mut bench = Bench::new();
    bench.watch(&["a.log"]);
    let mut writer = OpenOptions::new().create(true).append(true).open(bench.path("a.log")).unwrap();
    writer.write_all(b"1\n").unwrap();
    bench.expect("a.log", "1\n");
    fs::rename(bench.path("a.log"), bench.path("a.log.1")).unwrap();
    writer.write_all(b"2\n").unwrap();
    bench.expect("a.log", "2\n");
    assert_eq!(bench.info("a.log").state, State::Waiting);
    bench.append("a.log", "3\n");
    bench.expect("a.log", "3\n");
    fs::remove_file(bench.path("a.log.1")).unwrap();
    writer.write_all(b"4\n").unwrap();
    bench.expect("a.log", "4\n");
    assert_eq!(bench.info("a.log").rotations, 1);
    // Back under its old name: where it was left, not from the start.
    let mut second = OpenOptions::new().append(true).open(bench.path("a.log")).unwrap();
    fs::rename(bench.path("a.log"), bench.path("x")).unwrap();
    bench.settle();
    fs::rename(bench.path("x"), bench.path("a.log")).unwrap();
    second.write_all(b"5\n").unwrap();
    bench.expect("a.log", "5\n");
}

#[test]
fn a_truncated_file_is_read_again_even_if_it_is_longer_than_before() {
    let mut bench = Bench::new();
    bench.watch(&["a.log"]);
    bench.append("a.log", "one\ntwo\n");
    bench.expect("a.log", "one\ntwo\n");
    fs::write(bench.path("a.log"), "short\n").unwrap();
    bench.expect("a.log", "short\n");
    fs::write(bench.path("a.log"), "much longer than it was before\nend\n").unwrap();
    bench.expect("a.log", "much longer than it was before\nend\n");
    // A writer without O_APPEND goes on at his old offset.
    let writer = OpenOptions::new().write(true).open(bench.path("a.log")).unwrap();
    writer.set_len(0).unwrap();
    writer.write_all_at(b"behind a hole\n", 35).unwrap();
    bench.expect("a.log", "behind a hole\n");
    assert_eq!(bench.info("a.log").rotations, 3);
}

#[test]
fn what_was_not_read_before_a_copytruncate_is_read_from_the_copy() {
    let mut bench = Bench::new();
    bench.watch(&["a.log"]);
    bench.append("a.log", "1\n");
    bench.expect("a.log", "1\n");
    bench.append("a.log", "2\n");
    fs::copy(bench.path("a.log"), bench.path("a.log.1")).unwrap();
    fs::write(bench.path("a.log"), "3\n").unwrap();
    fs::rename(bench.path("a.log.1"), bench.path("a.log.2")).unwrap();
    fs::copy(bench.path("a.log"), bench.path("a.log.1")).unwrap();
    fs::write(bench.path("a.log"), "4\n").unwrap();
    bench.expect("a.log", "2\n3\n4\n");
}

#[test]
fn a_copy_made_before_the_first_look_is_read_before_the_log() {
    let mut bench = Bench::new();
    bench.append("a.log", "");
    bench.watch(&["a.log"]);
    bench.settle();
    bench.append("a.log", "1\n");
    fs::copy(bench.path("a.log"), bench.path("a.log.1")).unwrap();
    fs::write(bench.path("a.log"), "2\n").unwrap();
    bench.expect("a.log", "1\n2\n");
}

#[test]
fn a_copy_that_was_cut_short_or_is_being_made_is_not_read_twice() {
    let mut bench = Bench::new();
    bench.watch(&["a.log"]);
    bench.append("a.log", "1\n2\n3\n");
    bench.expect("a.log", "1\n2\n3\n");
    fs::write(bench.path("a.log.1"), "1\n2\n").unwrap();
    fs::write(bench.path("a.log"), "4\n").unwrap();
    bench.expect("a.log", "4\n");
    // A fresh file, and its copy is there before its first line was read.
    fs::rename(bench.path("a.log"), bench.path("a.log.2")).unwrap();
    bench.append("a.log", "");
    bench.settle();
    bench.append("a.log", "5\n6\n");
    fs::write(bench.path("a.log.3"), "5\n").unwrap();
    bench.expect("a.log", "5\n6\n");
    bench.append("a.log.3", "6\n");
    fs::write(bench.path("a.log"), "7\n").unwrap();
    bench.expect("a.log", "7\n");
}

#[test]
fn generations_that_came_and_went_between_two_looks_are_read() {
    let mut bench = Bench::new();
    bench.append("a.log.7", "rotated before our time\n");
    bench.append("a.log", "0\n");
    bench.watch(&["a.log"]);
    bench.settle();
    for number in 1..=3 {
        for old in (1..7).rev() {
            let _ = fs::rename(bench.path(&format!("a.log.{old}")), bench.path(&format!("a.log.{}", old + 1)));
        }
        fs::rename(bench.path("a.log"), bench.path("a.log.1")).unwrap();
        bench.append("a.log", format!("{number}\n"));
        bench.append("a.log_ssl", "another log\n");
        bench.append("a.log.1.gz", "packed\n");
    }
    bench.expect("a.log", "1\n2\n3\n");
    assert_eq!(bench.info("a.log").rotations, 3);
}

#[test]
fn old_generations_are_few() {
    let mut bench = Bench::new();
    bench.watch(&["a.log"]);
    for number in 0..30 {
        bench.append("a.log", format!("{number}\n"));
        bench.expect("a.log", &format!("{number}\n"));
        fs::remove_file(bench.path("a.log")).unwrap();
        bench.settle();
    }
    let open = fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
        .filter(|target| target.starts_with(bench.path("")))
        .count();
    assert_eq!(open, 8);
    bench.now = NOW + Span::from_seconds(601);
    bench.settle();
    assert_eq!(bench.tailer.poll_timeout(), None);
}

#[test]
fn a_path_that_does_not_exist_is_awaited_from_its_nearest_directory() {
    let mut bench = Bench::new();
    bench.watch(&["x/y/z/a.log"]);
    bench.settle();
    // Step by step, then all at once.
    fs::create_dir(bench.path("x")).unwrap();
    assert!(bench.wait(2000));
    bench.settle();
    fs::create_dir_all(bench.path("x/y/z")).unwrap();
    bench.append("x/y/z/a.log", "1\n");
    bench.expect("x/y/z/a.log", "1\n");
    // The whole tree is moved away and made anew.
    fs::rename(bench.path("x"), bench.path("w")).unwrap();
    bench.append("w/y/z/a.log", "2\n");
    bench.expect("x/y/z/a.log", "2\n");
    fs::create_dir_all(bench.path("x/y/z")).unwrap();
    bench.append("x/y/z/a.log", "3\n");
    bench.expect("x/y/z/a.log", "3\n");
    fs::remove_dir_all(bench.path("x")).unwrap();
    assert!(bench.wait(2000));
    bench.settle();
    fs::create_dir_all(bench.path("x/y/z")).unwrap();
    bench.append("x/y/z/a.log", "4\n");
    bench.expect("x/y/z/a.log", "4\n");
}

#[test]
fn a_glob_picks_up_files_and_directories_that_appear() {
    let mut bench = Bench::new();
    fs::create_dir(bench.path("one")).unwrap();
    bench.append("one/secure", "999999 there\n");
    bench.watch(&["*/secure", "x*.log"]);
    bench.expect("one/secure", "999999 there\n");
    fs::create_dir(bench.path("two")).unwrap();
    bench.append("two/secure", "100 new\n");
    bench.expect("two/secure", "100 new\n");
    fs::create_dir(bench.path("three")).unwrap();
    assert!(bench.wait(2000));
    bench.settle();
    bench.append("three/other", "no\n");
    bench.append("three/secure", "yes\n");
    bench.expect("three/secure", "yes\n");
    bench.append("x1.log", "x1\n");
    fs::create_dir(bench.path("x2.log")).unwrap();
    bench.expect("x1.log", "x1\n");
    let paths: Vec<PathBuf> = bench.tailer.logs().into_iter().map(|log| log.path).collect();
    assert_eq!(paths, ["one/secure", "two/secure", "three/secure", "x1.log"].map(|name| bench.path(name)));
    assert_eq!(bench.info("x1.log").requests, [1]);
    // A name that is gone for good is forgotten.
    fs::remove_file(bench.path("x1.log")).unwrap();
    bench.settle();
    bench.now = NOW + Span::from_seconds(601);
    bench.settle();
    assert_eq!(bench.tailer.logs().len(), 3);
}

#[test]
fn a_glob_that_matches_rotated_names_reads_each_line_once() {
    let mut bench = Bench::new();
    bench.watch(&["a.log*"]);
    let mut all = String::new();
    for number in 0..5 {
        bench.append("a.log", format!("{number}\n"));
        all += &format!("{number}\n");
        if number % 2 == 0 {
            assert!(bench.wait(2000));
            bench.settle();
        }
        for old in (1..7).rev() {
            let _ = fs::rename(bench.path(&format!("a.log.{old}")), bench.path(&format!("a.log.{}", old + 1)));
        }
        fs::rename(bench.path("a.log"), bench.path("a.log.1")).unwrap();
        bench.settle();
    }
    let mut got: Vec<String> = std::mem::take(&mut bench.got)
        .into_values()
        .flat_map(|bytes| String::from_utf8(bytes).unwrap().lines().map(|line| format!("{line}\n")).collect::<Vec<_>>())
        .collect();
    got.sort();
    assert_eq!(got.concat(), all);
}

#[test]
fn links_are_followed_and_read_once_with_their_target() {
    let mut bench = Bench::new();
    fs::create_dir(bench.path("d")).unwrap();
    bench.append("d/1.log", "");
    symlink("d/1.log", bench.path("link.log")).unwrap();
    bench.watch(&["link.log"]);
    bench.append("d/1.log", "1\n");
    bench.expect("link.log", "1\n");
    // Rotated where it really lies.
    fs::rename(bench.path("d/1.log"), bench.path("d/1.log.1")).unwrap();
    bench.settle();
    bench.append("d/1.log", "2\n");
    bench.expect("link.log", "2\n");
    // Twice, unseen.
    for text in ["2a\n", "2b\n"] {
        let _ = fs::rename(bench.path("d/1.log.1"), bench.path("d/1.log.2"));
        fs::rename(bench.path("d/1.log"), bench.path("d/1.log.1")).unwrap();
        bench.append("d/1.log", text);
    }
    bench.expect("link.log", "2a\n2b\n");
    // Switched.
    bench.append("d/2.log", "3\n");
    symlink("d/2.log", bench.path("new")).unwrap();
    fs::rename(bench.path("new"), bench.path("link.log")).unwrap();
    bench.append("d/1.log", "late\n");
    bench.expect("link.log", "late\n3\n");
    // A dangling link, and a directory behind a link.
    fs::remove_file(bench.path("link.log")).unwrap();
    symlink(bench.path("e/3.log"), bench.path("link.log")).unwrap();
    bench.settle();
    assert_eq!(bench.info("link.log").state, State::Waiting);
    symlink("d", bench.path("e")).unwrap();
    bench.settle();
    bench.append("d/3.log", "4\n");
    bench.expect("link.log", "4\n");
    // A directory behind a link, which is switched: nothing happens in either directory.
    bench.watch(&["e/5.log"]);
    bench.append("d/5.log", "5\n");
    bench.expect("e/5.log", "5\n");
    fs::create_dir(bench.path("f")).unwrap();
    bench.append("f/5.log", "6\n");
    symlink("f", bench.path("new")).unwrap();
    bench.settle();
    fs::rename(bench.path("new"), bench.path("e")).unwrap();
    bench.expect("e/5.log", "6\n");
    // A glob that names both link and target.
    let mut bench = Bench::new();
    bench.append("app-3.log", "");
    symlink("app-3.log", bench.path("latest.log")).unwrap();
    bench.watch(&["*.log"]);
    bench.append("app-3.log", "1\n");
    bench.expect("app-3.log", "1\n");
    bench.expect_now("latest.log", "");
    assert_eq!(bench.info("latest.log").state, State::SameAs(bench.path("app-3.log")));
}

#[test]
fn what_is_not_a_readable_file_is_complained_about_and_picked_up_when_right() {
    let mut bench = Bench::new();
    fs::create_dir(bench.path("dir.log")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        bench.path("fifo.log"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    symlink("loop.log", bench.path("loop.log")).unwrap();
    symlink("/proc/self/mem", bench.path("mem.log")).unwrap();
    let complaints = bench.watch(&["good.log", "dir.log", "fifo.log", "loop.log", "mem.log", "../x", "missing.log"]);
    let words: Vec<&str> = complaints.iter().map(|complaint| complaint.sentence.as_str()).collect();
    assert_eq!(words.len(), 4, "{words:?}");
    for word in ["..", "directory", "FIFO", "leads back"] {
        assert!(words.iter().any(|sentence| sentence.contains(word)), "{word}: {words:?}");
    }
    bench.append("good.log", "good\n");
    bench.expect("good.log", "good\n");
    assert!(matches!(bench.info("dir.log").state, State::Unreadable(_)));
    assert!(matches!(bench.info("mem.log").state, State::Unreadable(_)), "{:?}", bench.info("mem.log"));
    fs::remove_dir(bench.path("dir.log")).unwrap();
    for name in ["fifo.log", "loop.log", "mem.log"] {
        fs::remove_file(bench.path(name)).unwrap();
    }
    for name in ["dir.log", "fifo.log", "loop.log", "mem.log"] {
        bench.append(name, "1\n");
        bench.expect(name, "1\n");
        assert_eq!(bench.info(name).state, State::CaughtUp);
    }
}

#[test]
fn changed_modes_of_an_unreadable_file_are_noticed() {
    let mut bench = Bench::new();
    symlink("loop.log", bench.path("loop.log")).unwrap();
    bench.append("a.log", "");
    bench.watch(&["*.log", "loop.log"]);
    bench.settle();
    // As root nothing is unreadable by its mode: so see that the event is asked for while something is amiss.
    fs::create_dir(bench.path("other")).unwrap();
    bench.settle();
    assert!(!bench.wait(0));
    fs::set_permissions(bench.path("other"), fs::Permissions::from_mode(0o700)).unwrap();
    assert!(bench.wait(0), "no event for a changed mode");
}

#[test]
fn an_overflow_of_the_queue_loses_nothing() {
    let mut bench = Bench::new();
    bench.watch(&["a.log", "b.log", "new/*.log"]);
    bench.append("a.log", "");
    bench.append("b.log", "");
    bench.settle();
    let most: usize = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap().trim().parse().unwrap();
    let files = ["a.log", "b.log"].map(|name| OpenOptions::new().append(true).open(bench.path(name)).unwrap());
    let mut expect = String::new();
    for number in 0..most {
        for mut file in &files {
            file.write_all(format!("{number}\n").as_bytes()).unwrap();
        }
        expect += &format!("{number}\n");
    }
    fs::create_dir(bench.path("new")).unwrap();
    bench.append("new/c.log", "c\n");
    bench.expect("a.log", &expect);
    bench.expect_now("b.log", &expect);
    bench.expect("new/c.log", "c\n");
}

#[test]
fn without_watches_logs_are_polled_and_said_to_be() {
    let mut limited = Watcher::new().unwrap();
    limited.watches_max = Some(1);
    for watcher in [limited, Watcher::with(Err(Errno::MFILE)).unwrap()] {
        let mut bench = Bench::with(Tailer::with(watcher));
        bench.watch(&["a.log"]);
        bench.settle();
        bench.append("a.log", "1\n");
        assert_eq!(bench.tailer.poll_timeout(), Some(bench.now + Span::from_seconds(1)));
        bench.expect_now("a.log", "");
        for text in ["1\n", "2\n"] {
            bench.now = bench.now + Span::from_seconds(1);
            bench.expect_now("a.log", text);
            bench.append("a.log", "2\n");
        }
        assert!(matches!(bench.info("a.log").state, State::Polling(_)), "{:?}", bench.info("a.log"));
        // Enough again: the polls find that out themselves.
        bench.tailer.watcher().watches_max = None;
        bench.now = bench.now + Span::from_seconds(1);
        bench.expect_now("a.log", "2\n");
        if bench.tailer.watcher().count() > 0 {
            assert_eq!(bench.info("a.log").state, State::CaughtUp);
            assert_eq!(bench.tailer.poll_timeout(), None);
        }
    }
}

#[test]
fn a_storm_of_writes_is_one_read_and_silence_is_silent() {
    let mut bench = Bench::new();
    bench.append("a.log", "999999 x\n");
    bench.watch(&["a.log", "*.log", "absent/b.log"]);
    bench.settle();
    assert!(!bench.wait(50), "events of our own making");
    bench.chunks.clear();
    for _ in 0..1000 {
        bench.append("a.log", "line\n");
    }
    assert!(bench.wait(2000));
    bench.settle();
    assert_eq!(bench.chunks.len(), 1);
    assert!(!bench.wait(50), "events of our own making");
    assert_eq!(bench.tailer.poll_timeout(), None);
    assert_eq!(bench.turn(), Turn::default());
}

#[test]
fn one_flood_does_not_starve_the_others() {
    let mut bench = Bench::new();
    bench.watch(&["a.log", "b.log"]);
    bench.append("a.log", "flood flood flood\n".repeat(300_000));
    bench.append("b.log", "b\n");
    assert!(bench.turn().more);
    assert_eq!(bench.got[&bench.path("b.log")], b"b\n");
    assert!(bench.got[&bench.path("a.log")].len() < 2 << 20);
    assert_eq!(bench.info("a.log").state, State::Reading);
    bench.settle();
    assert_eq!(bench.got[&bench.path("a.log")].len(), 18 * 300_000);
}

#[test]
fn two_requests_for_one_file_read_it_once() {
    let mut bench = Bench::new();
    bench.watch(&["a.log", "*.log", "./a.log"]);
    bench.append("a.log", "1\n");
    bench.expect("a.log", "1\n");
    assert_eq!(bench.tailer.logs().len(), 1);
    assert_eq!(bench.info("a.log").requests, [0, 1, 2]);
}

#[test]
fn a_reload_keeps_positions_and_frees_what_is_no_longer_asked_for() {
    let mut bench = Bench::new();
    bench.append("a.log", "999999 a\n");
    bench.append("b.log", "999999 b\n");
    bench.watch(&["a.log", "b.log"]);
    bench.expect("a.log", "999999 a\n");
    bench.expect("b.log", "999999 b\n");
    let (before, watches) = (bench.info("a.log"), bench.tailer.watcher().count());
    bench.append("a.log", "meanwhile\n");
    bench.watch(&["*.txt", "a.log"]);
    bench.expect("a.log", "meanwhile\n");
    assert_eq!(bench.info("a.log").id, before.id);
    assert_eq!(bench.info("a.log").requests, [1]);
    assert_eq!(bench.tailer.watcher().count(), watches - 1);
    bench.append("b.log", "2\n");
    assert!(!bench.wait(20), "b.log is still watched");
    bench.expect_now("b.log", "");
    bench.watch(&[]);
    bench.settle();
    assert_eq!(bench.tailer.watcher().count(), 0);
    assert_eq!(bench.tailer.logs(), []);
    bench.append("c.txt", "");
    assert!(!bench.wait(20), "the directory is still watched");
    // A new number, and the start of a first sight.
    bench.watch(&["a.log"]);
    bench.expect("a.log", "999999 a\nmeanwhile\n");
    assert!(bench.info("a.log").id > before.id);
}
