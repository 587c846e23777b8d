//! Memory slots for what a guest plugs in.

use std::io;
use std::sync::Arc;

use katavm_devices::mem::{Backing, SLOT};
use katavm_devices::memory::{GuestMemory, GuestRegion};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{GuestMemory as _, GuestMemoryRegion as _};

/// The last region of a machine's memory, which comes and goes in slots of KVM.
pub struct Growing {
    vm: Arc<VmFd>,
    memory: GuestMemory,
    /// How many slots there are.
    slots: u64,
}

impl Growing {
    pub fn new(vm: Arc<VmFd>, memory: GuestMemory) -> Self {
        Self { vm, memory, slots: 0 }
    }

    /// Makes slot `index` of the region `len` bytes long; 0 takes it away (KVM_SET_USER_MEMORY_REGION).
    fn set_slot(&self, region: &GuestRegion, index: u64, len: u64) -> io::Result<()> {
        let offset = index * SLOT;
        let slot = kvm_userspace_memory_region {
            // Behind those of the other regions.
            slot: u32::try_from(self.memory.num_regions() as u64 + index).map_err(io::Error::other)?,
            flags: 0,
            guest_phys_addr: region.start_addr().0 + offset,
            memory_size: len,
            userspace_addr: region.as_ptr() as u64 + offset,
        };
        // SAFETY: the range is within a mapping of `memory`, which this keeps as long as it keeps the VM.
        unsafe { self.vm.set_user_memory_region(slot) }.map_err(|error| io::Error::from_raw_os_error(error.errno()))
    }
}

impl Backing for Growing {
    fn grant(&mut self, bytes: u64) -> io::Result<()> {
        let region = self.memory.iter().last().ok_or(io::ErrorKind::NotFound)?;
        let wanted = bytes.div_ceil(SLOT);
        if wanted > self.slots {
            region.grant(bytes)?;
        }
        while self.slots < wanted {
            let len = (bytes - self.slots * SLOT).min(SLOT);
            if let Err(error) = self.set_slot(region, self.slots, len) {
                region.grant(self.slots * SLOT)?;
                return Err(error);
            }
            self.slots += 1;
        }
        while self.slots > wanted {
            self.set_slot(region, self.slots - 1, 0)?;
            self.slots -= 1;
        }
        region.grant(bytes)
    }
}
