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

/// Puts a vCPU into the state after its reset: all but the first, which is to [`boot`], wait for a startup IPI.
pub fn set_up(vcpu: &VcpuFd, cpuid: &CpuId) -> Result<(), KvmError> {
    vcpu.set_cpuid2(cpuid).map_err(ioctl("KVM_SET_CPUID2"))?;
    msr::set_up(vcpu)?;
    lapic::set_up(vcpu)
}

/// Puts the first vCPU into the state in which the boot protocol starts it.
pub fn boot(vcpu: &VcpuFd, entry: GuestAddress) -> Result<(), KvmError> {
    registers::set_up(vcpu, entry)
}

pub use registers::write_tables;
