//! What survives a restart: changes of the ledger and of the allowlist come in, go to a file, and come back at start.
//!
//! The file is a log of lines, `checksum JSON`: it can be read with any editor, a line that was torn by a crash is
//! recognized and cut, and nothing that cannot be read is ever deleted: a foreign or damaged file is moved aside. At
//! start the log is written anew with only what still stands.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The log's name in the state directory.
const FILE: &str = "ledger.log";
/// The first line of every log.
const HEADER: &str = "band-ledger 1";

/// Why the state cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system refuses.
    #[error("{0}: {1}")]
    Refused(PathBuf, #[source] io::Error),
    /// Another daemon uses it.
    #[error("{0} is in use by another band; give this one a directory of its own ([paths] state)")]
    Taken(PathBuf),
}

/// One change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "lowercase")]
pub enum Record {
    /// A ban stands, from now on like this.
    Ban {
        /// The jail's name.
        jail: String,
        /// The network.
        net: String,
        /// Since when, in milliseconds since 1970.
        since: i64,
        /// Until when; forever if left out.
        until: Option<i64>,
        /// Failures that led to it.
        failures: u32,
        /// The how manieth it is.
        count: u32,
        /// Who made it.
        origin: String,
        /// Why.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        reason: String,
    },
    /// Let in by hand; failures up to then are forgiven.
    Unban {
        /// The jail's name.
        jail: String,
        /// The network.
        net: String,
        /// When, in milliseconds since 1970.
        at: i64,
    },
    /// On the allowlist by hand.
    Allow {
        /// The network.
        net: String,
        /// Until when; for good if left out.
        until: Option<i64>,
        /// Why.
        note: String,
    },
    /// Off the allowlist again.
    Disallow {
        /// The network.
        net: String,
    },
}

/// The open log.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    file: File,
    /// The last good length; what a failed write left behind is cut.
    length: u64,
    _lock: File,
}

/// What was in the log, and what is to be told about it.
#[derive(Debug, Default)]
pub struct Found {
    /// The changes, in order.
    pub records: Vec<Record>,
    /// What was not right with the file, one sentence each.
    pub remarks: Vec<String>,
}

impl Store {
    /// Opens the log in `directory`, which is made if it is not there, and reads what is in it.
    ///
    /// # Errors
    /// When the directory or file cannot be used, or another daemon uses it.
    pub fn open(directory: &Path) -> Result<(Self, Found), Error> {
        let refused = |path: &Path, error| Error::Refused(path.to_owned(), error);
        fs::create_dir_all(directory).map_err(|error| refused(directory, error))?;
        let lock_path = directory.join("lock");
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&lock_path)
            .map_err(|error| refused(&lock_path, error))?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| Error::Taken(directory.to_owned()))?;
        let path = directory.join(FILE);
        let mut found = Found::default();
        let mut torn = false;
        match fs::read(&path) {
            Ok(bytes) => {
                torn = bytes.last().is_some_and(|last| *last != b'\n');
                found.read(&bytes, &path);
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(refused(&path, error)),
        }
        let file = OpenOptions::new().create(true).append(true).open(&path).map_err(|error| refused(&path, error))?;
        let mut store = Self { path, file, length: 0, _lock: lock };
        store.length = store.file.metadata().map_err(|error| refused(&store.path, error))?.len();
        if torn {
            // What a crash cut off must not swallow the next record.
            store.write(b"").map_err(|error| refused(&store.path, error))?;
        }
        if store.length == 0 {
            store.write(HEADER.as_bytes()).map_err(|error| refused(&store.path, error))?;
        }
        Ok((store, found))
    }

    /// Writes the log anew with only these records, atomically.
    ///
    /// # Errors
    /// When the disk refuses; then the old log is still there and in use.
    pub fn compact(&mut self, records: &[Record]) -> Result<(), Error> {
        let refused = |error| Error::Refused(self.path.clone(), error);
        let temporary = self.path.with_extension("new");
        let mut text = format!("{HEADER}\n").into_bytes();
        for record in records {
            text.extend_from_slice(&line(record));
        }
        let mut file = File::create(&temporary).map_err(refused)?;
        file.write_all(&text).and_then(|()| file.sync_all()).map_err(refused)?;
        fs::rename(&temporary, &self.path).map_err(refused)?;
        if let Some(directory) = self.path.parent() {
            File::open(directory).and_then(|directory| directory.sync_all()).map_err(refused)?;
        }
        self.file = OpenOptions::new().append(true).open(&self.path).map_err(refused)?;
        self.length = text.len() as u64;
        Ok(())
    }

    /// Appends records and makes sure they are on the disk.
    ///
    /// # Errors
    /// When the disk refuses; then none of them is in the log, and they may be tried again.
    pub fn append(&mut self, records: &[Record]) -> Result<(), Error> {
        let mut text = Vec::new();
        for record in records {
            text.extend_from_slice(&line(record));
        }
        let result = self.file.write_all(&text).and_then(|()| self.file.sync_data());
        match result {
            Ok(()) => {
                self.length += text.len() as u64;
                Ok(())
            }
            Err(error) => {
                // Half a line would hide the next one; if even this fails, the checksum still does its work.
                let _ = self.file.set_len(self.length);
                Err(Error::Refused(self.path.clone(), error))
            }
        }
    }

    fn write(&mut self, text: &[u8]) -> io::Result<()> {
        self.file.write_all(text)?;
        self.file.write_all(b"\n")?;
        self.length = self.file.metadata()?.len();
        Ok(())
    }
}

impl Found {
    fn read(&mut self, bytes: &[u8], path: &Path) {
        let mut lines = bytes.split(|b| *b == b'\n');
        if bytes.is_empty() {
            return;
        }
        if lines.next() != Some(HEADER.as_bytes()) {
            self.set_aside(path, "was not written by this version of band");
            return;
        }
        let (mut damaged, mut torn) = (0usize, false);
        for text in lines {
            torn = false;
            if text.is_empty() {
                continue;
            }
            match read_line(text) {
                Some(record) => self.records.push(record),
                None => {
                    damaged += 1;
                    torn = true;
                }
            }
        }
        // The last line of a log whose writer died is no damage.
        if torn && bytes.last() != Some(&b'\n') {
            damaged -= 1;
            self.remarks.push(format!("{}: the last record was cut off by a crash and is left out", path.display()));
        }
        if damaged > 0 {
            let copy = aside(path);
            let kept = fs::copy(path, &copy).is_ok();
            let place = if kept { format!("; a copy is kept in {}", copy.display()) } else { String::new() };
            self.remarks.push(format!("{}: {damaged} records are damaged and left out{place}", path.display()));
        }
    }

    fn set_aside(&mut self, path: &Path, why: &str) {
        let copy = aside(path);
        let moved = fs::rename(path, &copy).is_ok();
        let place =
            if moved { format!("it was moved to {}", copy.display()) } else { "it could not be moved".to_owned() };
        self.remarks.push(format!("{} {why}; {place}, and band starts without it", path.display()));
    }
}

/// A name beside the file that is not taken.
fn aside(path: &Path) -> PathBuf {
    (1u32..)
        .map(|number| path.with_extension(format!("aside.{number}")))
        .find(|path| !path.exists())
        .unwrap_or_default()
}

fn line(record: &Record) -> Vec<u8> {
    // Strings and numbers always make JSON.
    let json = serde_json::to_string(record).unwrap_or_default();
    format!("{:08x} {json}\n", checksum(json.as_bytes())).into_bytes()
}

fn read_line(text: &[u8]) -> Option<Record> {
    let (sum, json) = text.split_at_checked(9)?;
    let sum = u32::from_str_radix(std::str::from_utf8(&sum[..8]).ok()?, 16).ok()?;
    if sum != checksum(json) {
        return None;
    }
    serde_json::from_slice(json).ok()
}

/// One step of the checksum for every byte.
const CRC: [u32; 256] = {
    let mut table = [0u32; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
};

/// CRC-32 (IEEE 802.3).
fn checksum(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| crc >> 8 ^ CRC[usize::from(crc as u8 ^ byte)])
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    fn record(last: u8) -> Record {
        Record::Unban { jail: "sshd".into(), net: format!("192.0.2.{last}"), at: 5 }
    }

    #[test]
    fn the_checksum_is_the_one_everybody_uses() {
        assert_eq!(checksum(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn what_was_written_comes_back_and_a_torn_or_damaged_line_costs_only_itself() {
        let directory = tempfile::tempdir().unwrap();
        let (mut store, found) = Store::open(directory.path()).unwrap();
        assert!(found.records.is_empty() && found.remarks.is_empty());
        store.append(&[record(1), record(2), record(3)]).unwrap();
        assert!(matches!(Store::open(directory.path()), Err(Error::Taken(_))));
        drop(store);
        let path = directory.path().join(FILE);
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replace("192.0.2.2", "192.0.2.9")).unwrap();
        let (store, found) = Store::open(directory.path()).unwrap();
        assert_eq!(found.records, [record(1), record(3)]);
        assert!(found.remarks[0].contains("1 records are damaged"), "{:?}", found.remarks);
        drop(store);
        fs::write(&path, &text.as_bytes()[..text.len() - 4]).unwrap();
        let (mut store, found) = Store::open(directory.path()).unwrap();
        assert_eq!(found.records, [record(1), record(2)]);
        assert!(found.remarks[0].contains("cut off"), "{:?}", found.remarks);
        store.compact(&found.records).unwrap();
        store.append(&[record(4)]).unwrap();
        drop(store);
        let (_store, found) = Store::open(directory.path()).unwrap();
        assert_eq!(found.records, [record(1), record(2), record(4)]);
        assert!(found.remarks.is_empty(), "{:?}", found.remarks);
    }

    #[test]
    fn a_foreign_file_is_moved_aside_and_never_deleted() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join(FILE), "band-ledger 99\nprecious\n").unwrap();
        let (_store, found) = Store::open(directory.path()).unwrap();
        assert!(found.records.is_empty() && found.remarks[0].contains("not written by this version"));
        let kept = fs::read_to_string(directory.path().join("ledger.aside.1")).unwrap();
        assert!(kept.contains("precious"));
    }
}
