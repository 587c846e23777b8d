//! Guest memory as all devices see it.

/// The guest's RAM: regions of host memory by guest-physical address. Cloning shares the regions.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;
