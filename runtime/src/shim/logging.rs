//! The log: a named pipe in the bundle, which containerd reads and copies to its own.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use log::LevelFilter;

use crate::cli::{LogFormat, log_to};

/// Sends messages to the pipe in a bundle. It is never waited for: what containerd does not read in time is dropped.
///
/// # Errors
/// Those of open(2).
pub fn start(bundle: &Path, debug: bool) -> io::Result<()> {
    // Read and write: there is always a reader, so a write without containerd is no error.
    let flags = libc::O_NONBLOCK | libc::O_CLOEXEC;
    let pipe = File::options().read(true).write(true).custom_flags(flags).open(bundle.join("log"))?;
    log_to(Some(pipe), LogFormat::Text, if debug { LevelFilter::Debug } else { LevelFilter::Info });
    Ok(())
}
