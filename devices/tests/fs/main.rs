//! virtio-fs, driven through its queues over real guest memory, against real files.
#![allow(missing_docs, clippy::unwrap_used, clippy::missing_panics_doc)]

mod dirs;
mod driver;
mod exports;
mod files;
mod garbage;
mod kernel;
mod many;
mod mounts;
mod names;
mod owners;
mod persist;
mod waiting;
mod xattrs;
