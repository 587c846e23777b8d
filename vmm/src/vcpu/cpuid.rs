//! What the guest is told about its CPUs: what KVM supports, less what a container's kernel must not see.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use crate::kvm::{KvmError, ioctl};

/// Leaf 1, ecx.
const VMX: u32 = 1 << 5;
const PDCM: u32 = 1 << 15;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, edx: hyper-threading, that is: leaf 1 holds a count of logical CPUs.
const HTT: u32 = 1 << 28;
/// Leaf 0x8000_0001, ecx.
const SVM: u32 = 1 << 2;
const PERF_CTR: u32 = 1 << 23 | 1 << 24 | 1 << 28;

/// The CPUID tables of all vCPUs of a machine.
pub struct Cpuid(CpuId);

impl Cpuid {
    /// What this host's KVM supports.
    pub fn supported(kvm: &Kvm) -> Result<Self, KvmError> {
        let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(ioctl("KVM_GET_SUPPORTED_CPUID"))?;
        let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        cpuid.as_mut_slice().iter_mut().for_each(|entry| hide(entry, deadline));
        Ok(Self(cpuid))
    }

    /// The table of vCPU `index` out of `count`, each of which is a core of one socket.
    pub fn of(&self, index: u8, count: u8) -> CpuId {
        let mut cpuid = self.0.clone();
        cpuid.as_mut_slice().iter_mut().for_each(|entry| place(entry, index, count));
        cpuid
    }
}

/// No virtualization inside the guest, and no performance counters: both are attack surface, and the latter a side channel.
fn hide(entry: &mut kvm_cpuid_entry2, deadline: bool) {
    match entry.function {
        1 => {
            entry.ecx &= !(VMX | PDCM);
            entry.ecx |= HYPERVISOR | if deadline { TSC_DEADLINE } else { 0 };
        }
        // PMU of Intel and AMD; nested SVM.
        0xa | 0x8000_000a | 0x8000_0022 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        0x8000_0001 => entry.ecx &= !(SVM | PERF_CTR),
        _ => {}
    }
}

/// Leaves that say which CPU this is and how many there are.
fn place(entry: &mut kvm_cpuid_entry2, index: u8, count: u8) {
    let width = u32::from(count).next_power_of_two().trailing_zeros();
    match entry.function {
        1 => {
            let others = if count > 1 { HTT } else { 0 };
            entry.ebx = entry.ebx & 0xffff | u32::from(count) << 16 | u32::from(index) << 24;
            entry.edx = entry.edx & !HTT | others;
        }
        // Deterministic cache parameters: cores of the package in eax 31:26; caches below level 3 are a core's own.
        4 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { u32::from(count) - 1 } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing << 14 | (u32::from(count) - 1) << 26;
        }
        // Extended topology: level 0 threads (one per core), level 1 cores.
        0xb | 0x1f => {
            entry.edx = index.into();
            match entry.index {
                0 => (entry.eax, entry.ebx, entry.ecx) = (0, 1, 0x100),
                1 => (entry.eax, entry.ebx, entry.ecx) = (width, count.into(), 0x201),
                other => (entry.eax, entry.ebx, entry.ecx) = (0, 0, other),
            }
        }
        // AMD: number of cores and width of the core's part in the APIC identifier.
        0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | u32::from(count - 1) | width << 12,
        // AMD: cache sharing as in leaf 4.
        0x8000_001d => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { u32::from(count) - 1 } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing << 14;
        }
        // AMD: extended APIC identifier, one thread per core, one node.
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (index.into(), index.into(), 0),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virtualization_and_counters_are_hidden() {
        let all = kvm_cpuid_entry2 { eax: !0, ebx: !0, ecx: !0, edx: !0, ..Default::default() };
        let mut leaf = kvm_cpuid_entry2 { function: 1, ..all };
        hide(&mut leaf, true);
        assert_eq!(leaf.ecx & (VMX | PDCM), 0);
        assert_ne!(leaf.ecx & HYPERVISOR, 0);
        let mut leaf = kvm_cpuid_entry2 { function: 0x8000_0001, ..all };
        hide(&mut leaf, true);
        assert_eq!(leaf.ecx & SVM, 0);
        let mut leaf = kvm_cpuid_entry2 { function: 0xa, ..all };
        hide(&mut leaf, true);
        assert_eq!(leaf.eax, 0);
    }

    #[test]
    fn each_cpu_learns_its_number() {
        let mut leaf = kvm_cpuid_entry2 { function: 1, ..Default::default() };
        place(&mut leaf, 3, 4);
        assert_eq!(leaf.ebx >> 24, 3);
        assert_eq!(leaf.ebx >> 16 & 0xff, 4);
        assert_ne!(leaf.edx & HTT, 0);
    }
}
