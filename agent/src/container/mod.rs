//! Containers and their processes.

mod directory;
mod launch;
mod process;
pub mod processes;
mod registry;
pub mod spec;

pub use process::Process;
pub use registry::Containers;

/// One directory per container; a RAM file system.
pub const DIR: &str = "/run/katavm/containers";
