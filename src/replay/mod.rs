//! What the engine would have done with these logs: files come in, events go out; nothing is touched.
//!
//! The files' own time is the time. Several files are merged by the moment of their lines. Matching runs on all cores,
//! chunk by chunk; counting is done by one, in order, so the answer never depends on the number of cores.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use jiff::tz::TimeZone;

use crate::engine::allowlist::Allowlist;
use crate::engine::core::{Engine, Failure, Fate, Passed, Reading, Route};
use crate::engine::effect::{Effect, JailId};
use crate::engine::filter::matcher::{Filter, LogMatcher, Match, Scanned};
use crate::engine::filter::prefix::PrefixReader;
use crate::engine::filter::stamp::StampReader;
use crate::engine::jail::Policy;
use crate::engine::time::Timestamp;

/// Bytes read at once; whole lines are cut off it.
const CHUNK_BYTES: usize = 512 * 1024;
/// A line longer than this is matched in pieces of it (the tailer cuts at the same length).
const LINE_BYTES_MAX: usize = 64 * 1024;
/// Chunks in flight per worker.
const IN_FLIGHT: usize = 4;

/// A jail that takes part.
#[derive(Clone, Debug)]
pub struct ReplayJail {
    /// Its name.
    pub name: String,
    /// Its filter.
    pub filter: Arc<Filter>,
    /// When it bans.
    pub policy: Policy,
    /// The zone of stamps without one.
    pub timezone: TimeZone,
}

/// One file and the jails that look at it, as indices into the list of jails.
#[derive(Clone, Debug)]
pub struct ReplayFile {
    /// Its path; `-` = standard input.
    pub path: PathBuf,
    /// Who looks at it.
    pub jails: Vec<usize>,
}

/// Everything a replay needs.
#[derive(Debug)]
pub struct Replay {
    /// The jails.
    pub jails: Vec<ReplayJail>,
    /// The files.
    pub files: Vec<ReplayFile>,
    /// Never banned.
    pub allow: Allowlist,
    /// Addresses remembered at most.
    pub tracked_max: usize,
    /// "Now" for stamps without a year.
    pub now: Timestamp,
    /// Worker threads; 0 = as many as there are cores.
    pub workers: usize,
}

/// What happened, in order.
#[derive(Debug)]
pub enum Event<'a> {
    /// A failure counted.
    Failure {
        /// The failure.
        failure: &'a Failure,
        /// Its jail's name.
        jail: &'a str,
        /// The user it was tried with, if the line names one.
        user: Option<String>,
        /// Where its line stands, if one line made it.
        place: Option<(&'a Path, u64)>,
    },
    /// A ban, an extension or an end.
    Effect {
        /// What.
        effect: &'a Effect,
        /// Its jail's name.
        jail: &'a str,
    },
}

/// The sum of it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Summary {
    /// Lines read.
    pub lines: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Failures counted.
    pub failures: u64,
    /// Bans made.
    pub bans: u64,
    /// Lines that did not begin as they should, and failures without a moment.
    pub undated: u64,
}

/// A chunk of whole lines with what was found in it.
struct Scan {
    bytes: Vec<u8>,
    matches: Vec<Match>,
    scanned: Scanned,
}

/// A chunk to be scanned; the answer goes to the place that keeps the order.
struct Work {
    file: usize,
    bytes: Vec<u8>,
    reply: SyncSender<Scan>,
}

/// A file being replayed.
struct Source {
    path: PathBuf,
    route: Route,
    matcher: Arc<LogMatcher>,
    zone: TimeZone,
    input: Box<dyn Read + Send>,
    rest: Vec<u8>,
    pending: std::collections::VecDeque<Receiver<Scan>>,
    current: Option<Scan>,
    next: usize,
    line_base: u64,
    last: Option<Timestamp>,
    ended: bool,
}

impl Replay {
    /// Runs it; `event` is called for everything that happens if `watched`, `progress` with the bytes read so far.
    ///
    /// # Errors
    /// A file that cannot be opened or read, by name; or filters that are too large together.
    pub fn run(
        &self,
        watched: bool,
        event: &mut dyn FnMut(&Event<'_>),
        progress: &mut dyn FnMut(u64),
    ) -> Result<Summary, String> {
        let mut engine = Engine::new(self.tracked_max, self.allow.clone());
        let ids: Vec<JailId> = self
            .jails
            .iter()
            .map(|jail| engine.set_jail(&jail.name, jail.policy.clone(), jail.filter.joining))
            .collect();
        let mut sources = Vec::with_capacity(self.files.len());
        for file in &self.files {
            sources.push(self.open(file, &ids)?);
        }
        let workers = match self.workers {
            0 => thread::available_parallelism().map_or(1, usize::from),
            workers => workers,
        };
        let shared: Vec<(Arc<LogMatcher>, TimeZone)> =
            sources.iter().map(|source| (Arc::clone(&source.matcher), source.zone.clone())).collect();
        let now = self.now;
        thread::scope(|scope| {
            let (send, receive) = sync_channel::<Work>(workers * IN_FLIGHT);
            let receive = Arc::new(std::sync::Mutex::new(receive));
            for _ in 0..workers {
                let (receive, shared) = (Arc::clone(&receive), &shared);
                scope.spawn(move || work(&receive, shared, now));
            }
            let mut run = Run {
                engine,
                sources,
                send,
                depth: workers * 2,
                summary: Summary::default(),
                watched,
                spare: Vec::new(),
            };
            let result = run.all(event, progress);
            drop(run);
            result
        })
    }

    fn open(&self, file: &ReplayFile, ids: &[JailId]) -> Result<Source, String> {
        let mut filters: Vec<Arc<Filter>> = Vec::new();
        let mut route = Route::default();
        for index in &file.jails {
            let jail = &self.jails[*index];
            match filters.iter().position(|filter| Arc::ptr_eq(filter, &jail.filter)) {
                Some(known) => route.jails[known].push(ids[*index]),
                None => {
                    filters.push(Arc::clone(&jail.filter));
                    route.jails.push(vec![ids[*index]]);
                }
            }
        }
        let matcher = LogMatcher::new(filters).map_err(|why| format!("{}: {why}", file.path.display()))?;
        let input: Box<dyn Read + Send> =
            if file.path == Path::new("-") { Box::new(io::stdin()) } else { open_file(&file.path)? };
        let zone = file.jails.first().map_or(TimeZone::UTC, |index| self.jails[*index].timezone.clone());
        Ok(Source {
            path: file.path.clone(),
            route,
            matcher: Arc::new(matcher),
            zone,
            input,
            rest: Vec::new(),
            pending: std::collections::VecDeque::new(),
            current: None,
            next: 0,
            line_base: 0,
            last: None,
            ended: false,
        })
    }
}

fn open_file(path: &Path) -> Result<Box<dyn Read + Send>, String> {
    let file = File::open(path).map_err(|error| format!("{}: cannot be read: {}", path.display(), plain(&error)))?;
    let kind = file.metadata().map_err(|error| format!("{}: {error}", path.display()))?;
    if kind.is_dir() {
        return Err(format!("{}: is a directory; name the files in it", path.display()));
    }
    Ok(Box::new(file))
}

fn plain(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "it does not exist".to_owned(),
        io::ErrorKind::PermissionDenied => "this user may not read it".to_owned(),
        _ => error.to_string(),
    }
}

/// Scans chunks until there are no more.
fn work(receive: &std::sync::Mutex<Receiver<Work>>, shared: &[(Arc<LogMatcher>, TimeZone)], now: Timestamp) {
    let mut readers: Vec<PrefixReader> =
        shared.iter().map(|(_, zone)| PrefixReader::new(StampReader::new(zone.clone(), now))).collect();
    loop {
        let work = match receive.lock() {
            Ok(receive) => receive.recv(),
            Err(_) => return,
        };
        let Ok(work) = work else { return };
        let mut matches = Vec::new();
        let scanned = shared[work.file].0.scan(&work.bytes, &mut readers[work.file], &mut matches);
        // Nobody waits any more if the reader failed; then there is nothing to tell.
        let _ = work.reply.send(Scan { bytes: work.bytes, matches, scanned });
    }
}

/// The one that counts.
struct Run {
    engine: Engine,
    sources: Vec<Source>,
    send: SyncSender<Work>,
    depth: usize,
    summary: Summary,
    watched: bool,
    /// Buffers that were counted and can be read into again.
    spare: Vec<Vec<u8>>,
}

impl Run {
    fn all(&mut self, event: &mut dyn FnMut(&Event<'_>), progress: &mut dyn FnMut(u64)) -> Result<Summary, String> {
        loop {
            for number in 0..self.sources.len() {
                self.fill(number)?;
            }
            let Some(number) = self.earliest() else { break };
            self.step(number, event);
            progress(self.summary.bytes);
        }
        let last = self.sources.iter().filter_map(|source| source.last).max().unwrap_or_default();
        self.finish(last, event);
        Ok(self.summary)
    }

    /// Reads ahead, so that every worker has something to do, and makes sure there is a next match to look at.
    fn fill(&mut self, number: usize) -> Result<(), String> {
        loop {
            let source = &mut self.sources[number];
            while !source.ended && source.pending.len() < self.depth {
                let Some(bytes) = source.read_chunk(self.spare.pop().unwrap_or_default())? else { break };
                let (reply, receive) = sync_channel(1);
                source.pending.push_back(receive);
                self.send.send(Work { file: number, bytes, reply }).map_err(|_| "the workers are gone".to_owned())?;
            }
            let source = &mut self.sources[number];
            if source.current.is_some() {
                return Ok(());
            }
            let Some(receive) = source.pending.pop_front() else { return Ok(()) };
            let scan = receive.recv().map_err(|_| "a worker is gone".to_owned())?;
            self.summary.lines += scan.scanned.lines;
            self.summary.bytes += scan.bytes.len() as u64;
            self.summary.undated += scan.scanned.undated;
            if scan.matches.is_empty() {
                source.line_base += scan.scanned.lines;
                self.spare.push(scan.bytes);
                continue;
            }
            source.next = 0;
            source.current = Some(scan);
            return Ok(());
        }
    }

    /// The source whose next match is the earliest; `None` when all are done.
    fn earliest(&self) -> Option<usize> {
        let waiting = self.sources.iter().enumerate().filter(|(_, source)| source.current.is_some());
        waiting.min_by_key(|(number, source)| (source.next_moment(), *number)).map(|(number, _)| number)
    }

    /// Counts matches of one source until another one's turn comes, or its chunk is done.
    fn step(&mut self, number: usize, event: &mut dyn FnMut(&Event<'_>)) {
        let until = self
            .sources
            .iter()
            .enumerate()
            .filter(|(other, source)| *other != number && source.current.is_some())
            .map(|(_, source)| source.next_moment())
            .min();
        let source = &mut self.sources[number];
        let Some(scan) = source.current.take() else { return };
        let from = source.next;
        let mut to = scan.matches.len();
        if let Some(until) = until {
            let late = |found: &Match| found.at.is_some_and(|at| at > until);
            to = from + 1 + scan.matches[from + 1..].iter().position(late).unwrap_or(to - from - 1);
        }
        if self.watched {
            // One by one, so that bans stand where they happened between the failures.
            for found in &scan.matches[from..to] {
                self.count(number, &scan, std::slice::from_ref(found), event);
            }
        } else {
            self.count(number, &scan, &scan.matches[from..to], event);
        }
        let source = &mut self.sources[number];
        if to < scan.matches.len() {
            source.next = to;
            source.current = Some(scan);
        } else {
            source.line_base += scan.scanned.lines;
            self.spare.push(scan.bytes);
        }
    }

    fn count(&mut self, number: usize, scan: &Scan, matches: &[Match], event: &mut dyn FnMut(&Event<'_>)) {
        let Self { engine, sources, summary, watched, .. } = self;
        let source = &mut sources[number];
        let matcher = Arc::clone(&source.matcher);
        let mut failures: Vec<Failure> = Vec::new();
        let Passed { undated, .. } = engine.handle_matches(
            Timestamp(0),
            Reading::Replay,
            &matcher,
            &source.route,
            matches,
            &mut source.last,
            &mut |failure| {
                if failure.fate != Fate::Allowed {
                    summary.failures += 1;
                }
                if *watched {
                    failures.push(*failure);
                }
            },
        );
        summary.undated += undated;
        let mut effects = Vec::new();
        while let Some(effect) = engine.poll_effect() {
            summary.bans += u64::from(matches!(effect, Effect::Ban(_)));
            if *watched {
                effects.push(effect);
            }
        }
        if !*watched {
            return;
        }
        // What ended before this moment comes first, then the failures, then the bans they led to.
        for effect in effects.iter().filter(|effect| matches!(effect, Effect::Unban { .. })) {
            event(&Event::Effect { effect, jail: engine.name(jail_of(effect)) });
        }
        for failure in &failures {
            let place =
                failure.found.map(|found| (source.path.as_path(), source.line_base + u64::from(found.number) + 1));
            let user = failure.found.and_then(|found| user_of(&matcher, scan, &found, &source.zone));
            event(&Event::Failure { failure, jail: engine.name(failure.jail), user, place });
        }
        for effect in effects.iter().filter(|effect| !matches!(effect, Effect::Unban { .. })) {
            event(&Event::Effect { effect, jail: engine.name(jail_of(effect)) });
        }
    }

    /// Sessions that never ended count now; bans stand as they do at the end of the logs.
    fn finish(&mut self, last: Timestamp, event: &mut dyn FnMut(&Event<'_>)) {
        let Self { engine, summary, watched, .. } = self;
        let mut failures: Vec<Failure> = Vec::new();
        let forced = last + crate::engine::time::SPAN_MAX;
        engine.close_sessions(forced, last, &mut |failure| {
            summary.failures += u64::from(failure.fate != Fate::Allowed);
            failures.push(*failure);
        });
        for failure in failures.iter().filter(|_| *watched) {
            event(&Event::Failure { failure, jail: engine.name(failure.jail), user: None, place: None });
        }
        while let Some(effect) = engine.poll_effect() {
            summary.bans += u64::from(matches!(effect, Effect::Ban(_)));
            if *watched {
                event(&Event::Effect { effect: &effect, jail: engine.name(jail_of(&effect)) });
            }
        }
    }
}

fn jail_of(effect: &Effect) -> JailId {
    match effect {
        Effect::Ban(ban) | Effect::Extend(ban) | Effect::Unban { ban, .. } => ban.jail,
    }
}

fn user_of(matcher: &LogMatcher, scan: &Scan, found: &Match, zone: &TimeZone) -> Option<String> {
    let line = scan.bytes.get(found.line.0 as usize..found.line.1 as usize)?;
    let mut reader = PrefixReader::new(StampReader::new(zone.clone(), found.at.unwrap_or_default()));
    let captures = matcher.captures(line, found, &mut reader);
    captures.into_iter().find(|(name, _)| name == "user").map(|(_, user)| user)
}

impl Source {
    /// The moment of the next match; what has none comes at once.
    fn next_moment(&self) -> Timestamp {
        let found = self.current.as_ref().and_then(|scan| scan.matches.get(self.next));
        found.and_then(|found| found.at).or(self.last).unwrap_or(Timestamp(i64::MIN))
    }

    /// The next chunk of whole lines, in a buffer that was used before; the last one may end without a newline.
    fn read_chunk(&mut self, mut chunk: Vec<u8>) -> Result<Option<Vec<u8>>, String> {
        chunk.clear();
        chunk.extend_from_slice(&self.rest);
        self.rest.clear();
        chunk.reserve(CHUNK_BYTES + LINE_BYTES_MAX);
        loop {
            let have = chunk.len();
            let wanted = CHUNK_BYTES.saturating_sub(have).max(LINE_BYTES_MAX) as u64;
            let read = self.input.by_ref().take(wanted).read_to_end(&mut chunk);
            let read = read.map_err(|error| format!("{}: cannot be read: {}", self.path.display(), plain(&error)))?;
            if read == 0 {
                self.ended = true;
                return Ok((!chunk.is_empty()).then_some(chunk));
            }
            if let Some(newline) = memchr::memrchr(b'\n', &chunk[have..]) {
                self.rest.extend_from_slice(&chunk[have + newline + 1..]);
                chunk.truncate(have + newline + 1);
                return Ok(Some(chunk));
            }
            if chunk.len() >= CHUNK_BYTES {
                // One line without an end fills the chunk; it is cut so that memory stays bounded.
                return Ok(Some(chunk));
            }
        }
    }
}
