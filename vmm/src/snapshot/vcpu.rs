//! What KVM keeps per vCPU.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

use crate::kvm::{KvmError, ioctl};

/// The timer's deadline is only taken once the clock that it counts by is there.
const IA32_TSC_DEADLINE: u32 = 0x6e0;

/// All registers of a vCPU.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    cpuid: CpuId,
    msrs: Vec<kvm_msr_entry>,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
    tsc_khz: Option<u32>,
}

impl VcpuState {
    /// Reads it from a vCPU that stands still. The order is KVM's: mp_state first, as reading it settles pending INIT.
    pub(crate) fn save(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Self, KvmError> {
        let mp_state = vcpu.get_mp_state().map_err(ioctl("KVM_GET_MP_STATE"))?;
        Ok(Self {
            mp_state,
            regs: vcpu.get_regs().map_err(ioctl("KVM_GET_REGS"))?,
            sregs: vcpu.get_sregs().map_err(ioctl("KVM_GET_SREGS"))?,
            xsave: vcpu.get_xsave().map_err(ioctl("KVM_GET_XSAVE"))?,
            xcrs: vcpu.get_xcrs().map_err(ioctl("KVM_GET_XCRS"))?,
            debug: vcpu.get_debug_regs().map_err(ioctl("KVM_GET_DEBUGREGS"))?,
            lapic: vcpu.get_lapic().map_err(ioctl("KVM_GET_LAPIC"))?,
            msrs: read_msrs(kvm, vcpu)?,
            events: vcpu.get_vcpu_events().map_err(ioctl("KVM_GET_VCPU_EVENTS"))?,
            cpuid: vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(ioctl("KVM_GET_CPUID2"))?,
            // Not every host can tell; then the guest's counter runs at the new host's rate.
            tsc_khz: vcpu.get_tsc_khz().ok(),
        })
    }

    /// Puts it into a new vCPU.
    pub(crate) fn restore(&self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        vcpu.set_cpuid2(&self.cpuid).map_err(ioctl("KVM_SET_CPUID2"))?;
        if let Some(khz) = self.tsc_khz.filter(|khz| vcpu.get_tsc_khz().ok() != Some(*khz)) {
            vcpu.set_tsc_khz(khz).map_err(ioctl("KVM_SET_TSC_KHZ"))?;
        }
        vcpu.set_mp_state(self.mp_state).map_err(ioctl("KVM_SET_MP_STATE"))?;
        vcpu.set_regs(&self.regs).map_err(ioctl("KVM_SET_REGS"))?;
        vcpu.set_sregs(&self.sregs).map_err(ioctl("KVM_SET_SREGS"))?;
        // SAFETY: the guest has no feature whose state needs more than the 4096 bytes of kvm_xsave: KVM offers
        // those (AMX) only to processes that have asked for them by arch_prctl, which this one never does.
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(ioctl("KVM_SET_XSAVE"))?;
        vcpu.set_xcrs(&self.xcrs).map_err(ioctl("KVM_SET_XCRS"))?;
        vcpu.set_debug_regs(&self.debug).map_err(ioctl("KVM_SET_DEBUGREGS"))?;
        vcpu.set_lapic(&self.lapic).map_err(ioctl("KVM_SET_LAPIC"))?;
        self.write_msrs(vcpu)?;
        vcpu.set_vcpu_events(&self.events).map_err(ioctl("KVM_SET_VCPU_EVENTS"))
    }

    fn write_msrs(&self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        let (last, first): (Vec<kvm_msr_entry>, Vec<_>) =
            self.msrs.iter().copied().partition(|msr| msr.index == IA32_TSC_DEADLINE);
        for msr in first.into_iter().chain(last) {
            let one = Msrs::from_entries(&[msr]).map_err(|_| invalid("KVM_SET_MSRS"))?;
            // Some can be read and not written (they then hold what they held); none of those is the guest's.
            vcpu.set_msrs(&one).map_err(ioctl("KVM_SET_MSRS"))?;
        }
        Ok(())
    }
}

/// All MSRs that this KVM can save; those that this CPU does not have are left out.
fn read_msrs(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let list = kvm.get_msr_index_list().map_err(ioctl("KVM_GET_MSR_INDEX_LIST"))?;
    let mut saved = Vec::new();
    for index in list.as_slice() {
        let entry = kvm_msr_entry { index: *index, ..Default::default() };
        let mut one = Msrs::from_entries(&[entry]).map_err(|_| invalid("KVM_GET_MSRS"))?;
        if vcpu.get_msrs(&mut one).map_err(ioctl("KVM_GET_MSRS"))? == 1 {
            saved.extend_from_slice(one.as_slice());
        }
    }
    Ok(saved)
}

fn invalid(name: &'static str) -> KvmError {
    ioctl(name)(kvm_ioctls::Error::new(libc::EINVAL))
}
