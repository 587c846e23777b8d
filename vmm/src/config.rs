//! What a caller says about a microVM before it is built.

use std::path::PathBuf;

/// Size, kernel and command line of a microVM. Devices are given to the builder.
#[derive(Clone, Debug)]
pub struct MicrovmConfig {
    /// The KVM device node.
    pub kvm: PathBuf,
    /// Guest RAM in MiB.
    pub memory_mib: u32,
    /// Have the guest's first RAM in huge pages of 2 MiB that the host has set aside (hugetlbfs): as many as it takes, or the
    /// guest is not built. What is plugged in later is of ordinary pages, and so is a guest that is rebuilt from a snapshot.
    pub huge_pages: bool,
    /// vCPUs that the guest starts with.
    pub vcpus: u8,
    /// vCPUs that it may have while it runs, those among them: see `Microvm::add_vcpus`. A smaller number means no more.
    pub max_vcpus: u8,
    /// An ELF `vmlinux` or a `bzImage`.
    pub kernel: PathBuf,
    /// The initramfs, a cpio archive, compressed or not.
    pub initramfs: Option<PathBuf>,
    /// Appended to the kernel command line.
    pub cmdline: String,
}

impl MicrovmConfig {
    /// vCPUs that the guest may have.
    pub(crate) fn possible_vcpus(&self) -> u8 {
        self.max_vcpus.max(self.vcpus)
    }
}

impl Default for MicrovmConfig {
    fn default() -> Self {
        Self {
            kvm: "/dev/kvm".into(),
            memory_mib: 256,
            huge_pages: false,
            vcpus: 1,
            max_vcpus: 1,
            kernel: PathBuf::new(),
            initramfs: None,
            cmdline: String::new(),
        }
    }
}
