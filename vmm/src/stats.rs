//! KVM's own counters, from its binary statistics (KVM_GET_STATS_FD, Linux 5.14).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

/// `_IO(KVMIO, 0xce)`.
const KVM_GET_STATS_FD: libc::c_ulong = 0xaece;
/// Sizes of `struct kvm_stats_header` and of `struct kvm_stats_desc` without its name, in bytes.
const HEADER: usize = 24;
const DESCRIPTOR: usize = 16;

/// The counters of one vCPU.
pub struct VcpuStats {
    file: File,
    exits_at: u64,
}

impl VcpuStats {
    /// Opens the counters of `vcpu`.
    ///
    /// # Errors
    /// When the host's KVM has none, or none of the name `exits`.
    pub fn open(vcpu: &impl AsRawFd) -> io::Result<Self> {
        // SAFETY: the ioctl takes no argument and returns a new file descriptor or -1.
        let fd = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_STATS_FD) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        let file = unsafe { File::from_raw_fd(fd) };
        let exits_at = find(&file, b"exits")?;
        Ok(Self { file, exits_at })
    }

    /// How often the vCPU left the guest, for whatever reason.
    ///
    /// # Errors
    /// When the counters cannot be read.
    pub fn exits(&self) -> io::Result<u64> {
        let mut value = [0; 8];
        self.file.read_exact_at(&mut value, self.exits_at)?;
        Ok(u64::from_le_bytes(value))
    }
}

/// The file offset of the counter `name`.
fn find(file: &File, name: &[u8]) -> io::Result<u64> {
    let mut header = [0; HEADER];
    file.read_exact_at(&mut header, 0)?;
    let field = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let (name_size, count, descriptors, data) = (field(4) as usize, field(8), field(16), field(20));
    let mut descriptor = vec![0; DESCRIPTOR + name_size];
    let stride = descriptor.len() as u64;
    for index in 0..u64::from(count) {
        file.read_exact_at(&mut descriptor, u64::from(descriptors) + index * stride)?;
        let (fixed, stat) = descriptor.split_at(DESCRIPTOR);
        if stat.split(|byte| *byte == 0).next() == Some(name) {
            let offset = u32::from_le_bytes([fixed[8], fixed[9], fixed[10], fixed[11]]);
            return Ok(u64::from(data) + u64::from(offset));
        }
    }
    Err(io::ErrorKind::NotFound.into())
}
