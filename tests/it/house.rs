//! A band of its own for each test: a configuration goes into a temporary directory, the real daemon starts in the network
//! namespace of the calling thread, and ends with the value.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::netns::{readable, wait_until};
use crate::nftables::elements;

/// What should happen at once is waited for so long on a busy machine.
pub const SOON: Duration = Duration::from_secs(20);

/// A directory with a configuration, logs and state, and the daemon that uses them.
///
/// `{dir}` in configurations stands for the directory.
pub struct House {
    dir: TempDir,
    daemon: Option<Running>,
    notices: UnixDatagram,
    /// Further variables of the daemon's environment.
    pub variables: Vec<(&'static str, String)>,
}

/// A program that ends with the value.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a program said and how it ended.
#[derive(Debug)]
pub struct Said {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Said {
    fn new(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Self { code: output.status.code().unwrap_or(-1), out: text(output.stdout), err: text(output.stderr) }
    }

    /// What it printed, as JSON.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|why| panic!("{why}: {self:?}"))
    }
}

impl House {
    /// A directory with this configuration; nothing runs yet.
    pub fn furnished(configuration: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("band-test-").tempdir().unwrap();
        let notices = UnixDatagram::bind(dir.path().join("notify")).unwrap();
        let house = Self { dir, daemon: None, notices, variables: Vec::new() };
        fs::create_dir(house.path("log")).unwrap();
        house.configure(configuration);
        house
    }

    /// The same, with the daemon running and ready.
    #[track_caller]
    pub fn new(configuration: &str) -> Self {
        let mut house = Self::furnished(configuration);
        house.start();
        house
    }

    /// A file in the house.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Text with `{dir}` filled in.
    pub fn fill(&self, text: &str) -> String {
        text.replace("{dir}", self.dir.path().to_str().unwrap())
    }

    /// Writes the configuration; the paths are those of the house.
    pub fn configure(&self, configuration: &str) {
        let paths = "[paths]\nstate = \"{dir}/state\"\nsocket = \"{dir}/socket\"\nfilters = \"{dir}/filters\"\n";
        fs::write(self.path("band.toml"), self.fill(&format!("{paths}{configuration}\n"))).unwrap();
    }

    /// The daemon's command line.
    pub fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_band"));
        self.dress(&mut command);
        command
    }

    /// The daemon's command line behind another program that starts it.
    pub fn command_by(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(arguments).arg(env!("CARGO_BIN_EXE_band"));
        self.dress(&mut command);
        command
    }

    /// Gives a command that runs the daemon its configuration and surroundings.
    pub fn dress(&self, command: &mut Command) {
        let err = OpenOptions::new().create(true).append(true).open(self.path("stderr")).unwrap();
        command.arg("--config").arg(self.path("band.toml"));
        command.env_remove("JOURNAL_STREAM").env_remove("WATCHDOG_USEC").env_remove("BAND_LOG");
        command.env("NOTIFY_SOCKET", self.path("notify")).envs(self.variables.iter().cloned());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(err);
    }

    /// Starts the daemon and waits until it says that it is ready.
    #[track_caller]
    pub fn start(&mut self) {
        let command = self.command();
        self.start_as(command);
    }

    /// Starts the daemon by this command and waits until it says that it is ready.
    #[track_caller]
    pub fn start_as(&mut self, mut command: Command) {
        self.daemon = Some(Running(command.spawn().expect("the daemon starts")));
        self.notice("READY=1");
    }

    /// Runs a daemon that is expected to give up by itself; its exit code and what it said.
    #[track_caller]
    pub fn start_in_vain(&self, mut command: Command) -> Said {
        let mut daemon = Running(command.stderr(Stdio::piped()).spawn().expect("the daemon starts"));
        let ended = wait_until("the daemon gives up", SOON, || daemon.0.try_wait().unwrap());
        let mut err = String::new();
        std::io::Read::read_to_string(&mut daemon.0.stderr.take().unwrap(), &mut err).unwrap();
        Said { code: ended.code().unwrap_or(-1), out: String::new(), err }
    }

    /// Waits for a notification to systemd that has this in it.
    #[track_caller]
    pub fn notice(&self, part: &str) -> String {
        let mut heard = Vec::new();
        loop {
            assert!(
                readable(&self.notices, SOON),
                "{part} was never notified, only {heard:?}; stderr: {}",
                self.stderr()
            );
            let mut buffer = [0; 1024];
            let length = self.notices.recv(&mut buffer).unwrap();
            let notice = String::from_utf8_lossy(&buffer[..length]).into_owned();
            if notice.contains(part) {
                return notice;
            }
            heard.push(notice);
        }
    }

    /// What the daemon has written to stderr so far.
    pub fn stderr(&self) -> String {
        fs::read_to_string(self.path("stderr")).unwrap_or_default()
    }

    /// Waits until stderr has this.
    #[track_caller]
    pub fn hear(&self, part: &str) {
        wait_until(&format!("{part:?} on stderr"), SOON, || self.stderr().contains(part).then_some(()));
    }

    /// Sends a signal to the daemon.
    pub fn signal(&self, signal: Signal) {
        let pid = self.daemon.as_ref().expect("the daemon runs").0.id();
        kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), signal).unwrap();
    }

    /// Waits until the daemon has ended.
    #[track_caller]
    pub fn ended(&mut self) -> ExitStatus {
        let mut daemon = self.daemon.take().expect("the daemon runs");
        wait_until("the daemon ends", SOON, || daemon.0.try_wait().unwrap())
    }

    /// Ends the daemon by a signal.
    #[track_caller]
    pub fn end(&mut self, signal: Signal) -> ExitStatus {
        self.signal(signal);
        self.ended()
    }

    /// Asks the daemon to stop, and starts it again with the same state.
    #[track_caller]
    pub fn restart(&mut self) {
        assert_eq!(self.end(Signal::TERM).code(), Some(0));
        self.start();
    }

    /// Runs `banctl`; words are split at spaces.
    #[track_caller]
    pub fn banctl(&self, words: &str) -> Said {
        let words = self.fill(words);
        self.banctl_words(words.split(' ').filter(|word| !word.is_empty()))
    }

    /// Runs `banctl` with these words.
    pub fn banctl_words<'a>(&self, words: impl IntoIterator<Item = &'a str>) -> Said {
        let mut command = Command::new(env!("CARGO_BIN_EXE_banctl"));
        command.args(words).env("BAND_SOCKET", self.path("socket")).env("TZ", "UTC").stdin(Stdio::null());
        Said::new(command.output().unwrap())
    }

    /// Runs `banctl`, which must succeed.
    #[track_caller]
    pub fn must(&self, words: &str) -> Said {
        let said = self.banctl(words);
        assert_eq!(said.code, 0, "banctl {words}: {said:?}; stderr: {}", self.stderr());
        said
    }

    /// Runs `banctl`, which must fail like this, with one sentence that has these parts.
    #[track_caller]
    pub fn refused(&self, words: &str, code: i32, parts: &[&str]) -> Said {
        let said = self.banctl(words);
        assert_eq!((said.code, said.out.as_str()), (code, ""), "banctl {words}: {said:?}");
        assert_eq!(said.err.trim_end().lines().count(), 1, "banctl {words}: {said:?}");
        for part in parts {
            assert!(said.err.contains(part), "banctl {words}: {part:?} is not in {:?}", said.err);
        }
        said
    }

    /// Everything `banctl list` lists.
    #[track_caller]
    pub fn list(&self, words: &str) -> Vec<Value> {
        self.must(&format!("list --json {words}")).json().as_array().unwrap().clone()
    }

    /// The addresses and networks `banctl list` lists, sorted.
    #[track_caller]
    pub fn banned(&self) -> Vec<String> {
        let mut names: Vec<String> =
            self.list("").iter().map(|ban| ban["address"].as_str().unwrap().to_owned()).collect();
        names.sort();
        names
    }

    /// Waits until this is listed as banned, and gives its entry.
    #[track_caller]
    pub fn wait_banned(&self, address: &str) -> Value {
        wait_until(&format!("{address} is banned; {}", self.stderr()), SOON, || {
            self.list("").into_iter().find(|ban| ban["address"] == address)
        })
    }

    /// One jail in `banctl status`.
    #[track_caller]
    pub fn jail(&self, name: &str) -> Value {
        let status = self.must("status --json").json();
        let jails = status["jails"].as_array().unwrap();
        jails.iter().find(|jail| jail["name"] == name).unwrap_or_else(|| panic!("no jail {name}")).clone()
    }

    /// Waits until a log of a jail has been read up to its end.
    #[track_caller]
    pub fn wait_read(&self, jail: &str, log: &str) {
        let path = self.path(log);
        wait_until(&format!("{log} is read"), SOON, || {
            let size = fs::metadata(&path).map(|data| data.len()).unwrap();
            let logs = self.jail(jail)["logs"].as_array().unwrap().clone();
            logs.iter().any(|log| log["path"] == path.to_str().unwrap() && log["offset"] == size).then_some(())
        });
    }

    /// Appends to a file of the house in one write, as services do.
    pub fn append(&self, name: &str, text: &str) {
        let mut file = OpenOptions::new().create(true).append(true).open(self.path(name)).unwrap();
        file.write_all(text.as_bytes()).unwrap();
    }

    /// Appends lines of so many wrong passwords from an address, now.
    pub fn fail(&self, log: &str, address: &str, times: usize) {
        self.append(log, &failures(address, times, 0));
    }
}

impl Drop for House {
    fn drop(&mut self) {
        self.daemon = None;
        if std::thread::panicking() {
            // The last words help whoever looks for the reason.
            let _ = writeln!(std::io::stderr(), "{}", self.stderr());
        }
    }
}

/// So many seconds ago.
pub fn ago(seconds: i64) -> jiff::Zoned {
    let moment = jiff::Timestamp::now() - jiff::SignedDuration::from_secs(seconds);
    moment.to_zoned(jiff::tz::TimeZone::UTC)
}

/// Lines of sshd about wrong passwords from an address, so many seconds ago.
pub fn failures(address: &str, times: usize, seconds_ago: i64) -> String {
    let stamp = ago(seconds_ago).strftime("%Y-%m-%dT%H:%M:%S.%6f+00:00").to_string();
    let line = |n| format!("{stamp} h sshd[{n}]: Failed password for root from {address} port {} ssh2\n", 40_000 + n);
    (0..times).map(line).collect()
}

/// What the kernel holds in sets of bans and of the allowlist: set and element, in the namespace of this thread.
pub fn kernel() -> Vec<(String, String)> {
    elements("band").into_iter().map(|(set, value, _)| (set, value)).collect()
}

/// Does the kernel hold this element in a set for bans?
pub fn kernel_bans(element: &str) -> bool {
    kernel().iter().any(|(set, value)| !set.starts_with("allow") && value == element)
}
