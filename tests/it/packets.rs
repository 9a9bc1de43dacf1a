//! Packets over a cable between two namespaces: what is banned stops, the rest passes. What nft lists: see `nftables`.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use band::enforce::nftables::{Action, Kernel, Layout, Op, PortRange, Ports, Protocol};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::netns::{Lab, Net, private, readable, run, wait_until};
use crate::nftables::{ban, layout, net, scope, unban};

const SOON: Duration = Duration::from_secs(10);
const PORT: u16 = 5060;
const OTHER_PORT: u16 = 5062;

fn drop_all() -> Layout {
    layout(&[], vec![scope("all", Action::Drop, Ports::All)])
}

/// A lab whose server has this layout, the server's packet filter, and a test with both.
fn with_lab(layout: &Layout, test: impl FnOnce(&Lab, &mut Kernel) + Send) {
    let layout = layout.clone();
    private(move || {
        let lab = Lab::new();
        introduce(&lab);
        let mut kernel = lab.server.run(|| {
            let mut kernel = Kernel::open().unwrap();
            kernel.install(&layout).unwrap();
            kernel
        });
        test(&lab, &mut kernel);
    });
}

/// The attacker finds the server's link address in both families: a packet that had to wait for it would be overtaken by
/// every fence. The server still knows nobody but the two who sent.
fn introduce(lab: &Lab) {
    for (from, to) in [(Lab::ATTACKER4[0], Lab::SERVER4), (Lab::ATTACKER6[1], Lab::SERVER6)] {
        let (here, there) = (udp(&lab.attacker, from, 0), udp(&lab.server, to, 0));
        here.send_to(b"hello", there.local_addr().unwrap()).unwrap();
        there.recv(&mut [0; 8]).expect("nothing is in the way yet");
    }
}

fn apply(kernel: &mut Kernel, ops: &[Op]) {
    assert_eq!(kernel.apply(ops), []);
}

fn udp(namespace: &Net, address: &str, port: u16) -> UdpSocket {
    let address: IpAddr = address.parse().unwrap();
    let bind = || UdpSocket::bind((address, port)).unwrap_or_else(|why| panic!("bind {address}: {why}"));
    let socket = namespace.run(bind);
    socket.set_read_timeout(Some(SOON)).unwrap();
    socket
}

/// Where attackers send to: one port of the server in both families, and an address that is never banned and so proves
/// that what was sent before it was stopped and is not merely late.
struct Target {
    server: UdpSocket,
    fence: UdpSocket,
    port: u16,
}

impl Target {
    fn new(lab: &Lab, port: u16) -> Self {
        let server = udp(&lab.server, &Ipv6Addr::UNSPECIFIED.to_string(), port);
        Self { server, fence: udp(&lab.attacker, Lab::ATTACKER4[1], 0), port }
    }

    fn hears(&self, sender: &UdpSocket) -> bool {
        let server = if sender.local_addr().unwrap().is_ipv4() { Lab::SERVER4 } else { Lab::SERVER6 };
        let mut heard = false;
        // Twice: a packet overtaken by the first fence is still seen before the second.
        for _ in 0..2 {
            sender.send_to(b"attack", (server, self.port)).unwrap();
            self.fence.send_to(b"fence", (Lab::SERVER4, self.port)).unwrap();
            let mut buffer = [0; 16];
            loop {
                let (length, _) = self.server.recv_from(&mut buffer).expect("the fence arrives");
                if &buffer[..length] == b"fence" {
                    break;
                }
                heard = true;
            }
        }
        heard
    }
}

#[test]
fn datagrams_stop_and_pass_again() {
    with_lab(&drop_all(), |lab, kernel| {
        let target = Target::new(lab, PORT);
        let cases = [
            (Lab::ATTACKER4[0], Lab::ATTACKER4[0]),
            (Lab::FAR4, Lab::FAR4),
            (Lab::FAR4, "198.51.100.0/24"),
            (Lab::FAR4, "198.51.96.0/21"),
            (Lab::FAR4, "198.0.0.0/7"),
            (Lab::ATTACKER6[0], Lab::ATTACKER6[0]),
            (Lab::ATTACKER6[0], "2001:db8::/64"),
            (Lab::ATTACKER6[1], "2001:db8:0:1::/64"),
            (Lab::ATTACKER6[1], "2001:db8::/63"),
            (Lab::ATTACKER6[1], "2001:db8::/32"),
            (Lab::ATTACKER6[1], "2001:db8:0:1::60/124"),
            (Lab::ATTACKER6[1], "::/0"),
        ];
        for (from, banned) in cases {
            let sender = udp(&lab.attacker, from, 0);
            assert!(target.hears(&sender), "{from} before");
            apply(kernel, &[ban("all", banned, 60_000)]);
            assert!(!target.hears(&sender), "{from} while {banned} is banned");
            apply(kernel, &[unban("all", banned)]);
            assert!(target.hears(&sender), "{from} after {banned} was let in again");
        }
    });
}

#[test]
fn only_the_banned_network_is_meant() {
    with_lab(&drop_all(), |lab, kernel| {
        let target = Target::new(lab, PORT);
        apply(
            kernel,
            &[ban("all", "198.51.100.8", 0), ban("all", "192.0.2.64/31", 0), ban("all", "2001:db8:0:1::/64", 0)],
        );
        for free in [Lab::FAR4, Lab::ATTACKER4[0], Lab::ATTACKER6[0]] {
            assert!(target.hears(&udp(&lab.attacker, free, 0)), "{free}");
        }
        let banned = udp(&lab.attacker, Lab::ATTACKER6[1], 0);
        assert!(!target.hears(&banned));
        apply(kernel, &[unban("all", "2001:db8::/63"), unban("all", Lab::ATTACKER6[1])]);
        assert!(!target.hears(&banned), "only exactly what was banned is let in again");
    });
}

#[test]
fn overlapping_bans_come_and_go_on_their_own() {
    with_lab(&drop_all(), |lab, kernel| {
        let (target, sender) = (Target::new(lab, PORT), udp(&lab.attacker, Lab::FAR4, 0));
        let nets = ["198.51.100.0/24", "198.51.0.0/16", Lab::FAR4];
        apply(kernel, &nets.map(|net| ban("all", net, 0)));
        for net in nets {
            assert!(!target.hears(&sender), "before {net} is let in");
            apply(kernel, &[unban("all", net)]);
        }
        assert!(target.hears(&sender));
    });
}

#[test]
fn the_allowed_come_before_the_banned() {
    let mut layout = drop_all();
    layout.allow = ["198.51.100.0/24", "192.0.2.67/32", "2001:db8:0:1::/64"].map(net).to_vec();
    with_lab(&layout, |lab, kernel| {
        let target = Target::new(lab, PORT);
        apply(kernel, &[ban("all", "0.0.0.0/0", 0), ban("all", Lab::FAR4, 0), ban("all", "::/0", 0)]);
        for (from, passes) in
            [(Lab::FAR4, true), (Lab::ATTACKER4[0], false), (Lab::ATTACKER6[1], true), (Lab::ATTACKER6[0], false)]
        {
            assert_eq!(target.hears(&udp(&lab.attacker, from, 0)), passes, "{from}");
        }
    });
}

#[test]
fn a_ban_on_everything_spares_loopback_and_neighbour_discovery() {
    with_lab(&drop_all(), |lab, kernel| {
        apply(kernel, &[ban("all", "127.0.0.0/8", 0), ban("all", "::/0", 0), ban("all", "192.0.2.66", 0)]);
        let (here, there) = (udp(&lab.server, "127.0.0.1", 0), udp(&lab.server, "127.0.0.1", 0));
        here.send_to(b"x", there.local_addr().unwrap()).unwrap();
        assert_eq!(there.recv(&mut [0; 4]).expect("loopback passes"), 1);
        // The server asks for the attacker's link address; the answer comes from a banned one.
        lab.server.run(|| run("ip", "-6 neighbour flush dev cable0"));
        let server = udp(&lab.server, Lab::SERVER6, 0);
        let attacker = udp(&lab.attacker, Lab::ATTACKER6[0], 0);
        server.send_to(b"x", attacker.local_addr().unwrap()).unwrap();
        assert_eq!(attacker.recv(&mut [0; 4]).expect("the neighbour was found"), 1);
    });
}

fn connection(lab: &Lab, from: &str, port: u16) -> (TcpStream, TcpStream) {
    let server = if from.contains(':') { Lab::SERVER6 } else { Lab::SERVER4 };
    let address: SocketAddr = (server.parse::<IpAddr>().unwrap(), port).into();
    let listener = lab.server.run(|| TcpListener::bind(address)).unwrap();
    let client = lab.attacker.run(|| connect(from, address)).unwrap();
    let (accepted, _) = listener.accept().unwrap();
    for stream in [&client, &accepted] {
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.set_nodelay(true).unwrap();
    }
    (client, accepted)
}

fn connect(from: &str, address: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&SocketAddr::new(from.parse().unwrap(), 0).into())?;
    socket.connect_timeout(&address.into(), SOON)?;
    Ok(socket.into())
}

fn echoes(client: &mut TcpStream, server: &mut TcpStream) {
    let mut byte = [0];
    client.write_all(b"?").unwrap();
    server.read_exact(&mut byte).unwrap();
    server.write_all(b"!").unwrap();
    client.read_exact(&mut byte).unwrap();
}

#[test]
fn an_established_connection_stands_still_while_its_address_is_banned() {
    for (from, banned) in
        [(Lab::FAR4, Lab::FAR4), (Lab::FAR4, "198.51.100.0/24"), (Lab::ATTACKER6[1], "2001:db8:0:1::/64")]
    {
        with_lab(&drop_all(), |lab, kernel| {
            let target = Target::new(lab, PORT);
            let (mut client, mut server) = connection(lab, from, 22);
            echoes(&mut client, &mut server);
            apply(kernel, &[ban("all", banned, 0)]);
            client.write_all(b"?").unwrap();
            assert!(
                !target.hears(&udp(&lab.attacker, from, 0)),
                "the fence came, so what was before it is here or lost"
            );
            server.set_nonblocking(true).unwrap();
            assert_eq!(server.read(&mut [0]).map_err(|why| why.kind()), Err(ErrorKind::WouldBlock), "{banned}");
            apply(kernel, &[unban("all", banned)]);
            assert!(readable(&server, SOON), "the connection was alive all the time: what was lost is sent again");
        });
    }
}

#[test]
fn a_rejected_client_is_told_so() {
    with_lab(&layout(&[], vec![scope("all", Action::Reject, Ports::All)]), |lab, kernel| {
        // Once for both: a program that another test starts may hold a closed socket for a moment longer.
        let _listening = Target::new(lab, PORT);
        for from in [Lab::FAR4, Lab::ATTACKER6[1]] {
            let (mut client, mut server) = connection(lab, from, 22);
            echoes(&mut client, &mut server);
            apply(kernel, &[ban("all", from, 0)]);
            client.write_all(b"?").unwrap();
            let reset = client.read(&mut [0]).map_err(|why| why.kind());
            assert_eq!(reset, Err(ErrorKind::ConnectionReset), "{from}");
            let again = lab.attacker.run(|| connect(from, server.local_addr().unwrap()));
            assert_eq!(again.err().map(|why| why.kind()), Some(ErrorKind::ConnectionRefused), "{from}");
            let sender = udp(&lab.attacker, from, 0);
            sender.connect((server.local_addr().unwrap().ip(), PORT)).unwrap();
            sender.send(b"attack").unwrap();
            let refused = sender.recv(&mut [0]).map_err(|why| why.kind());
            assert_eq!(refused, Err(ErrorKind::ConnectionRefused), "{from}");
        }
    });
}

#[test]
fn only_the_ports_of_the_scope_are_closed() {
    let range = |protocol, first, last| PortRange { protocol, first, last };
    let pbx = vec![range(Protocol::Udp, PORT, PORT + 1), range(Protocol::Tcp, 5061, 5061)];
    let next = vec![range(Protocol::Udp, OTHER_PORT, OTHER_PORT)];
    let scopes = vec![scope("pbx", Action::Drop, Ports::Some(pbx)), scope("next", Action::Drop, Ports::Some(next))];
    with_lab(&layout(&[], scopes), |lab, kernel| {
        let ports = [PORT, PORT + 1, OTHER_PORT, PORT - 1];
        let targets = ports.map(|port| Target::new(lab, port));
        for from in [Lab::FAR4, Lab::ATTACKER6[1]] {
            let sender = udp(&lab.attacker, from, 0);
            let (mut client, mut server) = connection(lab, from, 22);
            apply(kernel, &[ban("pbx", from, 0)]);
            assert_eq!([0, 1, 2, 3].map(|i| targets[i].hears(&sender)), [false, false, true, true], "{from}");
            apply(kernel, &[ban("next", from, 0)]);
            assert_eq!([0, 1, 2, 3].map(|i| targets[i].hears(&sender)), [false, false, false, true], "{from}");
            echoes(&mut client, &mut server);
            let (mut client, mut server) = {
                apply(kernel, &[unban("pbx", from)]);
                connection(lab, from, 5061)
            };
            echoes(&mut client, &mut server);
            apply(kernel, &[ban("pbx", from, 0)]);
            client.write_all(b"?").unwrap();
            assert!(!targets[0].hears(&sender));
            server.set_nonblocking(true).unwrap();
            assert_eq!(server.read(&mut [0]).map_err(|why| why.kind()), Err(ErrorKind::WouldBlock), "{from}");
        }
    });
}

/// A raw ICMP socket that sends echo requests from one address.
struct Ping {
    socket: Socket,
    server: SocketAddr,
    id: u8,
}

impl Ping {
    fn new(lab: &Lab, from: &str, id: u8) -> Self {
        let from: IpAddr = from.parse().unwrap();
        let (domain, protocol, server) = match from {
            IpAddr::V4(_) => (Domain::IPV4, socket2::Protocol::ICMPV4, Lab::SERVER4),
            IpAddr::V6(_) => (Domain::IPV6, socket2::Protocol::ICMPV6, Lab::SERVER6),
        };
        let socket = lab.attacker.run(|| Socket::new(domain, Type::RAW, Some(protocol))).unwrap();
        socket.bind(&SocketAddr::new(from, 0).into()).unwrap();
        socket.set_read_timeout(Some(SOON)).unwrap();
        Self { socket, server: (server.parse::<IpAddr>().unwrap(), 0).into(), id }
    }

    fn send(&self) {
        let (kind, id) = (if self.server.is_ipv4() { 8u8 } else { 128 }, self.id);
        // The kernel fills in the checksum of ICMPv6 only.
        let [high, low] = (!(u16::from_be_bytes([kind, 0]) + u16::from(id))).to_be_bytes();
        self.socket.send_to(&[kind, 0, high, low, 0, id, 0, 0], &SockAddr::from(self.server)).unwrap();
    }

    /// The kind of the next message for this sender that is not a request, and what it is about.
    fn answer(&self) -> (u8, u8) {
        let mut socket = &self.socket;
        loop {
            let mut buffer = [0; 256];
            let length = socket.read(&mut buffer).expect("an answer arrives");
            let message = &buffer[if self.server.is_ipv4() { 20 } else { 0 }..length];
            if matches!(message[0], 0 | 3 | 1 | 129) {
                return (message[0], message[5]);
            }
        }
    }
}

#[test]
fn echo_requests_can_be_the_only_thing_that_is_closed() {
    for (action, refusals) in [(Action::Drop, None), (Action::Reject, Some([3, 1]))] {
        let echo = Ports::Some(vec![PortRange { protocol: Protocol::Icmp, first: 0, last: 0 }]);
        with_lab(&layout(&[], vec![scope("ping", action, echo)]), |lab, kernel| {
            let target = Target::new(lab, PORT);
            for (index, from) in [Lab::FAR4, Lab::ATTACKER6[1]].into_iter().enumerate() {
                let free = if index == 0 { Lab::ATTACKER4[0] } else { Lab::ATTACKER6[0] };
                let (ping, fence) = (Ping::new(lab, from, 1), Ping::new(lab, free, 2));
                let reply = [0, 129][index];
                ping.send();
                assert_eq!(ping.answer(), (reply, 1), "{from}");
                apply(kernel, &[ban("ping", from, 0)]);
                ping.send();
                fence.send();
                assert_eq!(fence.answer(), (reply, 2), "{free}");
                match refusals {
                    Some(refusals) => assert_eq!(ping.answer().0, refusals[index], "{from}"),
                    None => assert!(!has_reply(&ping.socket), "{from}"),
                }
                assert!(target.hears(&udp(&lab.attacker, from, 0)), "{from}");
            }
        });
    }
}

/// True if anything is waiting; neighbour discovery is for the kernel only and not seen here for IPv4.
fn has_reply(socket: &Socket) -> bool {
    let mut buffer = [0; 256];
    socket.set_nonblocking(true).unwrap();
    let mut reader = socket;
    std::iter::from_fn(|| {
        reader.read(&mut buffer).ok().map(|_| matches!(buffer[0], 0 | 129) || buffer[20] == 0 && buffer[0] == 0x45)
    })
    .any(|is_reply| is_reply)
}

#[test]
fn stopped_packets_are_counted_since_the_ban() {
    with_lab(&drop_all(), |lab, kernel| {
        assert!(kernel.counts(), "this machine has few processors and a new kernel");
        let (target, sender) = (Target::new(lab, PORT), udp(&lab.attacker, Lab::FAR4, 0));
        for banned in [Lab::FAR4, "198.51.100.0/24"] {
            apply(kernel, &[ban("all", banned, 60_000)]);
            assert!(!target.hears(&sender));
            let held = kernel.held("all", &net(banned)).unwrap().unwrap();
            // 20 bytes of IP, 8 of UDP, 6 of ours, twice.
            assert_eq!((held.packets, held.bytes), (2, 68), "{banned}");
            assert_eq!(kernel.dump().unwrap().iter().map(|held| held.packets).collect::<Vec<_>>(), [2]);
            apply(kernel, &[unban("all", banned)]);
        }
    });
}

#[test]
fn no_packet_slips_through_while_a_ban_is_extended() {
    with_lab(&drop_all(), |lab, kernel| {
        let (target, sender) = (Target::new(lab, PORT), udp(&lab.attacker, Lab::FAR4, 0));
        let mut portable = lab.server.run(|| Kernel::open_portable().unwrap());
        portable.install(&drop_all()).unwrap();
        apply(kernel, &[ban("all", Lab::FAR4, 60_000)]);
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 0..20_000 {
                    apply(
                        if round % 2 == 0 { kernel } else { &mut portable },
                        &[ban("all", Lab::FAR4, 60_000 + round)],
                    );
                }
                done.store(true, std::sync::atomic::Ordering::Relaxed);
            });
            wait_until("all extensions are done", SOON * 3, || {
                (0..100).for_each(|_| drop(sender.send_to(b"attack", (Lab::SERVER4, PORT))));
                assert!(!target.hears(&sender), "a packet passed");
                done.load(std::sync::atomic::Ordering::Relaxed).then_some(())
            });
        });
    });
}
