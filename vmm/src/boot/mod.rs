//! Everything the guest kernel finds in memory and registers when it starts (Linux x86 boot protocol, 64-bit).

mod cmdline;
mod kernel;
mod mptable;
mod params;

use std::path::{Path, PathBuf};

use katavm_devices::memory::GuestMemory;
use vm_memory::GuestAddress;

pub use cmdline::{GROWING, Window, cmdline};

use crate::config::MicrovmConfig;

/// Why a guest cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file cannot be read.
    #[error("cannot read {what} {path}: {error}")]
    Read {
        /// "the kernel" or "the initramfs".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// The kernel file is neither kind.
    #[error("{0} is no kernel that katavm can boot: it must be an uncompressed x86-64 ELF (vmlinux) or a bzImage")]
    NotAKernel(PathBuf),
    /// The kernel cannot be loaded.
    #[error("cannot load the kernel {path}: {error}")]
    Load {
        /// The file.
        path: PathBuf,
        /// What the loader said.
        error: linux_loader::loader::Error,
    },
    /// Kernel and initramfs do not fit.
    #[error("{memory_mib} MiB of memory are too small for this kernel and initramfs: give at least {needed_mib} MiB")]
    MemoryTooSmall {
        /// What the guest has.
        memory_mib: u32,
        /// What it needs to be loaded at all.
        needed_mib: u64,
    },
    /// The kernel command line is too long.
    #[error("the kernel command line has {0} bytes, 2047 at most")]
    Cmdline(usize),
    /// Guest memory cannot be written.
    #[error("cannot write boot data to guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
    /// The boot parameters do not fit.
    #[error("cannot write the boot parameters: {0}")]
    Params(#[from] linux_loader::configurator::Error),
}

/// Loads kernel, initramfs, command line, boot parameters and MP table; returns the kernel's 64-bit entry point.
///
/// # Errors
/// Any [`BootError`].
pub fn load(memory: &GuestMemory, config: &MicrovmConfig, cmdline: &str) -> Result<GuestAddress, BootError> {
    let kernel = kernel::load(memory, config)?;
    let initramfs = match &config.initramfs {
        Some(path) => Some(kernel::load_initramfs(memory, path, kernel.end, config.memory_mib)?),
        None => None,
    };
    params::write(memory, &kernel, initramfs, cmdline, config.memory_mib)?;
    mptable::write(memory, config.possible_vcpus())?;
    Ok(kernel.entry)
}

fn read_error(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> BootError {
    move |error| BootError::Read { what, path: path.into(), error }
}
