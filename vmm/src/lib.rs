//! The virtual machine monitor: boots a Linux guest on KVM and runs it inside the calling process.
//!
//! It is a library without global state: it ends with an [`ExitReason`], never the process, and a
//! process may hold any number of [`Microvm`]s. vCPUs and device loops are plain threads.

mod boot;
mod builder;
mod bus;
mod config;
mod console;
mod control;
mod device;
mod ending;
mod event_loop;
mod growth;
mod kvm;
mod layout;
mod memory;
mod microvm;
pub mod probe;
pub mod snapshot;
mod stats;
mod timeline;
mod vcpu;

pub use boot::BootError;
pub use builder::{BuildError, MicrovmBuilder};
pub use config::MicrovmConfig;
pub use console::Console;
pub use ending::ExitReason;
pub use kvm::KvmError;
pub use memory::MemoryError;
pub use microvm::{Microvm, MicrovmError};
pub use timeline::{Timeline, now};
