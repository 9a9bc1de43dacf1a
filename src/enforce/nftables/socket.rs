//! The netlink socket: bytes of a batch go to the kernel, its refusals and answers come back. Understands neither rules nor elements.

use std::time::Duration;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv, sockopt};

use super::Error;
use super::wire::{self, Batch, Message, messages};

/// The kernel answers while it is asked; only a list of a million elements keeps it busy for long (one part at a time).
pub(super) const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// A transaction must fit into the send buffer: the default of 208 KiB holds one of 2000 IPv4 elements, not of IPv6.
const SEND_BUFFER_BYTES: usize = 4 << 20;
/// Room for the refusals of a batch and for a part of a list.
const RECEIVE_BUFFER_BYTES: usize = 4 << 20;
/// The kernel hands out lists in parts of at most 32 KiB.
const INBOX_BYTES: usize = 64 << 10;

/// A message of a transaction that the kernel refused; the whole transaction is void then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    /// The message, by its sequence number.
    pub seq: u32,
    /// The reason.
    pub errno: Errno,
}

/// An open netlink socket.
#[derive(Debug)]
pub(super) struct Link {
    socket: Socket,
    port_id: u32,
    inbox: Vec<u8>,
}

impl Link {
    /// Opens a socket with large buffers where we may have them.
    pub fn open() -> Result<Self, Error> {
        let mut socket = Socket::new(NETLINK_NETFILTER).map_err(|why| cannot_open(&why))?;
        let address = socket.bind_auto().map_err(|why| cannot_open(&why))?;
        socket.connect(&SocketAddr::new(0, 0)).map_err(|why| cannot_open(&why))?;
        // Without this a refusal carries the refused message, 64 KiB of elements.
        socket.set_cap_ack(true).map_err(|why| cannot_open(&why))?;
        // A smaller buffer only means smaller transactions: apply() halves what does not fit.
        let _ = sockopt::set_socket_send_buffer_size_force(&socket, SEND_BUFFER_BYTES)
            .or_else(|_| sockopt::set_socket_send_buffer_size(&socket, SEND_BUFFER_BYTES));
        let _ = sockopt::set_socket_recv_buffer_size_force(&socket, RECEIVE_BUFFER_BYTES)
            .or_else(|_| sockopt::set_socket_recv_buffer_size(&socket, RECEIVE_BUFFER_BYTES));
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(ANSWER_WITHIN))
            .map_err(|errno| Error::Kernel { doing: "opening a netlink socket", errno })?;
        Ok(Self { socket, port_id: address.port_number(), inbox: vec![0; INBOX_BYTES] })
    }

    /// The number by which others see who made a change.
    pub fn port_id(&self) -> u32 {
        self.port_id
    }

    /// Sends a transaction; no refusals means that all of it is in force when this returns.
    ///
    /// The kernel works inside `send` and has queued every refusal when it returns, so nothing is waited for.
    pub fn commit(&mut self, batch: &mut Batch) -> Result<Vec<Refusal>, Errno> {
        self.send(batch.end())?;
        let mut refusals = Vec::new();
        loop {
            match recv(&self.socket, &mut self.inbox[..], RecvFlags::DONTWAIT) {
                Ok((length, _)) => refusals.extend(refusals_in(&self.inbox[..length], batch)),
                Err(Errno::AGAIN) => return Ok(refusals),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }

    /// Sends one question and shows every answer to `visit`; true if a list changed while it was given.
    pub fn ask(&mut self, batch: &Batch, mut visit: impl FnMut(&Message<'_>)) -> Result<bool, Errno> {
        self.send(batch.bytes())?;
        let mut interrupted = false;
        loop {
            let length = match recv(&self.socket, &mut self.inbox[..], RecvFlags::empty()) {
                Ok((length, _)) => length,
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno),
            };
            for message in messages(&self.inbox[..length]).filter(|message| batch.has(message.seq)) {
                interrupted |= message.flags & wire::DUMP_INTERRUPTED != 0;
                match message.kind {
                    wire::ERROR if message.errno() != 0 => return Err(Errno::from_raw_os_error(message.errno())),
                    wire::ERROR | wire::DONE => return Ok(interrupted),
                    _ => visit(&message),
                }
                if message.flags & wire::MULTI == 0 {
                    return Ok(interrupted);
                }
            }
        }
    }

    fn send(&self, bytes: &[u8]) -> Result<(), Errno> {
        loop {
            match self.socket.send(bytes, 0).map_err(|why| errno_of(&why)) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }
}

fn refusals_in(bytes: &[u8], batch: &Batch) -> impl Iterator<Item = Refusal> {
    messages(bytes)
        .filter(|message| message.kind == wire::ERROR && message.errno() != 0 && batch.has(message.seq))
        .map(|message| Refusal { seq: message.seq, errno: Errno::from_raw_os_error(message.errno()) })
}

/// The number behind an error of the standard library.
pub(super) fn errno_of(why: &std::io::Error) -> Errno {
    Errno::from_io_error(why).unwrap_or(Errno::IO)
}

/// What it means that a netfilter socket cannot be opened.
pub(super) fn cannot_open(why: &std::io::Error) -> Error {
    match errno_of(why) {
        Errno::PERM | Errno::ACCESS => Error::Permission,
        Errno::PROTONOSUPPORT | Errno::AFNOSUPPORT => Error::Unsupported("netfilter netlink"),
        errno => Error::Kernel { doing: "opening a netlink socket", errno },
    }
}
