//! The packet header of virtio-vsock (virtio 1.3, 5.10.6), decoded and encoded by the `virtio-vsock` crate.
//!
//! The crate's own way of finding header and payload in a descriptor chain is not used: it wants one or
//! two descriptors and its own chain type, while a driver may cut a packet anywhere (virtio 1.3, 2.7.4.2).

use serde::{Deserialize, Serialize};
use virtio_vsock::packet::{PKT_HEADER_SIZE, VsockPacket};

/// Length of an encoded header in bytes.
pub(super) const HEADER_SIZE: usize = PKT_HEADER_SIZE;
/// `VIRTIO_VSOCK_TYPE_STREAM`.
pub(super) const TYPE_STREAM: u16 = 1;
/// The host's context identifier.
pub(super) const HOST_CID: u64 = 2;
/// The longest payload that is taken, and given; Linux' `VIRTIO_VSOCK_MAX_PKT_BUF_SIZE`.
pub(super) const MAX_PAYLOAD: u32 = 64 * 1024;

/// Operations of stream sockets (`enum virtio_vsock_op`).
pub(super) mod op {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// The header's fields in host byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads a header; None never happens with an array of this size, which is all the crate checks.
    pub fn decode(bytes: &[u8; HEADER_SIZE]) -> Option<Self> {
        let mut scratch = [0; HEADER_SIZE];
        let mut packet = packet_of(&mut scratch)?;
        packet.set_header_from_raw(bytes).ok()?;
        Some(Self {
            src_cid: packet.src_cid(),
            dst_cid: packet.dst_cid(),
            src_port: packet.src_port(),
            dst_port: packet.dst_port(),
            len: packet.len(),
            kind: packet.type_(),
            op: packet.op(),
            flags: packet.flags(),
            buf_alloc: packet.buf_alloc(),
            fwd_cnt: packet.fwd_cnt(),
        })
    }

    /// The header as the guest reads it.
    pub fn encode(&self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        if let Some(mut packet) = packet_of(&mut bytes) {
            packet
                .set_src_cid(self.src_cid)
                .set_dst_cid(self.dst_cid)
                .set_src_port(self.src_port)
                .set_dst_port(self.dst_port)
                .set_len(self.len)
                .set_type(self.kind)
                .set_op(self.op)
                .set_flags(self.flags)
                .set_buf_alloc(self.buf_alloc)
                .set_fwd_cnt(self.fwd_cnt);
        }
        bytes
    }

    /// The RST that answers a packet of no connection.
    pub fn reset_reply(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RST,
            ..Self::default()
        }
    }
}

fn packet_of(bytes: &mut [u8; HEADER_SIZE]) -> Option<VsockPacket<'_, ()>> {
    // SAFETY: the packet keeps a pointer into `bytes`; this signature makes it borrow them for as long as it lives.
    unsafe { VsockPacket::new(bytes, None) }.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layout_is_the_specifications() {
        let header = Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: 2,
            src_port: 0x1112_1314,
            dst_port: 0x2122_2324,
            len: 0x3132_3334,
            kind: 0x4142,
            op: 0x5152,
            flags: 0x6162_6364,
            buf_alloc: 0x7172_7374,
            fwd_cnt: 0x8182_8384,
        };
        let bytes = header.encode();
        let expected: [u8; 44] = [
            8, 7, 6, 5, 4, 3, 2, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0x14, 0x13, 0x12, 0x11, 0x24, 0x23, 0x22, 0x21, 0x34, 0x33,
            0x32, 0x31, 0x42, 0x41, 0x52, 0x51, 0x64, 0x63, 0x62, 0x61, 0x74, 0x73, 0x72, 0x71, 0x84, 0x83, 0x82, 0x81,
        ];
        assert_eq!(bytes, expected);
        assert_eq!(Header::decode(&bytes), Some(header));
    }
}
