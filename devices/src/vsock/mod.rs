//! virtio-vsock in user space (virtio 1.3, 5.10): stream sockets between the host process and the guest.
//!
//! [`Vsock`] is the device, [`VsockHost`] the handle by which the host connects and listens. Each
//! connection is, for the host, one end of a Unix socket pair. See `docs/vsock.md`.

mod connection;
mod credit;
mod device;
mod host;
mod listener;
mod packet;
mod receive;
mod socket;
mod state;
mod streams;
mod table;
mod transmit;

pub use connection::ConnectionKey;
pub use device::Vsock;
pub use host::VsockHost;
pub use listener::VsockListener;
pub use state::{ConnectionId, RestoreError, VsockState};
