//! Pid files.

use std::fs;
use std::path::Path;

use anyhow::Context;

/// Writes a pid to a file, whole or not at all: whoever sees the file may read it at once.
///
/// # Errors
/// When it cannot be written.
pub fn write(path: &Path, pid: i32) -> anyhow::Result<()> {
    let name = path.file_name().context("--pid-file: not a file's name")?;
    let scratch = path.with_file_name(format!(".{}", name.display()));
    let written = fs::write(&scratch, pid.to_string()).and_then(|()| fs::rename(&scratch, path));
    written.with_context(|| format!("cannot write the pid file {}", path.display()))
}
