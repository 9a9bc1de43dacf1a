//! Paths and globs: a pattern comes in, the paths that match it go out, and every directory on the way is shown to a
//! visitor *before* it is looked into, so that what appears behind our back raises an event. It opens no file.

use std::ffi::{OsStr, OsString};
use std::path::{Component, Path, PathBuf};

use glob::MatchOptions;
use rustix::fs::FileType;

use super::siblings::kind_of;

/// The kernel's own limit of links in one path (`MAXSYMLINKS`, path_resolution(7)).
const LINKS_MAX: usize = 40;

/// As a shell does: a star does not match a leading dot.
const OPTIONS: MatchOptions =
    MatchOptions { case_sensitive: true, require_literal_separator: true, require_literal_leading_dot: true };

/// Which names of a watched directory matter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Interest {
    /// None: only whether the directory itself is moved or deleted.
    Itself,
    /// This one.
    Name(OsString),
    /// Those that match.
    Any(glob::Pattern),
}

impl Interest {
    pub(super) fn covers(&self, name: &OsStr) -> bool {
        match self {
            Self::Itself => false,
            Self::Name(wanted) => wanted == name,
            Self::Any(pattern) => matches(pattern, name),
        }
    }
}

/// Names that are not UTF-8 match no wildcard.
fn matches(pattern: &glob::Pattern, name: &OsStr) -> bool {
    name.to_str().is_some_and(|name| pattern.matches_with(name, OPTIONS))
}

#[derive(Clone, Debug)]
enum Part {
    Name(OsString),
    Any(glob::Pattern),
}

/// A path whose components may be wildcards.
#[derive(Clone, Debug)]
pub(super) struct Pattern {
    parts: Vec<Part>,
    /// Some component is a wildcard.
    pub(super) wild: bool,
}

impl Pattern {
    /// Takes a pattern apart; the error is one sentence without the pattern.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        if !text.starts_with('/') {
            return Err("is not an absolute path; write it from / on".to_owned());
        }
        let mut parts = Vec::new();
        for part in text.split('/').filter(|part| !part.is_empty() && *part != ".") {
            if part == ".." {
                return Err("contains \"..\"; write the path without it".to_owned());
            }
            if part == "**" {
                return Err("contains \"**\", which is not supported; name each directory level with \"*\"".to_owned());
            }
            if part.contains(['*', '?', '[']) {
                let pattern =
                    glob::Pattern::new(part).map_err(|error| format!("is not a pattern: \"{part}\": {}", error.msg))?;
                parts.push(Part::Any(pattern));
            } else {
                parts.push(Part::Name(part.into()));
            }
        }
        if parts.is_empty() {
            return Err("is the root directory, not a log".to_owned());
        }
        let wild = parts.iter().any(|part| matches!(part, Part::Any(_)));
        Ok(Self { parts, wild })
    }

    /// Whether a path, existing or not, is one this pattern means.
    pub(super) fn covers(&self, path: &Path) -> bool {
        let mut names = path.components().filter_map(|component| match component {
            Component::Normal(name) => Some(name),
            _ => None,
        });
        self.parts.iter().all(|part| match (part, names.next()) {
            (Part::Name(wanted), Some(name)) => wanted == name,
            (Part::Any(pattern), Some(name)) => matches(pattern, name),
            (_, None) => false,
        }) && names.next().is_none()
    }

    /// The paths that match now, sorted; a pattern without wildcards always gives its one path, existing or not.
    pub(super) fn walk(&self, visit: &mut dyn FnMut(&Path, Interest)) -> Vec<PathBuf> {
        let mut walk = Walk { visit, wild: self.wild, links: 0, found: Vec::new() };
        if !self.wild {
            walk.found.push(self.parts.iter().fold(PathBuf::from("/"), |path, part| match part {
                Part::Name(name) => path.join(name),
                Part::Any(_) => path,
            }));
        }
        walk.step(Path::new("/"), Path::new("/"), &self.parts);
        walk.found.sort();
        walk.found
    }
}

struct Walk<'a> {
    visit: &'a mut dyn FnMut(&Path, Interest),
    wild: bool,
    links: usize,
    found: Vec<PathBuf>,
}

impl Walk<'_> {
    /// Goes on from a directory: `shown` is its name as asked for, `real` the same without links.
    fn step(&mut self, shown: &Path, real: &Path, parts: &[Part]) {
        let Some((part, rest)) = parts.split_first() else { return };
        match part {
            Part::Name(name) => {
                if rest.is_empty() {
                    (self.visit)(real, Interest::Name(name.clone()));
                }
                self.pursue(shown, real, name, rest);
            }
            Part::Any(pattern) => {
                (self.visit)(real, Interest::Any(pattern.clone()));
                // A directory that cannot be listed gives no names; its mode is watched when a log is amiss.
                for entry in std::fs::read_dir(real).into_iter().flatten().flatten() {
                    if matches(pattern, &entry.file_name()) {
                        self.pursue(shown, real, &entry.file_name(), rest);
                    }
                }
            }
        }
    }

    fn pursue(&mut self, shown: &Path, real: &Path, name: &OsStr, rest: &[Part]) {
        self.links = 0;
        let Some((target, kind)) = self.enter(real, name) else { return };
        if !rest.is_empty() {
            if kind == FileType::Directory {
                self.step(&shown.join(name), &target, rest);
            }
        } else if self.wild && kind == FileType::RegularFile {
            // A glob means logs: directories and sockets that happen to match are no complaint.
            self.found.push(shown.join(name));
        }
    }

    /// Where `name` in the link-free directory `dir` leads, following links; `None` when it leads nowhere (yet). The
    /// directory of every link and of the first missing name is watched for that name.
    fn enter(&mut self, dir: &Path, name: &OsStr) -> Option<(PathBuf, FileType)> {
        let path = dir.join(name);
        let kind = match kind_of(&path) {
            Some(kind) => kind,
            None => {
                // Watch first, then look again: it may have been made in between (`mkdir -p`).
                (self.visit)(dir, Interest::Name(name.to_owned()));
                kind_of(&path)?
            }
        };
        if kind == FileType::Directory {
            (self.visit)(&path, Interest::Itself);
        }
        if kind != FileType::Symlink {
            return Some((path, kind));
        }
        (self.visit)(dir, Interest::Name(name.to_owned()));
        self.links += 1;
        if self.links > LINKS_MAX {
            return None;
        }
        let target = std::fs::read_link(&path).ok()?;
        let mut at = (dir.to_owned(), FileType::Directory);
        let mut components = target.components();
        while let Some(component) = components.next() {
            match component {
                Component::RootDir => at = (PathBuf::from("/"), FileType::Directory),
                Component::ParentDir => {
                    // Right without asking the kernel, because `at` contains no links.
                    at.0.pop();
                }
                Component::Normal(name) => {
                    // The last name may be the log itself: what replaces it appears in this directory.
                    if components.as_path().as_os_str().is_empty() {
                        (self.visit)(&at.0, Interest::Name(name.to_owned()));
                    }
                    at = self.enter(&at.0, name)?;
                }
                Component::CurDir | Component::Prefix(_) => {}
            }
        }
        Some(at)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests may fail loudly")]
    use super::*;

    #[track_caller]
    fn check(pattern: &str, path: &str, expect: bool) {
        assert_eq!(Pattern::parse(pattern).unwrap().covers(Path::new(path)), expect, "{pattern} {path}");
    }

    #[test]
    fn patterns_match_component_by_component() {
        check("/var/log/auth.log", "/var/log/auth.log", true);
        check("/var//log/./auth.log", "/var/log/auth.log", true);
        check("/var/log/*/secure", "/var/log/a/secure", true);
        check("/var/log/*/secure", "/var/log/a/b/secure", false);
        check("/var/log/x*.log", "/var/log/x1.log", true);
        check("/var/log/*.log", "/var/log/.hidden.log", false);
        check("/var/log/x?.log", "/var/log/x.log", false);
        check("/var/log/*", "/var/log", false);
    }

    #[test]
    fn patterns_that_cannot_be_watched_are_refused_with_a_sentence() {
        for (pattern, part) in [
            ("auth.log", "absolute"),
            ("", "absolute"),
            ("/", "root"),
            ("/a/../b", ".."),
            ("/a/**/b", "**"),
            ("/a/[b", "pattern"),
        ] {
            let sentence = Pattern::parse(pattern).map(|_| ()).unwrap_err();
            assert!(sentence.contains(part), "{pattern}: {sentence}");
        }
    }
}
