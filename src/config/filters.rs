//! Where filters come from: names come in, definitions go out. Built-in ones are part of the binary; a file of the same name replaces one.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::engine::filter::definition::{Definition, read_filter};
use crate::engine::filter::proof::prove;
use crate::engine::tree::{Complaint, Complaints, nearest};

/// The filters in the binary: name and text.
pub const BUILT_IN: &[(&str, &str)] = &[
    ("asterisk", include_str!("../../filters/asterisk.toml")),
    ("asterisk-ami", include_str!("../../filters/asterisk-ami.toml")),
    ("asterisk-iax", include_str!("../../filters/asterisk-iax.toml")),
    ("dropbear", include_str!("../../filters/dropbear.toml")),
    ("nginx-auth", include_str!("../../filters/nginx-auth.toml")),
    ("nginx-bad-request", include_str!("../../filters/nginx-bad-request.toml")),
    ("nginx-forbidden", include_str!("../../filters/nginx-forbidden.toml")),
    ("nginx-limit", include_str!("../../filters/nginx-limit.toml")),
    ("nginx-scan", include_str!("../../filters/nginx-scan.toml")),
    ("sshd", include_str!("../../filters/sshd.toml")),
];

/// Finds filters by name.
#[derive(Clone, Debug)]
pub struct FilterShelf {
    directory: PathBuf,
}

impl FilterShelf {
    /// Files in `directory` come before the built-in ones.
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self { directory: directory.into() }
    }

    /// The names of all filters there are, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = BUILT_IN.iter().map(|(name, _)| (*name).to_owned()).collect();
        if let Ok(entries) = fs::read_dir(&self.directory) {
            for entry in entries.flatten() {
                let path = entry.path();
                if path.extension().is_some_and(|ending| ending == "toml")
                    && let Some(stem) = path.file_stem().and_then(|stem| stem.to_str())
                {
                    names.push(stem.to_owned());
                }
            }
        }
        names.sort();
        names.dedup();
        names
    }

    /// The text of a filter and where it came from.
    ///
    /// # Errors
    /// One complaint: there is no such filter, or its file cannot be read.
    pub fn text(&self, name: &str) -> Result<(String, String), Complaint> {
        let complaint = |file: &str, message: String| Complaint { file: Arc::from(file), line: 0, message };
        if name.is_empty() || name.contains(['/', '\0']) || name.starts_with('.') {
            return Err(complaint("filter", format!("\"{name}\" is not a filter's name")));
        }
        let path = self.directory.join(format!("{name}.toml"));
        match fs::read(&path) {
            Ok(bytes) => match String::from_utf8(bytes) {
                Ok(text) => return Ok((path.display().to_string(), text)),
                Err(_) => {
                    return Err(complaint(&path.display().to_string(), "the filter is not text in UTF-8".to_owned()));
                }
            },
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => {
                return Err(complaint(&path.display().to_string(), format!("the filter cannot be read: {error}")));
            }
        }
        if let Some((_, text)) = BUILT_IN.iter().find(|(known, _)| *known == name) {
            return Ok((format!("(built in) {name}.toml"), (*text).to_owned()));
        }
        let names = self.names();
        let hint = match nearest(name, names.iter().map(String::as_str)) {
            Some(near) => format!("did you mean \"{near}\"?"),
            None => format!("there are {}", names.join(", ")),
        };
        Err(complaint("filter", format!("there is no filter \"{name}\"; {hint}")))
    }

    /// Reads a filter; one from a file must prove itself by its samples first.
    ///
    /// # Errors
    /// Every complaint about it.
    pub fn load(&self, name: &str) -> Result<Arc<Definition>, Complaints> {
        let (file, text) = self.text(name).map_err(|complaint| vec![complaint])?;
        let definition = read_filter(name, &file, &text)?;
        if !file.starts_with("(built in)") {
            prove(&definition)?;
        }
        Ok(definition)
    }

    /// Reads a filter file that is not on the shelf, for `banctl filter test FILE.toml`.
    ///
    /// # Errors
    /// Every complaint about it.
    pub fn load_file(path: &Path) -> Result<Arc<Definition>, Complaints> {
        let file = path.display().to_string();
        let text = fs::read_to_string(path).map_err(|error| {
            vec![Complaint { file: Arc::from(file.as_str()), line: 0, message: format!("cannot be read: {error}") }]
        })?;
        let name = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or("filter").to_owned();
        read_filter(&name, &file, &text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_built_in_filter_proves_itself() {
        for (name, text) in BUILT_IN {
            let result =
                read_filter(name, &format!("filters/{name}.toml"), text).and_then(|definition| prove(&definition));
            if let Err(complaints) = result {
                let all: String = complaints.iter().map(|complaint| format!("{complaint}\n")).collect();
                assert!(all.is_empty(), "{all}");
            }
        }
    }

    /// Lines of all samples, mangled: bytes replaced, cut, doubled, joined.
    fn mangled(seed: &mut u64, lines: &[Vec<u8>]) -> Vec<u8> {
        let mut next = |below: usize| {
            *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (*seed >> 33) as usize % below.max(1)
        };
        let mut line = lines[next(lines.len())].clone();
        for _ in 0..next(4) {
            let at = next(line.len());
            match next(5) {
                0 => line.truncate(at),
                1 => line.insert(at, b" :[]\"'\x00\xff\x1b<>,-"[next(13)]),
                2 => line[at] = next(256) as u8,
                3 => {
                    let other = &lines[next(lines.len())];
                    let from = next(other.len());
                    line.splice(at..at, other[from..].iter().copied());
                }
                _ => {
                    let end = at + next(line.len() - at);
                    let piece = line[at..end].to_vec();
                    line.extend(piece);
                }
            }
            if line.is_empty() {
                break;
            }
        }
        line.retain(|byte| *byte != b'\n');
        line
    }

    #[test]
    fn a_chunk_is_read_like_its_lines_one_by_one_whatever_they_are() {
        use crate::engine::filter::matcher::{Filter, LogMatcher};
        use crate::engine::filter::prefix::PrefixReader;
        use crate::engine::filter::stamp::StampReader;
        use crate::engine::time::Timestamp;
        let reader =
            || PrefixReader::new(StampReader::new(jiff::tz::TimeZone::UTC, Timestamp::from_seconds(1_795_176_000)));
        let mut seed = 11u64;
        let mut found = 0;
        for (name, text) in BUILT_IN {
            let definition = read_filter(name, name, text).unwrap_or_else(|_| unreachable!("proven by the other test"));
            let mode = definition.mode_names().last().unwrap_or("normal").to_owned();
            let Ok(filter) = Filter::new(&definition, &mode) else { unreachable!("proven by the other test") };
            let Ok(matcher) = LogMatcher::new(vec![Arc::new(filter)]) else { unreachable!("proven by the other test") };
            let lines: Vec<Vec<u8>> = definition
                .samples
                .iter()
                .flat_map(|sample| &sample.lines)
                .map(|line| line.clone().into_bytes())
                .collect();
            for _ in 0..60 {
                let chunk: Vec<Vec<u8>> = (0..40).map(|_| mangled(&mut seed, &lines)).collect();
                let (mut whole, mut single) = (Vec::new(), Vec::new());
                matcher.scan(&chunk.join(&b'\n'), &mut reader(), &mut whole);
                let mut one_reader = reader();
                for line in &chunk {
                    matcher.scan(line, &mut one_reader, &mut single);
                }
                let answer = |matches: &[crate::engine::filter::matcher::Match]| -> Vec<_> {
                    matches.iter().map(|found| (found.pattern, found.address, found.session, found.at)).collect()
                };
                assert_eq!(answer(&whole), answer(&single), "{name}");
                found += whole.len();
            }
        }
        assert!(found > 2000, "only {found} of the mangled lines matched");
    }

    #[test]
    fn an_unknown_filter_is_answered_with_the_nearest() {
        let shelf = FilterShelf::new("/nonexistent");
        assert!(shelf.text("shd").is_err_and(|complaint| complaint.message.contains("did you mean \"sshd\"")));
        assert!(shelf.text("../x").is_err());
    }
}
