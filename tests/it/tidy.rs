//! The house rules: every file of the project comes in, a list of offences with file and line goes out.
//!
//! A rule is a function over files, so that it is tried twice: on an offence made up for it, and on the project.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Which room may import which: `crate::ROOM` inside `src/ROOM`. A new room needs a row; nobody may import `daemon`.
const IMPORTS: &[(&str, &[&str])] = &[
    ("engine", &[]),
    ("logs", &["engine"]),
    ("enforce", &["engine"]),
    ("store", &["engine"]),
    ("control", &["engine"]),
    ("config", &["engine"]),
    ("replay", &["engine"]),
    ("cli", &["config", "control", "engine", "replay"]),
    ("daemon", &["cli", "config", "control", "enforce", "engine", "logs", "replay", "store"]),
];

/// What a room that is pure has no words for: files, sockets, processes, threads, the clock, the surroundings.
const IMPURE: &[&str] = &[
    "std::fs",
    "std::net::TcpStream",
    "std::net::TcpListener",
    "std::net::UdpSocket",
    "std::process",
    "std::thread",
    "std::env",
    "Instant::now",
    "SystemTime::now",
    "Timestamp::now",
    "Zoned::now",
];
const PURE_ROOMS: &[&str] = &["engine"];

/// Longer files are two files.
const LINES_MAX: usize = 700;

/// Words that say that something is not done; written in two parts, so that this file has none of them.
const UNDONE: &[&str] =
    &[concat!("FIX", "ME"), concat!("XX", "X"), concat!("todo", "!("), concat!("unimplemented", "!(")];
const SKIPPED: &str = concat!("#[", "ignore");
const SLEEPS: &[&str] = &[concat!("thread::", "sleep"), concat!("time::", "sleep")];

/// How paths of somebody's machine begin.
const MACHINES: &[&str] = &[concat!("/ho", "me/"), concat!("/ro", "ot/"), concat!("/wo", "rk/")];

/// Licences whose code may be part of a program under MIT or Apache-2.0.
const LICENCES: &[&str] = &[
    "MIT",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "0BSD",
    "ISC",
    "Zlib",
    "Unicode-3.0",
    "Unicode-DFS-2016",
    "CC0-1.0",
    "Unlicense",
    "MPL-2.0",
];

/// A text file of the project.
struct File {
    /// From the project's root on, with `/`.
    path: String,
    text: String,
}

impl File {
    fn new(path: &str, text: &str) -> Self {
        Self { path: path.to_owned(), text: text.to_owned() }
    }

    /// The room a source file is in.
    fn room(&self) -> Option<&str> {
        self.path.strip_prefix("src/")?.split_once('/').map(|(room, _)| room).filter(|room| *room != "bin")
    }

    fn is_rust(&self) -> bool {
        Path::new(&self.path).extension().is_some_and(|ending| ending == "rs")
    }

    fn is_source(&self) -> bool {
        self.is_rust() && self.path.starts_with("src/")
    }

    /// Lines with their numbers, without those that are comments only.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        let lines = self.text.lines().enumerate().map(|(index, line)| (index + 1, line));
        lines.filter(|(_, line)| !line.trim_start().starts_with("//"))
    }

    /// The same without what is compiled for tests only. Relies on rustfmt: an item ends where its indentation returns.
    fn shipped_code(&self) -> Vec<(usize, &str)> {
        let mut kept = Vec::new();
        let mut test: Option<(&str, bool)> = None;
        for (number, line) in self.code() {
            let indentation = &line[..line.len() - line.trim_start().len()];
            test = match test {
                None if line.trim() == "#[cfg(test)]" => Some((indentation, false)),
                None => {
                    kept.push((number, line));
                    None
                }
                Some((outer, true)) => (line.trim_end() != format!("{outer}}}")).then_some((outer, true)),
                Some((outer, false)) if line.trim_start().starts_with("#[") => Some((outer, false)),
                Some((outer, false)) => line.trim_end().ends_with('{').then_some((outer, true)),
            };
        }
        kept
    }

    fn offence(&self, line: usize, what: impl std::fmt::Display) -> String {
        format!("{}:{line}: {what}", self.path)
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every text file that git knows or would add; without git, every file that was not built.
fn project() -> Vec<File> {
    let listed = Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output();
    let mut paths: Vec<PathBuf> = match listed {
        Ok(output) if output.status.success() && !output.stdout.is_empty() => {
            let names = String::from_utf8(output.stdout).unwrap();
            names.split_terminator('\0').map(PathBuf::from).collect()
        }
        _ => walk(),
    };
    paths.sort();
    let read = |path: PathBuf| {
        let text = std::fs::read_to_string(root().join(&path)).ok()?;
        Some(File { path: path.to_str()?.replace('\\', "/"), text })
    };
    let files: Vec<File> = paths.into_iter().filter_map(read).collect();
    assert!(files.iter().any(|file| file.path == "src/lib.rs"), "the project's files are found");
    files
}

fn walk() -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![PathBuf::new()];
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(root().join(&directory)).unwrap().flatten() {
            let path = directory.join(entry.file_name());
            let kind = entry.file_type().unwrap();
            if kind.is_dir() && !["target", "dist", ".git"].iter().any(|built| path == Path::new(built)) {
                open.push(path);
            } else if kind.is_file() {
                found.push(path);
            }
        }
    }
    found
}

#[track_caller]
fn holds(rule: &str, offences: &[String]) {
    assert!(offences.is_empty(), "{rule}:\n  {}\n", offences.join("\n  "));
}

/// A rule finds what was made up for it, and nothing in what is right.
#[track_caller]
fn finds(rule: impl Fn(&[File]) -> Vec<String>, files: &[(&str, &str)], expect: &[&str]) {
    let files: Vec<File> = files.iter().map(|(path, text)| File::new(path, text)).collect();
    let offences = rule(&files);
    let fits = offences.len() == expect.len() && offences.iter().zip(expect).all(|(is, start)| is.starts_with(start));
    assert!(fits, "{offences:#?} instead of {expect:#?}");
}

/// The names that a line imports from the crate's root: of `crate::a::B` and of `crate::{a::B, c}`.
fn imported(line: &str) -> Vec<&str> {
    let name = |text: &str| text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    let mut names = Vec::new();
    for rest in line.split("crate::").skip(1) {
        let Some(group) = rest.strip_prefix('{') else {
            names.push(&rest[..name(rest)]);
            continue;
        };
        let mut depth = 0_usize;
        for part in group.split_inclusive([',', '{', '}']) {
            let part_name = part.trim_start();
            if depth == 0 {
                names.push(&part_name[..name(part_name)]);
            }
            match part.as_bytes().last() {
                Some(b'{') => depth += 1,
                Some(b'}') if depth == 0 => break,
                Some(b'}') => depth -= 1,
                _ => {}
            }
        }
    }
    names.retain(|name| !name.is_empty());
    names
}

fn imports(files: &[File]) -> Vec<String> {
    let mut offences = Vec::new();
    for file in files.iter().filter(|file| file.is_source()) {
        let Some(room) = file.room() else { continue };
        let Some((_, allowed)) = IMPORTS.iter().find(|(name, _)| *name == room) else {
            offences.push(file.offence(1, format_args!("room {room} has no row in the table of imports")));
            continue;
        };
        for (number, line) in file.code() {
            for name in imported(line) {
                let is_room = IMPORTS.iter().any(|(room, _)| *room == name);
                if is_room && name != room && !allowed.contains(&name) {
                    offences.push(file.offence(number, format_args!("{room} may not import {name}")));
                }
            }
        }
        let inside = file.path.split('/').count() - 2;
        let depth = inside - usize::from(file.path.ends_with("/mod.rs"));
        let beyond = "super::".repeat(depth + 1);
        for (number, line) in file.shipped_code() {
            if line.contains(&beyond) {
                offences.push(file.offence(number, "leaves its room by super::; write crate:: so that it is seen"));
            }
        }
    }
    offences
}

#[test]
fn rooms_import_only_what_the_table_allows() {
    let bad = [
        ("src/engine/a.rs", "use crate::logs::Tailer;\n// crate::daemon in a comment\nfn f() { crate::engine::x() }\n"),
        ("src/cli/a.rs", "use crate::{config::{load, enforce}, daemon, control};\nuse crate::OK;\n"),
        ("src/logs/mod.rs", "use super::enforce;\n#[cfg(test)]\nmod tests {\n    use super::*;\n}\n"),
        ("src/logs/a/b.rs", "use super::super::Log;\nuse super::super::super::enforce;\n"),
        ("src/attic/mod.rs", ""),
        ("src/bin/band.rs", "use band::daemon;\n"),
    ];
    let expect = [
        "src/engine/a.rs:1: engine may not import logs",
        "src/cli/a.rs:1: cli may not import daemon",
        "src/logs/mod.rs:1: leaves its room",
        "src/logs/a/b.rs:2: leaves its room",
        "src/attic/mod.rs:1: room attic has no row",
    ];
    finds(imports, &bad, &expect);
    holds("a room imports what it may not", &imports(&project()));
}

#[test]
fn the_programs_are_thin_and_nobody_else_imports_the_daemon() {
    let rule = |files: &[File]| {
        let rows = IMPORTS.iter().filter(|(_, allowed)| allowed.contains(&"daemon"));
        let mut offences: Vec<String> = rows.map(|(room, _)| format!("{room} may import daemon")).collect();
        let programs = files.iter().filter(|file| file.path.starts_with("src/bin/"));
        offences
            .extend(programs.filter(|file| file.text.lines().count() > 15).map(|file| file.offence(16, "too long")));
        offences
    };
    finds(rule, &[("src/bin/band.rs", &"fn f() {}\n".repeat(16))], &["src/bin/band.rs:16: too long"]);
    holds("programs hold ten lines; the work is in the library", &rule(&project()));
}

fn purity(files: &[File]) -> Vec<String> {
    let pure = files.iter().filter(|file| file.room().is_some_and(|room| PURE_ROOMS.contains(&room)));
    pure.flat_map(|file| {
        let lines = file.shipped_code().into_iter();
        lines.flat_map(move |(number, line)| {
            let words = IMPURE.iter().filter(move |word| line.contains(*word));
            words.map(move |word| file.offence(number, word))
        })
    })
    .collect()
}

#[test]
fn the_engine_touches_no_file_no_clock_no_thread() {
    let bad = [
        ("src/engine/a.rs", "use std::fs;\n#[cfg(test)]\nmod tests {\n    use std::env;\n}\nlet x = Instant::now();\n"),
        ("src/engine/b.rs", "// std::process\n#[cfg(test)]\nuse std::thread;\nuse std::thread;\n"),
        ("src/logs/a.rs", "use std::fs;\n"),
    ];
    let expect = ["src/engine/a.rs:1: std::fs", "src/engine/a.rs:6: Instant::now", "src/engine/b.rs:4: std::thread"];
    finds(purity, &bad, &expect);
    holds("the engine is pure: every moment is an argument", &purity(&project()));
}

fn shape(files: &[File]) -> Vec<String> {
    let mut offences = Vec::new();
    for file in files.iter().filter(|file| file.is_source()) {
        if !file.text.starts_with("//!") {
            offences.push(file.offence(1, "does not start with //!: what comes in, what goes out"));
        }
        let lines = file.text.lines().count();
        if lines > LINES_MAX {
            offences.push(file.offence(LINES_MAX + 1, format_args!("{lines} lines; at most {LINES_MAX}")));
        }
    }
    offences
}

#[test]
fn every_source_says_what_it_is_for_and_fits_in_a_head() {
    let long = format!("//! Long.\n{}", "fn f() {}\n".repeat(LINES_MAX));
    let bad = [("src/engine/a.rs", "use x;\n"), ("src/b.rs", long.as_str()), ("tests/it/c.rs", "use x;\n")];
    finds(shape, &bad, &["src/engine/a.rs:1: does not start", "src/b.rs:701: 701 lines"]);
    holds("sources start with //! and are short", &shape(&project()));
}

fn loose_ends(files: &[File]) -> Vec<String> {
    let mut offences = Vec::new();
    for file in files.iter().filter(|file| file.is_rust()) {
        let is_test = file.path.starts_with("tests/");
        for (number, line) in file.text.lines().enumerate() {
            let mut check = |words: &[&str]| {
                let found = words.iter().filter(|word| line.contains(**word));
                offences.extend(found.map(|word| file.offence(number + 1, word)));
            };
            check(UNDONE);
            check(&[SKIPPED]);
            if is_test {
                check(SLEEPS);
            }
        }
    }
    offences
}

#[test]
fn nothing_is_left_undone_skipped_or_slept_over() {
    let undone = format!("// {}: later\nlet x = {});\n", UNDONE[0], UNDONE[3]);
    let slept = format!("{}]\n    std::{}(d);\n", SKIPPED, SLEEPS[0]);
    let bad = [("src/a.rs", undone.as_str()), ("tests/b.rs", &slept), ("x.md", &undone)];
    let expect = [
        &format!("src/a.rs:1: {}", UNDONE[0]),
        &format!("src/a.rs:2: {}", UNDONE[3]),
        &format!("tests/b.rs:1: {SKIPPED}"),
        &format!("tests/b.rs:2: {}", SLEEPS[0]),
    ];
    finds(loose_ends, &bad, &expect.map(String::as_str));
    holds("loose ends", &loose_ends(&project()));
}

/// The lines of README between the heading about architecture and the next heading of its level.
fn architecture(readme: &str) -> Option<String> {
    let mut lines = readme.lines().skip_while(|line| !(line.starts_with('#') && line.contains("rchitecture")));
    let heading = lines.next()?;
    let level = heading.bytes().take_while(|byte| *byte == b'#').count();
    let ends = |line: &&str| {
        let hashes = line.bytes().take_while(|byte| *byte == b'#').count();
        hashes > 0 && hashes <= level && line[hashes..].starts_with(' ')
    };
    Some(lines.take_while(|line| !ends(line)).collect::<Vec<_>>().join("\n"))
}

fn documented_rooms(files: &[File]) -> Vec<String> {
    let rooms: BTreeSet<&str> = files.iter().filter_map(File::room).collect();
    let Some(readme) = files.iter().find(|file| file.path == "README.md") else {
        return vec!["README.md:1: is not there".to_owned()];
    };
    let Some(section) = architecture(&readme.text) else {
        return vec![readme.offence(1, "has no section \"Architecture\"")];
    };
    let words: BTreeSet<&str> = section.split(|c: char| !c.is_alphanumeric() && c != '_').collect();
    let missing = rooms.into_iter().filter(|room| !words.contains(room));
    missing.map(|room| readme.offence(1, format_args!("the architecture section does not name src/{room}/"))).collect()
}

#[test]
fn the_readme_names_every_room() {
    let rooms = [("src/engine/a.rs", ""), ("src/logs/a.rs", ""), ("src/bin/band.rs", "")];
    let with = |readme: &'static str| [&rooms[..], &[("README.md", readme)]].concat();
    finds(documented_rooms, &rooms, &["README.md:1: is not there"]);
    finds(documented_rooms, &with("# band\n"), &["README.md:1: has no section"]);
    let text = "# band\n## Architecture\n`engine/` thinks\n### More\n## Use\nlogs\n";
    finds(documented_rooms, &with(text), &["README.md:1: the architecture section does not name src/logs/"]);
    holds("README.md and src/ disagree", &documented_rooms(&project()));
}

#[test]
fn every_filter_file_is_built_in() {
    let built_in = band::config::filters::BUILT_IN;
    let rule = |files: &[File]| {
        let names = files.iter().filter_map(|file| {
            let name = file.path.strip_prefix("filters/")?.strip_suffix(".toml")?;
            Some((file, name))
        });
        let missing = names.filter(|(file, name)| !built_in.contains(&(*name, file.text.as_str())));
        missing.map(|(file, _)| file.offence(1, "is not in config::filters::BUILT_IN")).collect()
    };
    finds(rule, &[("filters/telnet.toml", "")], &["filters/telnet.toml:1: is not in"]);
    holds("filters that nobody can use", &rule(&project()));
}

fn machines(files: &[File]) -> Vec<String> {
    let mut offences = Vec::new();
    for file in files.iter().filter(|file| file.path != "Cargo.lock") {
        for (number, line) in file.text.lines().enumerate() {
            let found = MACHINES.iter().filter(|path| line.contains(**path));
            offences.extend(found.map(|path| file.offence(number + 1, format_args!("{path}..."))));
        }
    }
    offences
}

#[test]
fn no_path_of_a_developers_machine_is_written_down() {
    let line = format!("a\nsee {}me/notes\n", MACHINES[0]);
    finds(machines, &[("x.md", &line), ("Cargo.lock", &line)], &[&format!("x.md:2: {}", MACHINES[0])]);
    holds("paths of somebody's machine", &machines(&project()));
}

type Words<'a> = std::iter::Peekable<std::str::SplitWhitespace<'a>>;

/// True if an SPDX expression leaves a choice that asks for nothing but licences of the list.
fn is_free(expression: &str) -> bool {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let mut words = spaced.split_whitespace().peekable();
    either(&mut words) == Some(true) && words.next().is_none()
}

/// `None` when it is no expression.
fn either(words: &mut Words<'_>) -> Option<bool> {
    let mut free = both(words)?;
    while words.next_if_eq(&"OR").is_some() {
        free |= both(words)?;
    }
    Some(free)
}

fn both(words: &mut Words<'_>) -> Option<bool> {
    let mut free = one(words)?;
    while words.next_if_eq(&"AND").is_some() {
        free &= one(words)?;
    }
    Some(free)
}

fn one(words: &mut Words<'_>) -> Option<bool> {
    if words.next_if_eq(&"(").is_some() {
        let free = either(words)?;
        return words.next_if_eq(&")").map(|_| free);
    }
    let free = LICENCES.contains(&words.next()?);
    // An exception only gives more freedom.
    if words.next_if_eq(&"WITH").is_some() {
        words.next()?;
    }
    Some(free)
}

fn licences(metadata: &Value) -> Vec<String> {
    let packages = metadata["packages"].as_array().expect("packages");
    let unfree = packages.iter().filter(|package| !package["license"].as_str().is_some_and(is_free));
    unfree
        .map(|package| format!("Cargo.lock:1: {} {}: {}", package["name"], package["version"], package["license"]))
        .collect()
}

/// What cargo knows about the packages this machine builds; those of other systems need not have been fetched.
fn metadata() -> Value {
    let said = |program: &str, arguments: &[&str]| {
        let output = Command::new(program).args(arguments).current_dir(root()).output().expect("cargo runs");
        assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    };
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let version = said(&cargo, &["-vV"]);
    let host = version.lines().find_map(|line| line.strip_prefix("host: ")).expect("cargo -vV names the host");
    let words = ["metadata", "--offline", "--locked", "--format-version", "1", "--filter-platform", host];
    serde_json::from_str(&said(&cargo, &words)).expect("JSON")
}

#[test]
fn every_dependency_may_be_part_of_a_program_under_mit_or_apache() {
    for free in [
        "MIT",
        "MIT OR Apache-2.0",
        "Unlicense/MIT",
        "(MIT OR GPL-2.0) AND Unicode-3.0",
        "Apache-2.0 WITH LLVM-exception",
        "GPL-3.0-only OR ISC",
    ] {
        assert!(is_free(free), "{free}");
    }
    for unfree in [
        "",
        "GPL-3.0-only",
        "MIT AND GPL-2.0",
        "LGPL-2.1",
        "MIT OR",
        "(MIT",
        "MIT Apache-2.0",
        "GPL-3.0 OR (MIT AND AGPL-3.0)",
    ] {
        assert!(!is_free(unfree), "{unfree}");
    }
    let bad = serde_json::json!({"packages": [{"name": "a", "version": "1.0.0", "license": null}]});
    assert_eq!(licences(&bad), ["Cargo.lock:1: \"a\" \"1.0.0\": null"]);
    let metadata = metadata();
    assert!(metadata["packages"].as_array().is_some_and(|packages| packages.len() > 10), "there are dependencies");
    holds("licences that do not fit", &licences(&metadata));
}
