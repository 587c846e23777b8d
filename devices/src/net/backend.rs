//! The host's side of a network device.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use super::layout::HEADER;
use super::offloads::Offloads;

// From <linux/if_tun.h>.
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;

/// Where packets go to and come from: a descriptor that moves one packet per readv(2) or writev(2), does not
/// block, and has a `struct virtio_net_hdr_v1` in front of each.
pub trait Backend: AsFd + Send {
    /// Sets what may be left undone in packets that are read. What the backend cannot leave undone, it does.
    ///
    /// # Errors
    /// When it cannot be set; nothing is left undone then.
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()>;
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

/// A tap interface of the host.
#[derive(Debug)]
pub struct Tap(OwnedFd);

impl Tap {
    /// Takes over an open tap, made with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`; takes no privileges.
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
        Ok(Self(fd))
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Backend for Tap {
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        // SAFETY: TUNSETOFFLOAD takes a number.
        let set =
            |offloads: Offloads| check(unsafe { libc::ioctl(self.0.as_raw_fd(), TUNSETOFFLOAD, offloads.bits()) });
        match set(offloads) {
            // A kernel without UDP segmentation.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                set(offloads - Offloads::USO4 - Offloads::USO6).map_err(|_| error)
            }
            done => done,
        }
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
