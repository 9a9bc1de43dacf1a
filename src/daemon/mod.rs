//! The daemon: a configuration file comes in, a protected machine goes out. The only room that knows all the others.
//!
//! Three threads do the work: one decides (`pipeline`), one owns the kernel's sets (`enforcer`), one writes to disk
//! (`keeper`). The main thread answers signals, systemd and the control socket, and is never on the way of a ban.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};

mod answers;
mod clock;
mod enforcer;
mod evidence;
mod inbox;
mod keeper;
mod own;
mod pipeline;
mod scopes;
mod systemd;

use enforcer::{Enforcer, Shared, Task};
use inbox::{Slot, inbox};
use keeper::Keep;
use pipeline::{Order, Pipeline};

use crate::config::{DEFAULT_FILE, Loaded, load};
use crate::control::protocol::{Reply, Request};
use crate::control::server::{Answer, Asked, bind, serve};
use crate::enforce::nftables::{Kernel, Monitor};
use crate::engine::tree::Complaints;
use crate::logs::Tailer;
use crate::store::Store;

/// Not started; stderr says why.
const FAILED: u8 = 1;
/// The configuration is wrong.
const CONFIG: u8 = 78;
/// How long the deciding thread may take for a sign of life before systemd is not told that all is well.
const PING_MAX: Duration = Duration::from_secs(5);

#[derive(Parser, Debug)]
#[command(name = "band", version, about = "Watches logs and shuts out who attacks, in the kernel")]
struct Words {
    /// The configuration; `band.d/*.toml` beside it is read after it.
    #[arg(long, default_value = DEFAULT_FILE)]
    config: PathBuf,
    /// What is written to stderr: error, warn, info, debug or trace.
    #[arg(long, env = "BAND_LOG", default_value = "info")]
    log: tracing::level_filters::LevelFilter,
}

/// Why the daemon did not start, and its exit code.
struct Failure(u8, String);

/// Runs the daemon with the words of the command line.
pub fn run() -> ExitCode {
    let words = Words::parse();
    start_logging(words.log);
    match protect(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure(code, message)) => {
            for line in message.lines() {
                tracing::error!("{line}");
            }
            ExitCode::from(code)
        }
    }
}

fn start_logging(level: tracing::level_filters::LevelFilter) {
    let format = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_target(false)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none());
    // The journal stamps lines itself.
    if std::env::var_os("JOURNAL_STREAM").is_some() { format.without_time().init() } else { format.init() }
}

fn told(complaints: &Complaints) -> String {
    complaints.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

fn protect(words: &Words) -> Result<(), Failure> {
    let loaded = load(&words.config).map_err(|complaints| Failure(CONFIG, told(&complaints)))?;
    let fail = |error: &dyn std::fmt::Display| Failure(FAILED, error.to_string());
    let listener = bind(&loaded.config.paths.socket).map_err(|error| fail(&error))?;
    let socket = loaded.config.paths.socket.clone();
    let result = start(words, loaded, listener);
    // The socket is ours as long as we listen; a dead one would only puzzle.
    let _ = std::fs::remove_file(socket);
    result
}

fn start(words: &Words, loaded: Loaded, listener: std::os::unix::net::UnixListener) -> Result<(), Failure> {
    let fail = |error: &dyn std::fmt::Display| Failure(FAILED, error.to_string());
    raise_file_limit();
    let kernel = open_kernel(&loaded)?;
    let (store, records) = open_store(&loaded)?;
    let standing = Shared::default();
    let (tasks, task_inbox) = inbox::<Task>().map_err(|error| fail(&error))?;
    let (orders, order_inbox) = inbox::<Order>().map_err(|error| fail(&error))?;
    let enforcer = Enforcer::new(task_inbox, kernel, Arc::clone(&standing));
    let enforcer = named("band-enforcer", move || enforcer.run()).map_err(|error| fail(&error))?;
    let own = own::addresses().unwrap_or_else(|error| {
        tracing::warn!(%error, "this machine's own addresses are not known; loopback and [allow] still are");
        Vec::new()
    });
    let tailer = Tailer::new().map_err(|error| fail(&error))?;
    let jails: Vec<String> = loaded.config.enabled().map(|jail| jail.name.clone()).collect();
    let table = loaded.config.nftables.table.clone();
    let pipeline =
        Pipeline::new(loaded, &records, own, tailer, order_inbox, (tasks.clone(), standing), Keep::new(store));
    let pipeline = named("band-pipeline", move || pipeline.run()).map_err(|error| fail(&error))?;
    follow_own_addresses(orders.clone());
    if jails.is_empty() {
        tracing::warn!(
            "no jail is switched on, so nobody is watched; write [jails.sshd] into {}",
            words.config.display()
        );
    } else {
        tracing::info!("band {} protects this machine: {}", env!("CARGO_PKG_VERSION"), jails.join(", "));
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| fail(&error))?;
    let served = runtime.block_on(attend(words, listener, &orders, &tasks));
    systemd::notify("STOPPING=1");
    orders.put(Order::Stop);
    let _ = pipeline.join();
    tasks.put(Task::Stop);
    let _ = enforcer.join();
    tracing::info!("stopped; bans stay in the kernel (to take them out: nft delete table inet {table})");
    served
}

fn named(name: &str, work: impl FnOnce() + Send + 'static) -> std::io::Result<std::thread::JoinHandle<()>> {
    std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        // A thread that is lost takes the protection with it: better to end and be started again.
        if std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).is_err() {
            tracing::error!("a thread of band broke; ending, so that the service is started again");
            std::process::abort();
        }
    })
}

/// Many watched logs need many descriptors; what is allowed is taken.
fn raise_file_limit() {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let wanted = rustix::process::Rlimit { current: limit.maximum, maximum: limit.maximum };
    let _ = rustix::process::setrlimit(rustix::process::Resource::Nofile, wanted);
}

fn open_kernel(loaded: &Loaded) -> Result<Option<(Kernel, Option<Monitor>)>, Failure> {
    if !loaded.config.nftables.enabled {
        tracing::warn!("[enforce.nftables] is off: bans are kept and shown, but nobody is shut out");
        return Ok(None);
    }
    let kernel = Kernel::open().map_err(|error| Failure(FAILED, error.to_string()))?;
    let monitor = Monitor::open()
        .inspect_err(|error| tracing::warn!(%error, "changes of the rules by others will not be noticed"))
        .ok();
    Ok(Some((kernel, monitor)))
}

fn open_store(loaded: &Loaded) -> Result<(Option<Store>, Vec<crate::store::Record>), Failure> {
    match Store::open(&loaded.config.paths.state) {
        Ok((store, found)) => {
            for remark in &found.remarks {
                tracing::warn!("{remark}");
            }
            Ok((Some(store), found.records))
        }
        Err(error @ crate::store::Error::Taken(_)) => Err(Failure(FAILED, error.to_string())),
        Err(error) => {
            tracing::error!(%error, "nothing can be kept over a restart; band protects from memory");
            Ok((None, Vec::new()))
        }
    }
}

/// A thread that sleeps until the kernel says that an address came or went.
fn follow_own_addresses(orders: Slot<Order>) {
    let follow = move || {
        let mut socket = None;
        loop {
            if let Err(error) = own::wait_for_change(&mut socket) {
                tracing::warn!(%error, "changes of this machine's addresses are not noticed any more; banctl reload looks again");
                return;
            }
            if let Ok(addresses) = own::addresses()
                && !orders.put(Order::Own(addresses))
            {
                return;
            }
        }
    };
    // It ends with the process; without it addresses are looked up at start and reload only.
    let _ = std::thread::Builder::new().name("band-addresses".into()).spawn(follow);
}

/// Signals, systemd and the control socket, until it is time to stop.
async fn attend(
    words: &Words,
    listener: std::os::unix::net::UnixListener,
    orders: &Slot<Order>,
    tasks: &Slot<Task>,
) -> Result<(), Failure> {
    let fail = |error: std::io::Error| Failure(FAILED, error.to_string());
    let listener = tokio::net::UnixListener::from_std(listener).map_err(fail)?;
    let (send, mut asked) = mpsc::channel(64);
    tokio::spawn(serve(listener, send));
    let mut terminate = signal(SignalKind::terminate()).map_err(fail)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(fail)?;
    let mut hangup = signal(SignalKind::hangup()).map_err(fail)?;
    let mut watchdog = systemd::watchdog_interval().map(tokio::time::interval);
    // Ready means: what the last run banned is in the kernel again, and the logs are open.
    let (ready, is_ready) = oneshot::channel();
    tasks.put(Task::Confirm(Box::new(move |result| {
        let _ = ready.send(result);
    })));
    if let Ok(Err(why)) = is_ready.await {
        tracing::warn!("{why}");
    }
    systemd::notify("READY=1\nSTATUS=protecting");
    loop {
        tokio::select! {
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            _ = hangup.recv() => {
                let reply = reload(words, orders).await;
                if reply.ok { tracing::info!("{}", reply.message) } else { tracing::error!("{}", reply.message) }
            }
            Some(asked) = asked.recv() => dispatch(words, orders, asked).await,
            () = tick(&mut watchdog) => sign_of_life(orders),
        }
    }
}

async fn tick(watchdog: &mut Option<tokio::time::Interval>) {
    match watchdog {
        Some(interval) => {
            interval.tick().await;
        }
        None => std::future::pending().await,
    }
}

/// Tells systemd that all is well, if the deciding thread says so in time.
fn sign_of_life(orders: &Slot<Order>) {
    let (send, receive) = oneshot::channel();
    orders.put(Order::Ping(Box::new(move || {
        let _ = send.send(());
    })));
    tokio::spawn(async move {
        if tokio::time::timeout(PING_MAX, receive).await.is_ok_and(|answer| answer.is_ok()) {
            systemd::notify("WATCHDOG=1");
        }
    });
}

async fn dispatch(words: &Words, orders: &Slot<Order>, asked: Asked) {
    if asked.request == Request::Reload {
        let reply = reload(words, orders).await;
        let _ = asked.answer.send(Answer::Reply(reply));
        return;
    }
    orders.put(Order::Ask(asked));
}

/// Reads the configuration anew; the old one stays in force if anything is wrong with the new one.
async fn reload(words: &Words, orders: &Slot<Order>) -> Reply {
    systemd::notify_reloading();
    let file = words.config.clone();
    // Automata are built meanwhile on another thread; nothing waits for them but this answer.
    let loaded = tokio::task::spawn_blocking(move || load(&file)).await;
    let reply = match loaded {
        Ok(Ok(loaded)) => {
            own_addresses_again(orders);
            let (send, receive) = oneshot::channel();
            let answer = Box::new(move |changes: String| {
                let _ = send.send(changes);
            });
            orders.put(Order::Reload(Box::new(loaded), answer));
            match receive.await {
                Ok(changes) => Reply::done(changes, serde_json::Value::Null),
                Err(_) => Reply::failed(FAILED, "band is stopping"),
            }
        }
        Ok(Err(complaints)) => Reply::failed(
            CONFIG,
            format!("nothing was changed, the old configuration stays in force:\n{}", told(&complaints)),
        ),
        Err(error) => Reply::failed(FAILED, format!("the configuration could not be read: {error}")),
    };
    systemd::notify("READY=1");
    reply
}

fn own_addresses_again(orders: &Slot<Order>) {
    if let Ok(addresses) = own::addresses() {
        orders.put(Order::Own(addresses));
    }
}
