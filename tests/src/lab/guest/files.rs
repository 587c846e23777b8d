//! Mounting and writing, with errors that name the path.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};

/// Makes the folder if it is not there and mounts on it.
pub fn mount_on(target: &Path, kind: &str, source: &str, flags: MsFlags, options: &str) -> Result<()> {
    if !target.is_dir() {
        fs::create_dir_all(target).with_context(|| format!("cannot make {}", target.display()))?;
    }
    mount(Some(source), target, Some(kind), flags, Some(options))
        .with_context(|| format!("cannot mount {kind} ({source}) on {}", target.display()))
}

/// Writes a whole file.
pub fn write(path: &Path, contents: impl AsRef<[u8]>) -> Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
    }
    fs::write(path, contents).with_context(|| format!("cannot write {}", path.display()))
}
