//! vsock ports. Only the host may dial the guest's, and only an agent that boots may dial the host's.

/// On the host: the agent says here, once, that it is ready.
pub const READY: u32 = 1023;
/// In the guest: the ttrpc service.
pub const RPC: u32 = 1024;
/// In the guest: one connection per container stream.
pub const STREAM: u32 = 1025;
/// In the guest: one connection for each that is forwarded to a listening socket of the guest.
pub const FORWARD: u32 = 1026;
/// In the guest: the one connection for queries to name servers of the host.
pub const NAMES: u32 = 1027;
/// In the guest: the one connection on which the agent tells where the guest's sockets listen.
pub const LISTENERS: u32 = 1028;
/// The host's context identifier (virtio 1.3, 5.10.4).
pub const HOST_CID: u32 = 2;
