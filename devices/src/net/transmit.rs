//! Guest to host.

use std::io;

use log::debug;

use super::backend::{Backend, is_lost};
use super::layout::{HEADER, PACKET_MAX, PACKET_MIN, TURN, TX};
use super::pair::Pair;

/// What became of a packet.
enum Sent {
    /// It is out, or dropped.
    Done,
    /// There is no room for it now. An event tells when there is.
    Later,
    /// The backend is gone.
    Lost(io::Error),
}

impl Pair {
    /// Sends what the guest has for the host; true when there may be more after this turn.
    pub(super) fn transmit(&mut self) -> bool {
        let Some(memory) = self.queues.memory() else { return false };
        if let Some(Err(error)) = self.port.backend().map(Backend::flush) {
            self.lose(error);
        }
        let mut used = false;
        let mut more = true;
        let mut vectors = Vec::new();
        self.queues.disable_kicks(TX);
        for _ in 0..TURN {
            let Some(chain) = self.queues.pop(TX) else {
                if self.queues.enable_kicks(TX) {
                    continue;
                }
                more = false;
                break;
            };
            let len = chain.readable_len();
            if !self.may_send(len.saturating_sub(HEADER)) {
                self.queues.undo_pop(TX);
                more = false;
                break;
            }
            vectors.clear();
            chain.extend_readable(&memory, &mut vectors);
            match send(self.port.backend(), &vectors, len) {
                Sent::Done => {}
                Sent::Later => {
                    self.queues.undo_pop(TX);
                    more = false;
                    break;
                }
                Sent::Lost(error) => self.lose(error),
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

/// Writes one packet of `len` bytes straight from guest memory.
fn send(backend: Option<&dyn Backend>, vectors: &[libc::iovec], len: usize) -> Sent {
    if !(PACKET_MIN..=PACKET_MAX).contains(&len) || vectors.len() > libc::UIO_MAXIOV as usize {
        debug!("a packet of {len} bytes with its header, in {} pieces, is dropped", vectors.len());
        return Sent::Done;
    }
    let Some(backend) = backend else { return Sent::Done };
    loop {
        // SAFETY: the vectors describe guest memory, which stays mapped while its queue is active. It is only read; the
        // guest may change it meanwhile, and gets what it asked for.
        let Err(error) = (unsafe { backend.write(vectors) }) else { return Sent::Done };
        match error.kind() {
            io::ErrorKind::Interrupted => {}
            io::ErrorKind::WouldBlock => return Sent::Later,
            _ if is_lost(&error) => return Sent::Lost(error),
            // A header that makes no sense, an interface that is down, no memory: as on any wire, the packet is lost.
            _ => {
                debug!("a packet of {len} bytes is dropped: {error}");
                return Sent::Done;
            }
        }
    }
}
