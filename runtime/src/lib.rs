//! The runtime: takes a bundle, makes a sandbox for it, runs its container in there and speaks for it on the host.

pub mod cli;
pub mod config;
pub mod cpuset;
pub mod cri;
pub mod descriptor;
pub mod hooks;
pub mod host;
pub mod launch;
pub mod limits;
pub mod link;
pub mod membership;
pub mod network;
pub mod pod;
pub mod process;
pub mod sandbox;
pub mod service;
pub mod settings;
pub mod shim;
pub mod standin;
pub mod state;
pub mod supervise;
pub mod timings;
pub mod watcher;
