//! The host's side of a network device.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use super::layout::HEADER;
use super::offloads::Offloads;

// From <linux/if_tun.h>.
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNSETQUEUE: libc::c_ulong = 0x4004_54d9;
const IFF_TAP: u16 = 0x0002;
const IFF_MULTI_QUEUE: u16 = 0x0100;
const IFF_ATTACH_QUEUE: i16 = 0x0200;
const IFF_DETACH_QUEUE: i16 = 0x0400;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;

/// Where packets go to and come from, each with a `struct virtio_net_hdr_v1` in front. Nothing blocks; the descriptor is
/// ready when it is worth another try. Several threads may write at once.
pub trait Backend: AsFd + Send + Sync {
    /// Sets what may be left undone in packets that are read. What the backend cannot leave undone, it does.
    ///
    /// # Errors
    /// When it cannot be set; nothing is left undone then.
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()>;

    /// Whether packets for the guest may come by this descriptor, where it is one of several of the same interface.
    /// The only one is never switched off.
    ///
    /// # Errors
    /// When it cannot be set.
    fn set_queue(&self, _on: bool) -> io::Result<()> {
        Ok(())
    }

    /// Reads one packet into memory; its length, 0 at the end of all packets. One that is longer than the memory is cut
    /// off, and its length then is more than that. By itself a readv(2) of the descriptor.
    ///
    /// # Errors
    /// `WouldBlock` when there is none now; any other.
    ///
    /// # Safety
    /// The vectors, at most `UIO_MAXIOV`, describe memory that may be written to.
    unsafe fn read(&self, into: &[libc::iovec]) -> io::Result<usize> {
        let count = i32::try_from(into.len()).unwrap_or(libc::UIO_MAXIOV);
        // SAFETY: the descriptor is open; the rest is the caller's promise.
        length(unsafe { libc::readv(self.as_fd().as_raw_fd(), into.as_ptr(), count) })
    }

    /// Sends one packet from memory, or drops it. By itself a writev(2) of the descriptor.
    ///
    /// # Errors
    /// `WouldBlock` when there is no room for it now; any other.
    ///
    /// # Safety
    /// The vectors, at most `UIO_MAXIOV`, describe memory that may be read, whatever else changes it meanwhile.
    unsafe fn write(&self, from: &[libc::iovec]) -> io::Result<()> {
        let count = i32::try_from(from.len()).unwrap_or(libc::UIO_MAXIOV);
        // SAFETY: the descriptor is open; the rest is the caller's promise.
        length(unsafe { libc::writev(self.as_fd().as_raw_fd(), from.as_ptr(), count) }).map(drop)
    }

    /// Sends what is left of packets that were sent in part. Called when the descriptor is ready.
    ///
    /// # Errors
    /// Any but `WouldBlock`.
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether an error means that a backend will never work again: its interface was deleted, or its other end is gone.
pub(super) fn is_lost(error: &io::Error) -> bool {
    const GONE: [i32; 5] = [libc::EBADFD, libc::ENODEV, libc::EPIPE, libc::ECONNRESET, libc::EPROTO];
    error.raw_os_error().is_some_and(|number| GONE.contains(&number))
}

fn length(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Why a descriptor cannot be the tap of a device.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// Not a tun/tap descriptor that is bound to an interface.
    #[error("the descriptor is no tap interface's: {0}")]
    NoTap(io::Error),
    /// Bound with other flags.
    #[error("the tap must have been made with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, not {0:#x}")]
    Flags(u16),
    /// An ioctl or fcntl failed.
    #[error("cannot set up the tap: {0}")]
    SetUp(io::Error),
}

/// A queue of a tap interface of the host.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    /// It may be one of several.
    is_one_of_many: bool,
    /// As `set_queue` has set it.
    is_on: AtomicBool,
}

impl Tap {
    /// Takes over an open tap, made with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, and `IFF_MULTI_QUEUE` if it has several
    /// queues; takes no privileges.
    ///
    /// # Errors
    /// Any [`TapError`].
    pub fn new(fd: OwnedFd) -> Result<Self, TapError> {
        // SAFETY: an all-zero ifreq is a valid value of it: plain integers and byte arrays.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // SAFETY: TUNGETIFF writes one ifreq, for which there is room.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), TUNGETIFF, &raw mut request) }).map_err(TapError::NoTap)?;
        // SAFETY: TUNGETIFF has set the flags, of the union's fields.
        let flags = unsafe { request.ifr_ifru.ifru_flags }.cast_unsigned();
        let needed = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
        if flags & needed != needed {
            return Err(TapError::Flags(flags));
        }
        let length = HEADER as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one int.
        let sized = check(unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETVNETHDRSZ, &raw const length) });
        sized.and_then(|()| Ok(rustix::io::ioctl_fionbio(&fd, true)?)).map_err(TapError::SetUp)?;
        let is_one_of_many = flags & IFF_MULTI_QUEUE != 0;
        // What a queue was left switched off by cannot be told: only that it is on makes TUNGETIFF work.
        Ok(Self { fd, is_one_of_many, is_on: AtomicBool::new(true) })
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Backend for Tap {
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        // SAFETY: TUNSETOFFLOAD takes a number.
        let set =
            |offloads: Offloads| check(unsafe { libc::ioctl(self.fd.as_raw_fd(), TUNSETOFFLOAD, offloads.bits()) });
        match set(offloads) {
            // A kernel without UDP segmentation.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                set(offloads - Offloads::USO4 - Offloads::USO6).map_err(|_| error)
            }
            done => done,
        }
    }

    fn set_queue(&self, on: bool) -> io::Result<()> {
        // The kernel refuses what is so already.
        if !self.is_one_of_many || self.is_on.load(Ordering::Acquire) == on {
            return Ok(());
        }
        // SAFETY: an all-zero ifreq is a valid value of it: plain integers and byte arrays.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        request.ifr_ifru.ifru_flags = if on { IFF_ATTACH_QUEUE } else { IFF_DETACH_QUEUE };
        // SAFETY: TUNSETQUEUE reads one ifreq.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), TUNSETQUEUE, &raw const request) })?;
        self.is_on.store(on, Ordering::Release);
        Ok(())
    }
}

impl Drop for Tap {
    /// Leaves the queue as it was found: its descriptor may have duplicates, for a device that is restored.
    fn drop(&mut self) {
        // It fails for an interface that is gone, which no duplicate has any use for.
        let _ = self.set_queue(true);
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_bound_tap_is_one() {
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(Tap::new(null.into()), Err(TapError::NoTap(_))));
    }
}
