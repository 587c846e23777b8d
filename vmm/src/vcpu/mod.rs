//! Virtual CPUs: set-up, and the thread that each runs on.

pub mod cpuid;
mod kick;
mod lapic;
mod msr;
mod registers;
mod thread;

use kvm_bindings::CpuId;
use kvm_ioctls::VcpuFd;
use vm_memory::GuestAddress;

use crate::kvm::{KvmError, ioctl};

pub use thread::{Environment, VcpuThread};

/// Puts a vCPU into the state in which the boot protocol starts it; all but the first wait for a startup IPI.
pub fn set_up(vcpu: &VcpuFd, index: u8, cpuid: &CpuId, entry: GuestAddress) -> Result<(), KvmError> {
    vcpu.set_cpuid2(cpuid).map_err(ioctl("KVM_SET_CPUID2"))?;
    msr::set_up(vcpu)?;
    lapic::set_up(vcpu)?;
    if index == 0 {
        registers::set_up(vcpu, entry)?;
    }
    Ok(())
}

pub use registers::write_tables;
