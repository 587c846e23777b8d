//! Two virtual machines that never run. As long as they are there, KVM leaves its own text alone.
//!
//! What KVM asks before each entry, whether a vCPU's local APIC is there and switched on, it asks by branches that it patches
//! (static keys): for as long as one vCPU on the machine has none, or one that is off as after a reset, they ask, otherwise
//! they are no-ops. So each boot of a guest has the text changed twice under the other CPU's feet, and that is where the
//! emulator's flaw of a stray INT3 (docs/lab.md) strikes. One vCPU of each kind that stays has nothing to be patched.

use anyhow::{Context, Result};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

/// What is kept open.
pub struct Still {
    _vcpus: [(VcpuFd, VmFd); 2],
}

/// Makes both machines, unless there is no other CPU to be disturbed.
///
/// # Errors
/// When KVM refuses one.
pub fn keep() -> Result<Option<Still>> {
    if std::thread::available_parallelism()?.get() == 1 {
        return Ok(None);
    }
    let kvm = Kvm::new().context("cannot open /dev/kvm")?;
    let without_apic = kvm.create_vm().context("KVM_CREATE_VM")?;
    let with_apic = kvm.create_vm().context("KVM_CREATE_VM")?;
    with_apic.create_irq_chip().context("KVM_CREATE_IRQCHIP")?;
    let vcpu = |vm: VmFd| -> Result<_> { Ok((vm.create_vcpu(0).context("KVM_CREATE_VCPU")?, vm)) };
    Ok(Some(Still { _vcpus: [vcpu(without_apic)?, vcpu(with_apic)?] }))
}
