//! Network namespaces for tests: a closure comes in and runs where it can break nothing; the namespace goes with the last descriptor.
//!
//! A namespace here has no name, only a descriptor, so that a killed test leaves nothing behind.

use std::fs::File;
use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

/// Set in the child that a test becomes when it is not run by root.
const INNER: &str = "BAND_TEST_IN_USER_NAMESPACE";

/// Runs a test in a private network namespace with `lo` up; as an ordinary user, in a child that is root in a private
/// user namespace.
pub fn private(test: impl FnOnce() + Send) {
    if rustix::process::geteuid().is_root() {
        return Net::new().run(test);
    }
    assert!(std::env::var_os(INNER).is_none(), "unshare -Urn did not make us root");
    let name = std::thread::current().name().map(str::to_owned).expect("the test's thread has the test's name");
    let status = Command::new("unshare")
        .args(["--user", "--map-root-user", "--net", "--"])
        .arg(std::env::current_exe().expect("our own path"))
        .args(["--exact", &name, "--nocapture", "--include-ignored", "--test-threads=2"])
        .env(INNER, "1")
        .status()
        .expect("unshare (util-linux) runs");
    assert!(status.success(), "{name} failed in its user namespace");
}

/// A network namespace of its own.
pub struct Net {
    descriptor: File,
}

impl Net {
    /// An empty one with `lo` up.
    pub fn new() -> Self {
        let descriptor =
            std::thread::scope(|scope| scope.spawn(enter_new).join().expect("a new network namespace (are we root?)"));
        Self { descriptor }
    }

    /// Runs a closure inside, on a thread of its own; what the thread opens or spawns is inside too, and stays there.
    pub fn run<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> T {
        let outcome = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name(std::thread::current().name().unwrap_or("test").to_owned());
            let entered = || {
                move_into_link_name_space(self.descriptor.as_fd(), Some(LinkNameSpaceType::Network)).expect("setns");
                inside()
            };
            thread.spawn_scoped(scope, entered).expect("a thread").join()
        });
        outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// How programs like `ip` find it while this value lives.
    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.descriptor.as_raw_fd())
    }
}

#[allow(unsafe_code, reason = "rustix calls it unsafe because of UnshareFlags::FILES, which is not used here")]
fn enter_new() -> File {
    // SAFETY: only the network namespace of this thread changes, not its table of descriptors.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }.expect("unshare(NEWNET): root is needed");
    run("ip", "link set lo up");
    File::open("/proc/thread-self/ns/net").expect("our own namespace")
}

/// Two namespaces with a cable between them: an attacker and a server.
pub struct Lab {
    pub attacker: Net,
    pub server: Net,
}

impl Lab {
    pub const SERVER4: &str = "192.0.2.1";
    pub const SERVER6: &str = "2001:db8::1";
    /// The attacker's addresses; the first of each family is the one it uses unless it binds to another.
    pub const ATTACKER4: [&str; 2] = ["192.0.2.66", "192.0.2.67"];
    pub const ATTACKER6: [&str; 2] = ["2001:db8::66", "2001:db8:0:1::66"];
    /// Addresses of the attacker from another network, routed through the first.
    pub const FAR4: &str = "198.51.100.7";

    pub fn new() -> Self {
        let lab = Self { attacker: Net::new(), server: Net::new() };
        let peer = lab.attacker.path();
        lab.server.run(|| {
            run("ip", &format!("link add cable0 type veth peer name cable1 netns {peer}"));
            run("ip", "link set cable0 up");
            run("ip", &format!("address add {}/24 dev cable0", Self::SERVER4));
            run("ip", &format!("address add {}/64 dev cable0 nodad", Self::SERVER6));
            run("ip", &format!("route add 198.51.100.0/24 via {}", Self::ATTACKER4[0]));
            run("ip", "route add 2001:db8:0:1::/64 via 2001:db8::66");
        });
        lab.attacker.run(|| {
            run("ip", "link set cable1 up");
            for address in Self::ATTACKER4 {
                run("ip", &format!("address add {address}/24 dev cable1"));
            }
            run("ip", &format!("address add {}/24 dev cable1", Self::FAR4));
            run("ip", "address add 2001:db8::66/64 dev cable1 nodad");
            run("ip", "address add 2001:db8:0:1::66/64 dev cable1 nodad");
        });
        lab.warm_up();
        lab
    }

    /// Waits until packets of every address arrive: on a busy machine the first of IPv6 waits for its neighbour, or is lost.
    fn warm_up(&self) {
        let server = self.server.run(|| UdpSocket::bind("[::]:9")).expect("a port to listen on");
        server.set_nonblocking(true).expect("a socket that does not wait");
        let far = [Self::FAR4];
        for from in Self::ATTACKER4.iter().chain(&far).chain(&Self::ATTACKER6) {
            let to = if from.contains(':') { Self::SERVER6 } else { Self::SERVER4 };
            let sender = self.attacker.run(|| UdpSocket::bind((*from, 0))).expect("an address of the attacker");
            wait_until(&format!("the cable carries packets of {from}"), Duration::from_secs(20), || {
                let _ = sender.send_to(b"warm", (to, 9));
                server.recv(&mut [0; 8]).ok()
            });
        }
    }
}

/// Runs a program in the namespace of this thread and gives what it printed.
///
/// # Panics
/// If it is not installed or fails: a test that cannot see must not pass.
#[track_caller]
pub fn run(program: &str, arguments: &str) -> String {
    let output = Command::new(program).args(arguments.split_whitespace()).output();
    let output = output.unwrap_or_else(|why| panic!("{program} is needed by the tests: {why}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Asks again and again, each few milliseconds, until the answer is there.
///
/// # Panics
/// If it is not there within `deadline`.
#[track_caller]
pub fn wait_until<T>(what: &str, deadline: Duration, mut condition: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + deadline;
    loop {
        if let Some(answer) = condition() {
            return answer;
        }
        assert!(Instant::now() < end, "waited {deadline:?} in vain: {what}");
        let _ = poll(&mut [], Some(&Timespec { tv_sec: 0, tv_nsec: 3_000_000 }));
    }
}

/// True if there is something to read within `deadline`.
pub fn readable(descriptor: impl AsFd, deadline: Duration) -> bool {
    let timeout = Timespec { tv_sec: deadline.as_secs().cast_signed(), tv_nsec: deadline.subsec_nanos().into() };
    poll(&mut [PollFd::new(&descriptor, PollFlags::IN)], Some(&timeout)).expect("poll") > 0
}
