//! virtio-blk, the block device (virtio 1.3, 5.2), on a raw file or a block device of the host.
//!
//! A request is taken from its queue and checked (`request`), becomes a row of system calls (`flight`), which an
//! `engine` makes: io_uring with many requests at once and in any order, or one after the other. Nothing needs an order
//! but what a driver waits for: a flush covers the writes that were reported as done before it was asked for.
//! The disk may come and go while its place stays.

mod backend;
mod bounce;
mod config;
mod device;
mod engine;
mod flight;
mod layout;
mod request;
mod state;

pub use backend::DiskError;
pub use config::{BlockConfig, BlockError, BlockOptions, CacheMode, MAX_QUEUES};
pub use device::Block;
pub use engine::EngineKind;
pub use state::BlockState;
