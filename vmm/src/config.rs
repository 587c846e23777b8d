//! What a caller says about a microVM before it is built.

use std::path::PathBuf;

/// Size, kernel and command line of a microVM. Devices are given to the builder.
#[derive(Clone, Debug)]
pub struct MicrovmConfig {
    /// The KVM device node.
    pub kvm: PathBuf,
    /// Guest RAM in MiB.
    pub memory_mib: u32,
    /// vCPUs that the guest starts with.
    pub vcpus: u8,
    /// An ELF `vmlinux` or a `bzImage`.
    pub kernel: PathBuf,
    /// The initramfs, a cpio archive, compressed or not.
    pub initramfs: Option<PathBuf>,
    /// Appended to the kernel command line.
    pub cmdline: String,
}

impl Default for MicrovmConfig {
    fn default() -> Self {
        Self {
            kvm: "/dev/kvm".into(),
            memory_mib: 256,
            vcpus: 1,
            kernel: PathBuf::new(),
            initramfs: None,
            cmdline: String::new(),
        }
    }
}
