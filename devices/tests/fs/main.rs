//! virtio-fs, driven through its queues over real guest memory, against real files.
#![allow(missing_docs, clippy::unwrap_used, clippy::missing_panics_doc)]

mod driver;
mod files;
