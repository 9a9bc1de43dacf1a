//! Configuration: files come in, options for every room go out, or every complaint at once.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::engine::filter::matcher::Filter;
use crate::engine::tree::{Complaint, Complaints, Node, parse};

pub mod filters;
pub mod ports;
pub mod schema;

use filters::FilterShelf;
use schema::{Config, JailConfig, RECIDIVE};

/// Where the configuration is, if nobody says otherwise.
pub const DEFAULT_FILE: &str = "/etc/band/band.toml";

/// A configuration whose filters are compiled: everything the daemon or a replay needs.
#[derive(Debug)]
pub struct Loaded {
    /// What the files say.
    pub config: Config,
    /// The compiled filter of each jail that is switched on and reads lines.
    pub jails: Vec<(JailConfig, Arc<Filter>)>,
}

/// Reads `file` and then `band.d/*.toml` beside it.
///
/// # Errors
/// Every complaint: about TOML, keys, values and filters.
pub fn load(file: &Path) -> Result<Loaded, Complaints> {
    let mut complaints = Vec::new();
    let mut root: Option<Node> = None;
    for path in files(file) {
        match read(&path) {
            Ok(node) => match &mut root {
                Some(root) => root.merge(node),
                None => root = Some(node),
            },
            Err(complaint) => complaints.push(complaint),
        }
    }
    let Some(root) = root else { return Err(complaints) };
    finish(&root, complaints)
}

/// Reads a configuration from text, for tests and for what nobody has written down.
///
/// # Errors
/// Every complaint.
pub fn load_text(name: &str, text: &str) -> Result<Loaded, Complaints> {
    let root = parse(name, text).map_err(|complaint| vec![complaint])?;
    finish(&root, Vec::new())
}

fn finish(root: &Node, mut complaints: Complaints) -> Result<Loaded, Complaints> {
    let config = Config::read(root, &mut complaints);
    let shelf = FilterShelf::new(&config.paths.filters);
    let mut jails = Vec::new();
    let mut known: Vec<Arc<Filter>> = Vec::new();
    for jail in config.enabled() {
        if jail.name == RECIDIVE {
            continue;
        }
        match compiled(jail, &shelf, &mut known) {
            Ok(filter) => {
                if jail.logs.is_empty() && filter.definition.logs.is_empty() {
                    complaints.push(jail.node.complaint(format!(
                        "jail {} has no logs, and filter {} names none; add logs = [\"/var/log/…\"]",
                        jail.name, jail.filter
                    )));
                }
                jails.push((jail.clone(), filter));
            }
            Err(mut wrong) => {
                for complaint in &mut wrong {
                    if complaint.line == 0 {
                        *complaint = jail.node.complaint(format!("jail {}: {}", jail.name, complaint.message));
                    }
                }
                complaints.append(&mut wrong);
            }
        }
    }
    complaints.sort();
    complaints.dedup();
    if complaints.is_empty() { Ok(Loaded { config, jails }) } else { Err(complaints) }
}

/// One compiled filter serves every jail that wants the same.
fn compiled(jail: &JailConfig, shelf: &FilterShelf, known: &mut Vec<Arc<Filter>>) -> Result<Arc<Filter>, Complaints> {
    if let Some(filter) = known.iter().find(|filter| filter.name == jail.filter && filter.mode == jail.mode) {
        return Ok(Arc::clone(filter));
    }
    let definition = shelf.load(&jail.filter)?;
    let filter = Arc::new(Filter::new(&definition, &jail.mode)?);
    known.push(Arc::clone(&filter));
    Ok(filter)
}

/// The configuration's files in the order they count.
pub fn files(file: &Path) -> Vec<PathBuf> {
    let mut files = vec![file.to_owned()];
    let directory = file.parent().unwrap_or(Path::new("/")).join("band.d");
    if let Ok(entries) = fs::read_dir(directory) {
        let mut more: Vec<PathBuf> = entries
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|ending| ending == "toml"))
            .collect();
        more.sort();
        files.extend(more);
    }
    files
}

fn read(path: &Path) -> Result<Node, Complaint> {
    let name = path.display().to_string();
    let complaint = |message: String| Complaint { file: Arc::from(name.as_str()), line: 0, message };
    let bytes = fs::read(path).map_err(|error| {
        complaint(match error.kind() {
            std::io::ErrorKind::NotFound => "does not exist; write it, or name another one with --config".to_owned(),
            std::io::ErrorKind::PermissionDenied => "may not be read by this user".to_owned(),
            std::io::ErrorKind::IsADirectory => "is a directory; name the file in it".to_owned(),
            _ => format!("cannot be read: {error}"),
        })
    })?;
    let text = String::from_utf8(bytes).map_err(|_| complaint("is not text in UTF-8".to_owned()))?;
    parse(&name, &text)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    #[track_caller]
    fn complains(text: &str, expect: &[&str]) {
        let complaints = load_text("band.toml", text).map(|_| ()).unwrap_err();
        let all: Vec<String> = complaints.iter().map(ToString::to_string).collect();
        for part in expect {
            assert!(all.iter().any(|line| line.contains(part)), "{part:?} is not in {all:#?}");
        }
        assert_eq!(all.len(), expect.len(), "{all:#?}");
    }

    #[test]
    fn an_empty_configuration_is_one_with_all_defaults() {
        let loaded = load_text("band.toml", "").unwrap();
        assert_eq!(loaded.config.defaults, crate::engine::jail::Policy::default());
        assert!(loaded.jails.is_empty() && loaded.config.jails.len() == schema::BUILT_IN_JAILS.len());
        assert_eq!(loaded.config.paths.socket, Path::new("/run/band/band.sock"));
    }

    #[test]
    fn every_complaint_comes_at_once_with_its_line_and_what_would_be_right() {
        complains(
            "[defaults]\nmaxrety = 3\nfindtime = \"ten\"\n[allow]\nnetworks = [\"10.0.0.0/33\", \"1.2.3.4:5060\", \"10.0.0.1/8\"]\n\
             [jails.sshd]\nports = [\"shh\", \"99999/tcp\"]\naction = \"dropp\"\ntimezone = \"Mars/Base\"\nlogs = [\"auth.log\"]\n\
             [jails.mine]\nfilter = \"sssh\"\n[jails.other]\nmaxretry = 3\n[jails.\"a b\"]\nfilter = \"sshd\"\nfilter_mode = 1\n[webb]\n",
            &[
                "band.toml:2: unknown key \"maxrety\" in [defaults]; did you mean \"maxretry\"?",
                "band.toml:3: findtime: \"ten\" is not a duration",
                "band.toml:5: \"10.0.0.0/33\" has no valid prefix length",
                "band.toml:5: \"1.2.3.4:5060\" has a port",
                "band.toml:5: \"10.0.0.1/8\" has bits set behind its prefix; did you mean 10.0.0.0/8?",
                "band.toml:7: \"shh\" is neither a service nor ports",
                "band.toml:7: \"99999/tcp\" has a port that is no number",
                "band.toml:8: action \"dropp\" is not known",
                "band.toml:9: time zone \"Mars/Base\" is not known",
                "band.toml:10: log \"auth.log\" must be a whole path",
                "band.toml:11: jail mine: there is no filter \"sssh\"; did you mean \"sshd\"?",
                "band.toml:13: jail other needs a filter",
                "jail other: there is no filter \"other\"",
                "band.toml:15: jail name \"a b\" must be letters",
                "band.toml:17: unknown key \"filter_mode\" in [jails.a b]",
                "band.toml:18: unknown key \"webb\"; did you mean \"web\"?",
            ],
        );
        complains("[jails.sshd]\n[jails.sshd]\n", &["duplicate"]);
        complains(
            "[jails.sshd]\nfilter = { name = \"sshd\", mode = \"brutal\" }\n",
            &["has no mode \"brutal\"; there are normal, ddos"],
        );
    }

    #[test]
    fn jails_inherit_presets_and_override() {
        let loaded = load_text(
            "band.toml",
            "[defaults]\npreset = \"paranoid\"\nbantime = \"forever\"\n[jails.sshd]\nmaxretry = 9\n[jails.asterisk]\nenabled = false\n",
        )
        .unwrap();
        let jail = &loaded.jails[0].0;
        assert_eq!((jail.policy.maxretry, jail.policy.findtime.seconds(), jail.policy.bantime), (9, 86_400, None));
        assert_eq!(loaded.jails.len(), 1);
    }
}
