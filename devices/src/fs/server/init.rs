//! INIT and DESTROY: what is agreed with the guest's driver.

use log::info;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::Server;
use super::request::{Request, put};
use super::wire::{self, InitFlags, InitIn, InitInExt, InitOut};
use crate::virtio::queue::Buffers;

/// Largest READ and WRITE in bytes.
pub const MAX_WRITE: u32 = 1 << 20;
const PAGE_SIZE: u32 = 4096;

/// What the server offers. Left out on purpose (`docs/virtiofs.md` says why): the writeback cache, remote
/// locks, open-less files, lookups of "." and "..", security contexts, DAX.
const OFFERED: InitFlags = InitFlags::all();

/// What was agreed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Session {
    /// Minor version of the protocol.
    pub minor: u32,
    /// `FUSE_*` flags, 64 bits.
    flags: u64,
}

impl Session {
    /// Whether all of `flags` were agreed.
    pub fn has(&self, flags: InitFlags) -> bool {
        InitFlags::from_bits_retain(self.flags).contains(flags)
    }
}

impl Server {
    pub(super) fn init(&self, request: &mut Request<'_>, out: &mut Buffers<'_>) -> Result<(), Errno> {
        let init: InitIn = request.read()?;
        if init.major > wire::KERNEL_VERSION {
            // The driver is to come back with a version that both know.
            return put(
                out,
                &InitOut { major: wire::KERNEL_VERSION, minor: wire::KERNEL_MINOR_VERSION, ..InitOut::default() },
            );
        }
        if init.major < wire::KERNEL_VERSION || init.minor < wire::OLDEST_MINOR_VERSION {
            return Err(Errno::PROTO);
        }
        let mut theirs = u64::from(init.flags);
        if InitFlags::from_bits_retain(theirs).contains(InitFlags::INIT_EXT) {
            theirs |= u64::from(request.read::<InitInExt>()?.flags2) << 32;
        }
        let flags = InitFlags::from_bits_truncate(theirs) & OFFERED;
        let session = Session { minor: init.minor.min(wire::KERNEL_MINOR_VERSION), flags: flags.bits() };
        let mut current = self.session.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if current.is_some() {
            // A mount ends with DESTROY or a device reset; until then its nodes are in use.
            return Err(Errno::INVAL);
        }
        *current = Some(session);
        drop(current);
        info!("virtio-fs: protocol 7.{}, flags {flags:?}", session.minor);
        put(out, &reply(&init, session))
    }

    pub(super) fn destroy(&self, _request: &mut Request<'_>, _out: &mut Buffers<'_>) -> Result<(), Errno> {
        self.reset();
        Ok(())
    }
}

fn reply(init: &InitIn, session: Session) -> InitOut {
    InitOut {
        major: wire::KERNEL_VERSION,
        minor: session.minor,
        max_readahead: init.max_readahead,
        // The two halves of the 64 flags.
        flags: (session.flags & u64::from(u32::MAX)) as u32,
        flags2: (session.flags >> 32) as u32,
        max_background: 128,
        congestion_threshold: 96,
        max_write: MAX_WRITE,
        time_gran: 1,
        max_pages: (MAX_WRITE / PAGE_SIZE) as u16,
        ..InitOut::default()
    }
}
