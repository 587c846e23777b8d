//! Numbers and structures of virtio 1.3, 5.2, and the limits that katavm sets.

use vm_memory::ByteValued;

/// The unit of addresses and capacities, whatever the logical block size.
pub const SECTOR: u64 = 512;

pub const F_SIZE_MAX: u64 = 1 << 1;
pub const F_SEG_MAX: u64 = 1 << 2;
pub const F_RO: u64 = 1 << 5;
pub const F_BLK_SIZE: u64 = 1 << 6;
pub const F_FLUSH: u64 = 1 << 9;
pub const F_TOPOLOGY: u64 = 1 << 10;
pub const F_CONFIG_WCE: u64 = 1 << 11;
pub const F_MQ: u64 = 1 << 12;
pub const F_DISCARD: u64 = 1 << 13;
pub const F_WRITE_ZEROES: u64 = 1 << 14;

pub const T_IN: u32 = 0;
pub const T_OUT: u32 = 1;
pub const T_FLUSH: u32 = 4;
pub const T_GET_ID: u32 = 8;
pub const T_DISCARD: u32 = 11;
pub const T_WRITE_ZEROES: u32 = 13;

/// Flag of a write-zeroes segment: the device may deallocate the sectors.
pub const UNMAP: u32 = 1;

/// Length of a device's identification.
pub const ID_BYTES: usize = 20;

pub const QUEUE_SIZE: u16 = 256;
/// Data buffers in one request: the queue without header and status.
pub const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Bytes in one data buffer.
pub const SIZE_MAX: u32 = 256 * 1024;
/// Bytes in one request; a driver that keeps the two limits above never asks for more.
pub const REQUEST_MAX: usize = SEG_MAX as usize * SIZE_MAX as usize;

/// Segments in one discard request.
pub const DISCARD_SEGMENTS: u32 = 16;
/// Sectors in one discard segment: 1 GiB.
pub const DISCARD_SECTORS: u32 = 1 << 21;
/// Segments in one write-zeroes request.
pub const ZEROES_SEGMENTS: u32 = 1;
/// Sectors in one write-zeroes segment: 64 MiB, since some host file systems need real writes for it.
pub const ZEROES_SECTORS: u32 = 1 << 17;

/// `struct virtio_blk_req` up to its data, in little-endian bytes.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct Header {
    kind: u32,
    reserved: u32,
    sector: u64,
}

// SAFETY: plain integers without padding (4 + 4 + 8 bytes, alignment 8): any bytes are a valid value.
unsafe impl ByteValued for Header {}

impl Header {
    pub fn kind(&self) -> u32 {
        u32::from_le(self.kind)
    }

    pub fn sector(&self) -> u64 {
        u64::from_le(self.sector)
    }
}

/// `struct virtio_blk_discard_write_zeroes`, in little-endian bytes.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct Segment {
    sector: u64,
    sectors: u32,
    flags: u32,
}

// SAFETY: plain integers without padding (8 + 4 + 4 bytes, alignment 8): any bytes are a valid value.
unsafe impl ByteValued for Segment {}

impl Segment {
    pub fn sector(&self) -> u64 {
        u64::from_le(self.sector)
    }

    pub fn sectors(&self) -> u32 {
        u32::from_le(self.sectors)
    }

    pub fn flags(&self) -> u32 {
        u32::from_le(self.flags)
    }
}

/// What the configuration space tells of a disk.
pub struct Geometry {
    /// Capacity in sectors.
    pub sectors: u64,
    /// Logical block size in bytes.
    pub logical: u32,
    /// Physical block size in bytes.
    pub physical: u32,
}

/// Length of the configuration space up to and including `write_zeroes_may_unmap` with its padding.
pub const CONFIG_BYTES: usize = 60;

/// Where `writeback` stands, the only field that a driver may write.
pub const WRITEBACK: usize = 32;

/// `struct virtio_blk_config`, 5.2.4.
pub fn config(geometry: &Geometry, queues: u16, writeback: bool) -> [u8; CONFIG_BYTES] {
    let exponent = (geometry.physical / geometry.logical.max(1)).max(1).ilog2() as u8;
    let alignment = u64::from(geometry.physical).div_ceil(SECTOR) as u32;
    let mut bytes = Vec::with_capacity(CONFIG_BYTES);
    bytes.extend(geometry.sectors.to_le_bytes());
    bytes.extend(SIZE_MAX.to_le_bytes());
    bytes.extend(SEG_MAX.to_le_bytes());
    // Cylinders, heads, sectors: not offered.
    bytes.extend([0; 4]);
    bytes.extend(geometry.logical.to_le_bytes());
    // physical_block_exp, alignment_offset, min_io_size and opt_io_size in logical blocks.
    bytes.extend([exponent, 0]);
    bytes.extend((1u16 << exponent.min(15)).to_le_bytes());
    bytes.extend(0u32.to_le_bytes());
    // writeback, unused, num_queues.
    bytes.extend([u8::from(writeback), 0]);
    bytes.extend(queues.to_le_bytes());
    bytes.extend(DISCARD_SECTORS.to_le_bytes());
    bytes.extend(DISCARD_SEGMENTS.to_le_bytes());
    bytes.extend(alignment.to_le_bytes());
    bytes.extend(ZEROES_SECTORS.to_le_bytes());
    bytes.extend(ZEROES_SEGMENTS.to_le_bytes());
    // write_zeroes_may_unmap, unused.
    bytes.extend([1, 0, 0, 0]);
    let mut config = [0; CONFIG_BYTES];
    config.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_stand_where_the_specification_has_them() {
        let config = config(&Geometry { sectors: 0x1122, logical: 512, physical: 4096 }, 3, true);
        let u32_at = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
        assert_eq!(u64::from_le_bytes(config[..8].try_into().unwrap()), 0x1122);
        assert_eq!((u32_at(8), u32_at(12), u32_at(20)), (SIZE_MAX, SEG_MAX, 512));
        assert_eq!((config[24], config[26]), (3, 8));
        assert_eq!((config[WRITEBACK], config[34], config[35]), (1, 3, 0));
        assert_eq!((u32_at(36), u32_at(40), u32_at(44)), (DISCARD_SECTORS, DISCARD_SEGMENTS, 8));
        assert_eq!((u32_at(48), u32_at(52), config[56]), (ZEROES_SECTORS, ZEROES_SEGMENTS, 1));
    }
}
