//! The runtime: takes a bundle, makes a sandbox for it, runs its container in there and speaks for it on the host.

pub mod cli;
pub mod config;
pub mod container;
pub mod host;
pub mod network;
pub mod process;
pub mod sandbox;
pub mod state;
pub mod timings;
pub mod watcher;
