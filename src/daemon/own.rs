//! The machine's own addresses: asked of the kernel at start, and again whenever it says that one came or went.

use std::net::IpAddr;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

/// `RTM_NEWADDR`, `RTM_GETADDR` (linux/rtnetlink.h).
const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;
/// `NLM_F_REQUEST | NLM_F_DUMP`, `NLMSG_DONE`, `NLMSG_ERROR` (linux/netlink.h).
const REQUEST_DUMP: u16 = 0x301;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// `IFA_ADDRESS`, `IFA_LOCAL` (linux/if_addr.h); the local one is ours, the other may be the peer's.
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
/// `RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR`.
const GROUPS: u32 = 0x10 | 0x100;

/// All addresses of all interfaces.
///
/// # Errors
/// When the kernel does not answer.
pub fn addresses() -> std::io::Result<Vec<IpAddr>> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut request = Vec::with_capacity(24);
    request.extend_from_slice(&24u32.to_ne_bytes());
    request.extend_from_slice(&RTM_GETADDR.to_ne_bytes());
    request.extend_from_slice(&REQUEST_DUMP.to_ne_bytes());
    request.extend_from_slice(&[0; 16]);
    socket.send(&request, 0)?;
    let mut found = Vec::new();
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        let mut rest = datagram.as_slice();
        while let Some((kind, body, next)) = message(rest) {
            match kind {
                RTM_NEWADDR => found.extend(address(body)),
                NLMSG_DONE | NLMSG_ERROR => {
                    found.sort_unstable();
                    found.dedup();
                    return Ok(found);
                }
                _ => {}
            }
            rest = next;
        }
    }
}

/// Waits until an address came or went; the first time only begins to listen, so that nothing is missed in between.
///
/// # Errors
/// When the kernel cannot be asked.
pub fn wait_for_change(socket: &mut Option<Socket>) -> std::io::Result<()> {
    if socket.is_none() {
        let mut fresh = Socket::new(NETLINK_ROUTE)?;
        fresh.bind(&SocketAddr::new(0, GROUPS))?;
        *socket = Some(fresh);
        return Ok(());
    }
    let Some(socket) = socket else { return Ok(()) };
    match socket.recv_from_full() {
        Ok(_) => Ok(()),
        // Notices were lost: something changed, that is all there is to know.
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::NOBUFS.raw_os_error()) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Splits the first message off: kind, body, rest.
fn message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let body = bytes.get(16..length)?;
    let next = length.next_multiple_of(4).min(bytes.len());
    Some((kind, body, &bytes[next..]))
}

/// The address in an `RTM_NEWADDR`.
fn address(body: &[u8]) -> Option<IpAddr> {
    let mut rest = body.get(8..)?;
    let (mut local, mut other) = (None, None);
    while let Some(header) = rest.get(..4) {
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let kind = u16::from_ne_bytes([header[2], header[3]]);
        let value = rest.get(4..length)?;
        let parsed = match value.len() {
            4 => <[u8; 4]>::try_from(value).ok().map(IpAddr::from),
            16 => <[u8; 16]>::try_from(value).ok().map(IpAddr::from),
            _ => None,
        };
        match kind {
            IFA_LOCAL => local = parsed,
            IFA_ADDRESS => other = parsed,
            _ => {}
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or(&[]);
    }
    local.or(other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_among_the_own_addresses_where_it_is_up() {
        let found = addresses().unwrap_or_default();
        let has_loopback = std::fs::read_to_string("/proc/net/fib_trie").is_ok_and(|text| text.contains("127.0.0.1"));
        assert_eq!(found.iter().any(|address| address.to_string() == "127.0.0.1"), has_loopback, "{found:?}");
    }
}
