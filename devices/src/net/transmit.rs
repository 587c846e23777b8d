//! Guest to host.

use std::io;
use std::os::fd::AsRawFd;

use log::debug;

use super::backend::Backend;
use super::device::Net;
use super::layout::{PACKET_MAX, PACKET_MIN, TURN, TX};
use crate::virtio::queue::Buffers;

/// What became of a packet.
enum Sent {
    /// It is out, or dropped.
    Done,
    /// There is no room for it now. An event tells when there is.
    Later,
    /// The backend is gone.
    Lost(io::Error),
}

impl Net {
    /// Sends what the guest has for the host; true when there may be more after this turn.
    pub(super) fn transmit(&mut self) -> bool {
        let Some(memory) = self.queues.memory() else { return false };
        let mut used = false;
        let mut more = true;
        self.queues.disable_kicks(TX);
        for _ in 0..TURN {
            let Some(chain) = self.queues.pop(TX) else {
                if self.queues.enable_kicks(TX) {
                    continue;
                }
                more = false;
                break;
            };
            match send(self.link.backend(), &chain.reader(&memory)) {
                Sent::Done => {}
                Sent::Later => {
                    self.queues.undo_pop(TX);
                    more = false;
                    break;
                }
                Sent::Lost(error) => self.lose(&error),
            }
            self.queues.add_used(TX, chain.head(), 0);
            used = true;
        }
        if used {
            self.queues.notify(TX);
        }
        more && self.queues.is_active()
    }
}

/// Writes one packet straight from guest memory.
fn send(backend: Option<&dyn Backend>, packet: &Buffers<'_>) -> Sent {
    let len = packet.remaining();
    let vectors = packet.iovecs(len);
    let reachable: usize = vectors.iter().map(|vector| vector.iov_len).sum();
    if !(PACKET_MIN..=PACKET_MAX).contains(&len) || reachable != len {
        debug!("a packet of {len} bytes with its header, in {} pieces, is dropped", vectors.len());
        return Sent::Done;
    }
    let Some(backend) = backend else { return Sent::Done };
    let count = i32::try_from(vectors.len()).unwrap_or(libc::UIO_MAXIOV);
    loop {
        // SAFETY: the descriptor is open, and the vectors describe guest memory that stays mapped while `packet`
        // lives. The kernel only reads it, once; the guest may change it meanwhile, and gets what it asked for.
        let sent = unsafe { libc::writev(backend.as_fd().as_raw_fd(), vectors.as_ptr(), count) };
        if sent >= 0 {
            return Sent::Done;
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINTR) => {}
            Some(libc::EAGAIN) => return Sent::Later,
            // The interface was deleted; or a socket's other end.
            Some(libc::EBADFD | libc::ENODEV | libc::EPIPE) => return Sent::Lost(error),
            // A header that makes no sense, an interface that is down, no memory: as on any wire, the packet is lost.
            _ => {
                debug!("a packet of {len} bytes is dropped: {error}");
                return Sent::Done;
            }
        }
    }
}
