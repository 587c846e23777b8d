//! Guest memory as all devices see it.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::bitmap::BS;
use vm_memory::guest_memory::Result;
use vm_memory::mmap::FromRangesError;
use vm_memory::{
    Address as _, GuestAddress, GuestMemory as _, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes,
    GuestRegionCollection, GuestRegionMmap, GuestUsize, MemoryRegionAddress, MmapRegion, VolatileSlice,
};

/// The guest's RAM: regions of host memory by guest-physical address. Cloning shares the regions.
pub type GuestMemory = GuestRegionCollection<GuestRegion>;

/// A region of the guest's RAM, of which a beginning is there: all of it for ordinary RAM, what the host has granted so
/// far for memory that is plugged in later. No device gets at the rest, whatever addresses a driver gives it.
#[derive(Debug)]
pub struct GuestRegion {
    mapping: GuestRegionMmap<()>,
    granted: AtomicU64,
}

impl GuestRegion {
    /// A region that is there as a whole.
    #[must_use]
    pub fn whole(mapping: GuestRegionMmap<()>) -> Self {
        let granted = AtomicU64::new(mapping.len());
        Self { mapping, granted }
    }

    /// A region of which the first `granted` bytes are there, which must be accessible; the mapping of the rest need not.
    #[must_use]
    pub fn partial(mapping: GuestRegionMmap<()>, granted: u64) -> Self {
        let granted = AtomicU64::new(granted.min(mapping.len()));
        Self { mapping, granted }
    }

    /// How much of it is there, in bytes.
    #[must_use]
    pub fn granted(&self) -> u64 {
        self.granted.load(Ordering::Acquire)
    }

    /// The host's address of its first byte.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.mapping.as_ptr()
    }

    /// Has `bytes` of it be there, and makes them accessible to this process. They stay so when there are fewer again: a
    /// device may be at work in what it was given before.
    ///
    /// # Errors
    /// When the region is not as long, or of mprotect(2).
    pub fn grant(&self, bytes: u64) -> io::Result<()> {
        if bytes > self.len() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if bytes > self.granted() {
            let access = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: the range is the beginning of this region's own mapping; access to it only widens.
            let done = unsafe { libc::mprotect(self.as_ptr().cast(), bytes as usize, access) };
            if done != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        self.granted.store(bytes, Ordering::Release);
        Ok(())
    }
}

impl GuestMemoryRegion for GuestRegion {
    type B = ();

    /// Of the whole region: what is there may change between two looks at it, and is looked at when memory is accessed.
    fn len(&self) -> GuestUsize {
        self.mapping.len()
    }

    fn start_addr(&self) -> GuestAddress {
        self.mapping.start_addr()
    }

    fn bitmap(&self) -> BS<'_, ()> {}

    fn get_host_address(&self, address: MemoryRegionAddress) -> Result<*mut u8> {
        if address.raw_value() >= self.granted() {
            return Err(GuestMemoryError::InvalidBackendAddress);
        }
        self.mapping.get_host_address(address)
    }

    fn get_slice(&self, offset: MemoryRegionAddress, count: usize) -> Result<VolatileSlice<'_, ()>> {
        let end = offset.checked_add(count as u64).filter(|end| end.raw_value() <= self.granted());
        end.ok_or(GuestMemoryError::InvalidBackendAddress)?;
        self.mapping.get_slice(offset, count)
    }

    /// Of what is there.
    fn as_volatile_slice(&self) -> Result<VolatileSlice<'_, ()>> {
        self.get_slice(MemoryRegionAddress(0), self.granted() as usize)
    }
}

impl GuestMemoryRegionBytes for GuestRegion {}

/// The `len` bytes at `address`, where one region has all of them, as is nearly always so. Where it is not,
/// [`GuestMemory`]'s own way, which walks over regions one by one, is there; it costs more.
pub(crate) fn slice(memory: &GuestMemory, address: GuestAddress, len: usize) -> Option<VolatileSlice<'_>> {
    let (region, offset) = memory.to_region_addr(address)?;
    region.get_slice(offset, len).ok()
}

/// Anonymous memory for regions that are there as a whole, by their addresses and lengths in bytes.
///
/// # Errors
/// When the ranges overlap or are not sorted, or of mmap(2).
pub fn anonymous(ranges: &[(GuestAddress, usize)]) -> std::result::Result<GuestMemory, FromRangesError> {
    let region = |(start, len): &(GuestAddress, usize)| {
        let mapping = GuestRegionMmap::new(MmapRegion::new(*len)?, *start);
        mapping.map(GuestRegion::whole).ok_or(FromRangesError::InvalidGuestRegion)
    };
    let regions = ranges.iter().map(region).collect::<std::result::Result<Vec<_>, _>>()?;
    Ok(GuestMemory::from_regions(regions)?)
}

#[cfg(test)]
mod tests {
    use vm_memory::mmap::MmapRegionBuilder;
    use vm_memory::{Bytes as _, GuestMemory as _};

    use super::*;

    const START: GuestAddress = GuestAddress(1 << 20);

    fn growing() -> GuestMemory {
        let mapping = MmapRegionBuilder::new(4 << 12)
            .with_mmap_prot(libc::PROT_NONE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
            .build()
            .unwrap();
        let whole = GuestRegionMmap::from_range(GuestAddress(0), 1 << 12, None).unwrap();
        let growing = GuestRegionMmap::new(mapping, START).unwrap();
        GuestMemory::from_regions(vec![GuestRegion::whole(whole), GuestRegion::partial(growing, 0)]).unwrap()
    }

    #[test]
    fn what_is_not_granted_is_not_there() {
        let memory = growing();
        let region = memory.iter().nth(1).unwrap();
        let write = |offset: u64| memory.write_obj(7_u8, START.unchecked_add(offset));
        assert!(write(0).is_err());
        assert!(memory.get_slice(START, 1).is_err() && !memory.check_range(START, 1));
        region.grant(2 << 12).unwrap();
        assert!(write(0).is_ok() && write((2 << 12) - 1).is_ok());
        assert!(write(2 << 12).is_err());
        assert!(memory.get_slice(START, (2 << 12) + 1).is_err());
        assert_eq!(memory.get_slices(START, 3 << 12).filter(std::result::Result::is_err).count(), 1);
        region.grant(1 << 12).unwrap();
        assert!(write(1 << 12).is_err());
        assert_eq!(memory.read_obj::<u8>(START).unwrap(), 7);
        assert!(region.grant(5 << 12).is_err());
    }
}
