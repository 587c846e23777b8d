//! virtio-net, the network device (virtio 1.3, 5.1), on a tap of the host: pairs of queues, packets moved
//! straight between guest memory and the tap, checksums and segmentation left to whoever has to do them.
//!
//! The device gets its [`Backend`] when there is one. Until then, and after it is gone, its link is down.

mod backend;
mod control;
mod device;
mod header;
mod layout;
mod link;
mod meter;
mod offloads;
mod pair;
mod port;
mod receive;
mod state;
mod stream;
mod transmit;

pub use backend::{Backend, Tap, TapError};
pub use device::{Net, NetConfig, NetError};
pub use meter::NetLimits;
pub use offloads::Offloads;
pub use state::{Asked, NetState};
pub use stream::Stream;
