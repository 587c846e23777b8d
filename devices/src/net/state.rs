//! The device's state as it goes into a snapshot.

use serde::{Deserialize, Serialize};

use super::meter::NetLimits;

/// What a restored device has in common with the saved one, whose driver knows it by heart.
///
/// The backend is the host's and does not go into a snapshot. Packets are moved within one turn of the event loop,
/// so none is ever half in the guest; buffers that the device has taken for packets to come are in the queue's state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// The device's address.
    pub mac: [u8; 6],
    /// The MTU that the device tells.
    pub mtu: Option<u16>,
    /// What it offers to do or to leave undone, as `TUNSETOFFLOAD` has it.
    pub offloads: u32,
    /// The pairs of queues that it has.
    pub pairs: u16,
    /// Limits of what goes through it; their buckets are full again after a restore.
    pub limits: NetLimits,
    /// What the driver has asked for last, if there was one.
    pub asked: Option<Asked>,
    /// The link was up.
    pub link_up: bool,
}

/// What a driver has asked for by the control queue, or has if it asked for nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    /// Pairs of queues in use, from the first one on.
    pub pairs: u16,
    /// What may be left undone in packets for the guest, as `TUNSETOFFLOAD` has it.
    pub to_guest: u32,
}
