//! The agent: PID 1 of the guest. It prepares the guest, runs containers in it and speaks to the host.
//!
//! The binary is also its own helper: see [`helper`].

pub mod boot;
pub mod bpf;
pub mod cgroup;
pub mod clock;
pub mod container;
pub mod cpus;
pub mod disks;
pub mod end;
pub mod error;
pub mod events;
pub mod file_system;
pub mod forward;
pub mod helper;
pub mod listening;
pub mod log;
pub mod names;
pub mod network;
pub mod overlay;
pub mod places;
pub mod reaper;
pub mod room;
pub mod sandbox;
pub mod server;
pub mod service;
pub mod streams;
pub mod transport;
pub mod volume;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks; a panic of another holder is no reason for PID 1 to panic as well.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
