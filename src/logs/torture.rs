//! Twenty thousand numbered lines through eight rotations of each kind: every line must arrive exactly once.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests may fail loudly")]

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::tests::{Bench, append};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Rotation {
    RenameCreate,
    Copytruncate,
    DeleteRecreate,
    RenameOver,
    SymlinkSwitch,
}

const LINES: usize = 20_000;
const ROTATIONS: usize = 8;

/// Rotates `dir/a.log`; afterwards a fresh open for appending writes to the new one.
fn rotate(kind: Rotation, dir: &Path, number: usize) {
    let path = dir.join("a.log");
    let shift = || {
        for old in (1..=ROTATIONS).rev() {
            let _ = fs::rename(dir.join(format!("a.log.{old}")), dir.join(format!("a.log.{}", old + 1)));
        }
    };
    match kind {
        Rotation::RenameCreate => {
            shift();
            fs::rename(&path, dir.join("a.log.1")).unwrap();
            File::create(&path).unwrap();
        }
        Rotation::Copytruncate => {
            shift();
            fs::copy(&path, dir.join("a.log.1")).unwrap();
            OpenOptions::new().write(true).open(&path).unwrap().set_len(0).unwrap();
        }
        Rotation::DeleteRecreate => {
            fs::remove_file(&path).unwrap();
            File::create(&path).unwrap();
        }
        Rotation::RenameOver => {
            File::create(dir.join("fresh")).unwrap();
            fs::rename(dir.join("fresh"), &path).unwrap();
        }
        Rotation::SymlinkSwitch => {
            let target = format!("app-{number}");
            File::create(dir.join(&target)).unwrap();
            let _ = fs::remove_file(dir.join("link"));
            symlink(target, dir.join("link")).unwrap();
            fs::rename(dir.join("link"), &path).unwrap();
        }
    }
}

/// A deleted file that was never opened is lost to anybody; a switched link leaves no neighbour to find.
fn needs_a_look(kind: Rotation) -> bool {
    !matches!(kind, Rotation::RenameCreate | Rotation::Copytruncate)
}

#[track_caller]
fn check_complete(what: &str, bench: &Bench) {
    let got = bench.got.get(&bench.path("a.log")).cloned().unwrap_or_default();
    let text = String::from_utf8(got).unwrap();
    let mut seen = vec![0u32; LINES];
    text.lines().for_each(|line| seen[line.strip_prefix("line ").unwrap().parse::<usize>().unwrap()] += 1);
    let (missing, double) =
        (seen.iter().filter(|count| **count == 0).count(), seen.iter().filter(|count| **count > 1).count());
    assert!(
        missing == 0 && double == 0,
        "{what}: expected {LINES}, got {}, missing {missing} (first {:?}), double {double}",
        text.lines().count(),
        seen.iter().position(|count| *count == 0)
    );
}

/// Everything in one thread: looks fall at random between batches of lines, so rotation often overtakes the reader.
#[test]
fn torture_every_line_arrives_exactly_once_though_the_reader_lags() {
    for kind in [
        Rotation::RenameCreate,
        Rotation::Copytruncate,
        Rotation::DeleteRecreate,
        Rotation::RenameOver,
        Rotation::SymlinkSwitch,
    ] {
        for seed in 1..=6u64 {
            let mut bench = Bench::new();
            let mut random = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
            let mut dice = move |sides: u64| {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                random % sides
            };
            let (dir, path) = (bench.path(""), bench.path("a.log"));
            if kind == Rotation::SymlinkSwitch {
                symlink("app-x", &path).unwrap();
            }
            bench.append("a.log", "");
            bench.watch(&["a.log"]);
            let mut late = OpenOptions::new().append(true).open(&path).unwrap();
            let mut batch = Vec::new();
            for number in 0..LINES {
                batch.extend(format!("line {number}\n").bytes());
                if number % 50 == 49 {
                    append(&path, &batch);
                    batch.clear();
                    if dice(if seed % 2 == 0 { 8 } else { 60 }) == 0 {
                        bench.turn();
                    }
                } else if number % 50 == 20 && kind != Rotation::Copytruncate && dice(4) == 0 {
                    // The writer has not reopened yet.
                    late.write_all(&batch).unwrap();
                    batch.clear();
                }
                if number % (LINES / ROTATIONS) == 1777 {
                    if needs_a_look(kind) {
                        bench.settle();
                    }
                    if kind != Rotation::Copytruncate {
                        late = OpenOptions::new().append(true).open(&path).unwrap();
                    }
                    rotate(kind, &dir, number);
                }
            }
            append(&path, &batch);
            bench.settle();
            check_complete(&format!("{kind:?}, seed {seed}"), &bench);
        }
    }
}

/// A writer in its own thread at full speed, and a reader who does only what events tell it.
#[test]
fn torture_every_line_arrives_exactly_once_by_events_alone() {
    for kind in [
        Rotation::RenameCreate,
        Rotation::Copytruncate,
        Rotation::DeleteRecreate,
        Rotation::RenameOver,
        Rotation::SymlinkSwitch,
    ] {
        let mut bench = Bench::new();
        let (dir, path) = (bench.path(""), bench.path("a.log"));
        if kind == Rotation::SymlinkSwitch {
            symlink("app-x", &path).unwrap();
        }
        bench.append("a.log", "");
        bench.watch(&["a.log"]);
        let turns = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut writer = OpenOptions::new().append(true).open(&path).unwrap();
                let mut opened = 0;
                for number in 0..LINES {
                    writer.write_all(format!("line {number}\n").as_bytes()).unwrap();
                    let phase = number % (LINES / ROTATIONS);
                    if phase == 1000 {
                        if needs_a_look(kind) {
                            // One turn may have begun before the file was there, the next did not.
                            while turns.load(Ordering::SeqCst) < opened + 2 {
                                std::thread::yield_now();
                            }
                        }
                        rotate(kind, &dir, number);
                    } else if phase == 1100 && kind != Rotation::Copytruncate {
                        writer = OpenOptions::new().append(true).open(&path).unwrap();
                        opened = turns.load(Ordering::SeqCst);
                    }
                }
            });
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
            let last = format!("line {}\n", LINES - 1);
            while std::time::Instant::now() < deadline {
                bench.wait(20);
                let turn = bench.turn();
                turns.fetch_add(usize::from(!turn.more), Ordering::SeqCst);
                let got = bench.got.get(&path).map_or(&[][..], Vec::as_slice);
                if !turn.more && got.ends_with(last.as_bytes()) {
                    break;
                }
            }
        });
        bench.settle();
        check_complete(&format!("{kind:?}"), &bench);
    }
}
