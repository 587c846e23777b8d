//! Creating the virtual machine, its memory slots and its interrupt controllers, in the order that costs least.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use katavm_devices::memory::GuestMemory;
use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vm_memory::{Address as _, GuestMemory as _, GuestMemoryRegion as _};

use crate::layout::{IDENTITY_MAP, TSS};

/// Why KVM does not give a virtual machine.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// The device node is not there.
    #[error(
        "{0} does not exist: load the kvm_intel or kvm_amd module, and see that virtualization is on in the firmware (or, in a virtual machine, nested virtualization)"
    )]
    Missing(PathBuf),
    /// The device node may not be opened.
    #[error("no permission to open {0}: become a member of the group that owns it (usually kvm), or run as root")]
    Permission(PathBuf),
    /// The device node cannot be opened for another reason.
    #[error("{path} cannot be used as KVM device: {error}")]
    Open {
        /// The device node.
        path: PathBuf,
        /// What open(2) or KVM_GET_API_VERSION said.
        error: io::Error,
    },
    /// Something else has the device node's name.
    #[error(
        "{0} is not the KVM device: `ls -l {0}` should show a character device with the numbers 10, 232; see what was mounted or made in its place"
    )]
    NotKvm(PathBuf),
    /// The host's KVM is too old.
    #[error("this host's KVM lacks {0}: katavm needs Linux 5.10 or newer")]
    Capability(&'static str),
    /// An ioctl failed.
    #[error("{ioctl} failed: {error}")]
    Ioctl {
        /// Its name.
        ioctl: &'static str,
        /// Its errno.
        error: kvm_ioctls::Error,
    },
}

/// Names the ioctl of a failed call.
pub fn ioctl(ioctl: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
    move |error| KvmError::Ioctl { ioctl, error }
}

/// Opens the KVM device and looks whether it has what every guest needs.
///
/// # Errors
/// All but [`KvmError::Ioctl`].
pub fn open(path: &Path) -> Result<Kvm, KvmError> {
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => KvmError::Missing(path.into()),
        io::ErrorKind::PermissionDenied => KvmError::Permission(path.into()),
        _ => KvmError::Open { path: path.into(), error },
    };
    let name = CString::new(path.as_os_str().as_bytes()).map_err(|error| failed(error.into()))?;
    let kvm = Kvm::new_with_path(name).map_err(|error| failed(error.into()))?;
    match kvm.get_api_version() {
        // KVM's, unchanged since Linux 2.6.22.
        12 => {}
        // The ioctl is unknown to it.
        ..0 => return Err(KvmError::NotKvm(path.into())),
        other => return Err(failed(io::Error::other(format!("it speaks KVM API version {other}, not 12")))),
    }
    let needed = [
        (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
        (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
        (Cap::Irqfd, "KVM_CAP_IRQFD"),
        (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
        (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
        (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
        (Cap::Pit2, "KVM_CAP_PIT2"),
    ];
    match needed.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        Some((_, name)) => Err(KvmError::Capability(name)),
        None => Ok(kvm),
    }
}

/// Gives the guest's RAM to the virtual machine: one slot per region that is there, before any irqchip or ioeventfd
/// exists, because a slot that is set after them waits for a grace period of KVM's SRCU (milliseconds).
///
/// # Errors
/// When KVM_SET_USER_MEMORY_REGION fails.
pub fn set_memory(vm: &VmFd, memory: &GuestMemory) -> Result<(), KvmError> {
    for (slot, region) in (0..).zip(memory.iter().filter(|region| region.granted() > 0)) {
        let slot = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.granted(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the range is a mapping of `memory`, which the microVM keeps as long as the VM lives.
        unsafe { vm.set_user_memory_region(slot) }.map_err(ioctl("KVM_SET_USER_MEMORY_REGION"))?;
    }
    Ok(())
}

/// Makes the in-kernel PIC, I/O APIC, local APICs and timer. VMX' own pages must be placed first.
///
/// # Errors
/// When one of the ioctls fails.
pub fn create_irqchip(vm: &VmFd) -> Result<(), KvmError> {
    vm.set_identity_map_address(IDENTITY_MAP).map_err(ioctl("KVM_SET_IDENTITY_MAP_ADDR"))?;
    vm.set_tss_address(TSS).map_err(ioctl("KVM_SET_TSS_ADDR"))?;
    vm.create_irq_chip().map_err(ioctl("KVM_CREATE_IRQCHIP"))?;
    // The dummy speaker keeps port 0x61, which the kernel reads when it calibrates, inside KVM.
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(ioctl("KVM_CREATE_PIT2"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_not_kvm_is_told_from_one_that_is_not_there() {
        let error = |path: &str| open(Path::new(path)).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(error("/dev/null").starts_with("/dev/null is not the KVM device"), "{}", error("/dev/null"));
        assert!(error("/dev/no-kvm").starts_with("/dev/no-kvm does not exist"), "{}", error("/dev/no-kvm"));
    }
}
