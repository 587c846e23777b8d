//! The runtime: takes a bundle, makes a sandbox for it, runs its container in there and speaks for it on the host.

pub mod config;
pub mod host;
pub mod process;
pub mod sandbox;
pub mod state;
pub mod watcher;
