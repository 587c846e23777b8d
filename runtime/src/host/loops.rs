//! Loop devices: files as block devices (loop(4)).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

use linux_raw_sys::loop_device::{LO_FLAGS_AUTOCLEAR, LO_FLAGS_READ_ONLY, loop_config};
use nix::errno::Errno;

use super::files::open_disk;

const CONTROL: &str = "/dev/loop-control";
// From <linux/loop.h>.
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4c82;
const LOOP_CONFIGURE: libc::c_ulong = 0x4c0a;
/// How often a device that somebody else has taken meanwhile is given up for another.
const TRIES: u32 = 64;

/// A device over a file. It is there as long as this, or a mount of it, is.
pub struct Loop {
    path: PathBuf,
    _device: File,
}

impl Loop {
    /// Makes one. The file's lock lasts as long as the device: meanwhile it is no disk of a guest, unless both only read.
    ///
    /// # Errors
    /// Those of [`open_disk`] and of LOOP_CONFIGURE.
    pub fn over(file: &Path, read_only: bool) -> io::Result<Self> {
        let open = |path: &Path| OpenOptions::new().read(true).write(!read_only).open(path);
        let file = open_disk(file, read_only)?;
        let control = OpenOptions::new().read(true).write(true).open(CONTROL)?;
        // SAFETY: an all-zero loop_config is a valid value of it: plain integers and arrays of them.
        let mut config: loop_config = unsafe { std::mem::zeroed() };
        config.fd = file.as_raw_fd().cast_unsigned();
        config.info.lo_flags = LO_FLAGS_AUTOCLEAR as u32 | if read_only { LO_FLAGS_READ_ONLY as u32 } else { 0 };
        for _ in 0..TRIES {
            // SAFETY: LOOP_CTL_GET_FREE takes no argument.
            let number = Errno::result(unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) })?;
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let device = open(&path)?;
            // SAFETY: LOOP_CONFIGURE reads one loop_config, which outlives the call.
            match Errno::result(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) }) {
                Ok(_) => return Ok(Self { path, _device: device }),
                Err(Errno::EBUSY) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(Errno::EBUSY.into())
    }

    /// Its node.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}
