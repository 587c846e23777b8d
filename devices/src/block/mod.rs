//! virtio-blk, the block device (virtio 1.3, 5.2), on a raw file or a block device of the host.

mod backend;
mod device;
mod layout;
mod request;
mod state;

pub use backend::DiskError;
pub use device::{Block, BlockConfig, BlockError};
pub use state::BlockState;
