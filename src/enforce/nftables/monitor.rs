//! Who changed the packet filter: the kernel's notices come in, one value for each transaction goes out. What changed is not said.

use std::os::fd::{AsFd, BorrowedFd};

use netlink_sys::{Socket, protocols::NETLINK_NETFILTER};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use socket2::{SockFilter, SockRef};

use super::Error;
use super::socket::cannot_open;
use super::wire::{Message, SUBSYSTEM, kind, messages};

/// `NFNLGRP_NFTABLES`.
const GROUP: u32 = 7;
/// A notice is about 60 bytes.
const INBOX_BYTES: usize = 8 << 10;
const NEWGEN: u16 = (SUBSYSTEM as u16) << 8 | kind::NEWGEN as u16;

/// Hears of every transaction of anybody in this network namespace.
#[derive(Debug)]
pub struct Monitor {
    socket: Socket,
    inbox: Vec<u8>,
}

/// A transaction somebody made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The number of the state it led to; 0 if notices were lost.
    pub generation: u32,
    /// The thread that made it (its number is the process's in a process of one thread); 0 if notices were lost.
    pub pid: u32,
    /// The name of that thread, as `ps -T` shows it.
    pub name: String,
    /// The netlink port it came through; compare with [`super::Kernel::port_id`].
    pub port_id: u32,
    /// True if this stands for notices that were lost because nobody fetched them.
    pub overflow: bool,
}

impl Monitor {
    /// Starts to listen.
    ///
    /// # Errors
    /// [`Error::Permission`] without CAP_NET_ADMIN, [`Error::Unsupported`] without netfilter.
    pub fn open() -> Result<Self, Error> {
        let mut socket = Socket::new(NETLINK_NETFILTER).map_err(|why| cannot_open(&why))?;
        socket.bind_auto().map_err(|why| cannot_open(&why))?;
        attach_filter(&socket).map_err(|why| cannot_open(&why))?;
        socket.set_non_blocking(true).map_err(|why| cannot_open(&why))?;
        socket.add_membership(GROUP).map_err(|why| cannot_open(&why))?;
        Ok(Self { socket, inbox: vec![0; INBOX_BYTES] })
    }

    /// The next change, `None` if there is none yet; never blocks (wait until the descriptor can be read).
    #[allow(clippy::should_implement_trait, reason = "None means not yet, an iterator would be over")]
    pub fn next(&mut self) -> Option<Change> {
        loop {
            match recv(&self.socket, &mut self.inbox[..], RecvFlags::DONTWAIT) {
                Ok((length, _)) => {
                    // The kernel sends this notice in a datagram of its own.
                    if let Some(message) = messages(&self.inbox[..length]).find(|message| message.kind == NEWGEN) {
                        return Some(read(&message));
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::NOBUFS) => {
                    return Some(Change { generation: 0, pid: 0, name: String::new(), port_id: 0, overflow: true });
                }
                // AGAIN; nothing else is known to happen on a socket that only listens.
                Err(_) => return None,
            }
        }
    }
}

impl AsFd for Monitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn read(message: &Message<'_>) -> Change {
    let attributes = message.attributes();
    Change {
        generation: attributes.u32(1).unwrap_or_default(),
        pid: attributes.u32(2).unwrap_or_default(),
        name: attributes.text(3).to_owned(),
        port_id: message.port_id,
        overflow: false,
    }
}

/// Lets only the notice at the end of a transaction through: with one for each element a batch of 50,000 bans would cost
/// 636 ms instead of 109 ms and overflow our buffer.
fn attach_filter(socket: &Socket) -> std::io::Result<()> {
    // The filter loads big-endian, netlink headers are in host order.
    let wanted = u16::from_be_bytes(NEWGEN.to_ne_bytes());
    SockRef::from(socket).attach_filter(&[
        // ldh [4]; jeq wanted, accept, drop; accept: ret all; drop: ret 0
        SockFilter::new(0x28, 0, 0, 4),
        SockFilter::new(0x15, 0, 1, u32::from(wanted)),
        SockFilter::new(0x06, 0, 0, u32::MAX),
        SockFilter::new(0x06, 0, 0, 0),
    ])
}
