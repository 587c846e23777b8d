//! What containers are made of: the guest image and bundles, in memory.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::e2e::Context;

/// Copies the guest image into `scratch`, so that nobody pays for the file system that it lies on; gives its folder.
///
/// # Errors
/// When it has not been built.
pub fn image(scratch: &Path) -> Result<PathBuf> {
    let context = Context::new("bench")?;
    let image = scratch.join("image");
    fs::create_dir(&image)?;
    for file in ["vmlinux", "initramfs"] {
        fs::copy(context.image(file)?, image.join(file))?;
    }
    Ok(image)
}

/// The example bundle of busybox in `scratch`.
///
/// # Errors
/// What its script says.
pub fn busybox(scratch: &Path) -> Result<PathBuf> {
    let bundle = scratch.join("bundle");
    example("make-bundle", &["busybox".as_ref(), bundle.as_os_str()])?;
    Ok(bundle)
}

/// A bundle beside `bundle`, with the same root file system, that runs `args`.
///
/// # Errors
/// What its script says.
pub fn with(bundle: &Path, name: &str, args: &[&str]) -> Result<PathBuf> {
    let folder = bundle.with_file_name(name);
    let mut words = vec![bundle.as_os_str(), folder.as_os_str(), "--".as_ref()];
    words.extend(args.iter().map(OsStr::new));
    example("config-with", &words)?;
    Ok(folder)
}

/// Runs a script of the checkout's `examples`.
fn example(script: &str, args: &[&OsStr]) -> Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples").join(script);
    let output = Command::new(&path).args(args).output().with_context(|| format!("cannot run {}", path.display()))?;
    ensure!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
