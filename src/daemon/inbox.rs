//! A queue somebody can sleep on together with files and sockets: values go in from any thread, the owner is woken through a descriptor.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use rustix::event::{EventfdFlags, eventfd};

/// Values that may wait in one inbox; beyond it the sender waits, too.
const QUEUE_MAX: usize = 16_384;

/// The owner's end.
#[derive(Debug)]
pub struct Inbox<T> {
    receive: Receiver<T>,
    bell: Arc<OwnedFd>,
}

/// Where values are put in.
#[derive(Debug)]
pub struct Slot<T> {
    send: SyncSender<T>,
    bell: Arc<OwnedFd>,
}

impl<T> Clone for Slot<T> {
    fn clone(&self) -> Self {
        Self { send: self.send.clone(), bell: Arc::clone(&self.bell) }
    }
}

/// Makes a queue.
///
/// # Errors
/// When the system has no descriptor left.
pub fn inbox<T>() -> std::io::Result<(Slot<T>, Inbox<T>)> {
    let bell = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?);
    let (send, receive) = sync_channel(QUEUE_MAX);
    Ok((Slot { send, bell: Arc::clone(&bell) }, Inbox { receive, bell }))
}

impl<T> Slot<T> {
    /// Puts a value in, waiting while the queue is full; false if its owner is gone.
    pub fn put(&self, value: T) -> bool {
        let sent = match self.send.try_send(value) {
            Ok(()) => true,
            Err(TrySendError::Full(value)) => {
                self.ring();
                self.send.send(value).is_ok()
            }
            Err(TrySendError::Disconnected(_)) => false,
        };
        self.ring();
        sent
    }

    fn ring(&self) {
        // The counter can only be full if the owner was rung already.
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }
}

impl<T> Inbox<T> {
    /// Stops the bell; what was put in before is found by `take` after this.
    pub fn heard(&self) {
        let mut count = [0u8; 8];
        let _ = rustix::io::read(&self.bell, &mut count);
    }

    /// The next value, if there is one.
    pub fn take(&self) -> Option<T> {
        self.receive.try_recv().ok()
    }
}

impl<T> AsFd for Inbox<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}
