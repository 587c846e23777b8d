//! Numbers of virtio 1.3, 5.1, and the limits that katavm sets.

pub const F_CSUM: u64 = 1;
pub const F_GUEST_CSUM: u64 = 1 << 1;
pub const F_CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
pub const F_MTU: u64 = 1 << 3;
pub const F_MAC: u64 = 1 << 5;
pub const F_GUEST_TSO4: u64 = 1 << 7;
pub const F_GUEST_TSO6: u64 = 1 << 8;
pub const F_GUEST_ECN: u64 = 1 << 9;
pub const F_GUEST_UFO: u64 = 1 << 10;
pub const F_HOST_TSO4: u64 = 1 << 11;
pub const F_HOST_TSO6: u64 = 1 << 12;
pub const F_HOST_ECN: u64 = 1 << 13;
pub const F_HOST_UFO: u64 = 1 << 14;
pub const F_MRG_RXBUF: u64 = 1 << 15;
pub const F_STATUS: u64 = 1 << 16;
pub const F_CTRL_VQ: u64 = 1 << 17;
pub const F_MQ: u64 = 1 << 22;
pub const F_GUEST_USO4: u64 = 1 << 54;
pub const F_GUEST_USO6: u64 = 1 << 55;
pub const F_HOST_USO: u64 = 1 << 56;

/// The most pairs of queues of a device. Each is served by a thread.
pub const MAX_PAIRS: u16 = 8;
/// Queues of a pair.
pub const PAIR: usize = 2;
/// Host to guest, in a pair.
pub const RX: usize = 0;
/// Guest to host, in a pair.
pub const TX: usize = 1;
/// Descriptors per queue.
pub const QUEUE_SIZE: u16 = 256;
/// Packets of each direction that are moved before other devices of the event loop get their turn.
pub const TURN: usize = 64;

/// `struct virtio_net_hdr_v1`, in front of every packet.
pub const HEADER: usize = 12;
/// An Ethernet header and a VLAN tag.
pub const LINK_HEADER: usize = 14 + 4;
/// The longest packet with its header: one that is still to be segmented.
pub const PACKET_MAX: usize = HEADER + LINK_HEADER + 65535;
/// The shortest packet that is one: an Ethernet header.
pub const PACKET_MIN: usize = HEADER + 14;

/// The smallest and the largest MTU of a device (5.1.4.1).
pub const MTU_MIN: u16 = 68;

/// `mac`, `status`, `max_virtqueue_pairs` and `mtu` of `struct virtio_net_config`.
pub const CONFIG_BYTES: usize = 12;
/// Where the low byte of `status` is.
pub const STATUS_AT: usize = 6;
/// VIRTIO_NET_S_LINK_UP.
pub const LINK_UP: u8 = 1;

/// `struct virtio_net_config`, 5.1.4, with the link down.
pub fn config(mac: [u8; 6], pairs: u16, mtu: u16) -> [u8; CONFIG_BYTES] {
    let mut config = [0; CONFIG_BYTES];
    let bytes = mac.into_iter().chain([0; 2]).chain(pairs.to_le_bytes()).chain(mtu.to_le_bytes());
    config.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_stand_where_the_specification_has_them() {
        assert_eq!(config([2, 3, 4, 5, 6, 7], 3, 0x1234), [2, 3, 4, 5, 6, 7, 0, 0, 3, 0, 0x34, 0x12]);
    }
}
