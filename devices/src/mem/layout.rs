//! The structures that driver and device exchange (virtio 1.3, 5.15.4 and 5.15.6).

use std::ops::Range;

use super::blocks::BLOCK;

/// Length of `struct virtio_mem_config`.
pub const CONFIG_LEN: usize = 56;
/// Length of `struct virtio_mem_req`.
pub const REQUEST_LEN: usize = 24;
/// Length of `struct virtio_mem_resp`.
pub const RESPONSE_LEN: usize = 10;

/// Response types.
pub const ACK: u16 = 0;
/// The device does not want this, now.
pub const NACK: u16 = 1;
/// Later perhaps.
pub const BUSY: u16 = 2;
/// The request is wrong.
pub const ERROR: u16 = 3;

/// States of blocks.
pub const STATE_PLUGGED: u16 = 0;
/// None of them is plugged.
pub const STATE_UNPLUGGED: u16 = 1;
/// Some are.
pub const STATE_MIXED: u16 = 2;

/// Blocks of guest-physical memory as a driver names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Address of the first.
    pub address: u64,
    /// How many.
    pub blocks: u16,
}

impl Extent {
    /// The numbers of the blocks in a region at `start` of which `usable` bytes may be used; nothing if the extent is
    /// empty, not aligned, or not within them.
    #[must_use]
    pub fn within(self, start: u64, usable: u64) -> Option<Range<usize>> {
        let offset = self.address.checked_sub(start)?;
        let end = offset.checked_add(u64::from(self.blocks) * BLOCK)?;
        let right = self.blocks > 0 && offset % BLOCK == 0 && end <= usable;
        right.then_some((offset / BLOCK) as usize..(end / BLOCK) as usize)
    }
}

/// A request of the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// `VIRTIO_MEM_REQ_PLUG`
    Plug(Extent),
    /// `VIRTIO_MEM_REQ_UNPLUG`
    Unplug(Extent),
    /// `VIRTIO_MEM_REQ_UNPLUG_ALL`
    UnplugAll,
    /// `VIRTIO_MEM_REQ_STATE`
    State(Extent),
}

impl Request {
    /// From its bytes; nothing for a type that there is not.
    #[must_use]
    pub fn parse(bytes: &[u8; REQUEST_LEN]) -> Option<Self> {
        let [low, high, _, _, _, _, _, _, address @ .., b0, b1, _, _, _, _, _, _] = bytes;
        let extent = Extent { address: u64::from_le_bytes(*address), blocks: u16::from_le_bytes([*b0, *b1]) };
        match u16::from_le_bytes([*low, *high]) {
            0 => Some(Self::Plug(extent)),
            1 => Some(Self::Unplug(extent)),
            2 => Some(Self::UnplugAll),
            3 => Some(Self::State(extent)),
            _ => None,
        }
    }
}

/// The answer: its type, and for [`Request::State`] the state.
#[must_use]
pub fn response(kind: u16, state: u16) -> [u8; RESPONSE_LEN] {
    let ([a, b], [c, d]) = (kind.to_le_bytes(), state.to_le_bytes());
    [a, b, 0, 0, 0, 0, 0, 0, c, d]
}

/// What the configuration space says, in bytes; the block size is [`BLOCK`], and there is one node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// Guest-physical address of the region.
    pub address: u64,
    /// Length of the region.
    pub region: u64,
    /// How much of it, from its start, the driver may use for now.
    pub usable: u64,
    /// How much is plugged.
    pub plugged: u64,
    /// How much is to be plugged.
    pub requested: u64,
}

impl Config {
    /// `struct virtio_mem_config`.
    #[must_use]
    pub fn bytes(&self) -> [u8; CONFIG_LEN] {
        let mut bytes = [0; CONFIG_LEN];
        // Node and padding are between the first and the second.
        let fields = [BLOCK, 0, self.address, self.region, self.usable, self.plugged, self.requested];
        for (place, field) in bytes.chunks_exact_mut(size_of::<u64>()).zip(fields) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: u64 = 1 << 32;

    fn within(address: u64, blocks: u16) -> Option<Range<usize>> {
        Extent { address, blocks }.within(START, 8 * BLOCK)
    }

    #[test]
    fn extents_are_whole_blocks_of_what_is_usable() {
        assert_eq!(within(START, 8), Some(0..8));
        assert_eq!(within(START + 3 * BLOCK, 1), Some(3..4));
        let wrong = [
            (START, 0),
            (START, 9),
            (START + 8 * BLOCK, 1),
            (START - BLOCK, 1),
            (START + 1, 1),
            (START + BLOCK / 2, 1),
            (u64::MAX - BLOCK + 1, 1),
            (u64::MAX, u16::MAX),
            (0, 1),
        ];
        for (address, blocks) in wrong {
            assert_eq!(within(address, blocks), None, "{address:#x} {blocks}");
        }
    }

    #[test]
    fn requests_are_read_as_the_specification_lays_them_out() {
        let mut bytes = [0; REQUEST_LEN];
        bytes[8..16].copy_from_slice(&0x1234_5678_9abc_def0_u64.to_le_bytes());
        bytes[16..18].copy_from_slice(&7_u16.to_le_bytes());
        let extent = Extent { address: 0x1234_5678_9abc_def0, blocks: 7 };
        let kinds = [Request::Plug(extent), Request::Unplug(extent), Request::UnplugAll, Request::State(extent)];
        for (kind, expected) in (0..).zip(kinds) {
            bytes[0] = kind;
            assert_eq!(Request::parse(&bytes), Some(expected));
        }
        bytes[0] = 4;
        assert_eq!(Request::parse(&bytes), None);
        assert_eq!(response(NACK, STATE_MIXED), [1, 0, 0, 0, 0, 0, 0, 0, 2, 0]);
    }
}
