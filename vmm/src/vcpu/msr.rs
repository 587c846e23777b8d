//! Model-specific registers at the start.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use crate::kvm::{KvmError, ioctl};

const IA32_TSC: u32 = 0x10;
const IA32_MISC_ENABLE: u32 = 0x1a0;
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
/// Fast string operations.
const FAST_STRING: u64 = 1;
/// MTRRs on, all memory write-back.
const WRITE_BACK: u64 = 1 << 11 | 6;

/// Sets what differs from the state after reset: the kernel would otherwise take all memory as uncached.
pub fn set_up(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let entries = [entry(IA32_TSC, 0), entry(IA32_MISC_ENABLE, FAST_STRING), entry(IA32_MTRR_DEF_TYPE, WRITE_BACK)];
    let failed = |errno| ioctl("KVM_SET_MSRS")(kvm_ioctls::Error::new(errno));
    let msrs = Msrs::from_entries(&entries).map_err(|_| failed(libc::EINVAL))?;
    let done = vcpu.set_msrs(&msrs).map_err(ioctl("KVM_SET_MSRS"))?;
    if done == entries.len() { Ok(()) } else { Err(failed(libc::EIO)) }
}
