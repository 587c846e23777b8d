//! Puts kernel and initramfs into one folder, the guest image.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process;

use anyhow::{Context, Result};

use crate::support::cache::{self, Inputs};
use crate::support::step::say;
use crate::{initramfs, kernel};

/// The link, under the cache's root, to the image built last; `katavm` boots from it by default.
pub const CURRENT: &str = "guest-image/current";

/// Builds the whole image and returns its folder, to which [`CURRENT`] then leads.
///
/// # Errors
/// What the builders of the kernel and of the initramfs return, or a failure to make the folder.
pub fn build() -> Result<PathBuf> {
    let kernel = kernel::build()?;
    let initramfs = initramfs::build()?;
    let folders = [&kernel, &initramfs].map(|folder| folder.to_string_lossy().into_owned());
    let inputs = Inputs::new("guest-image 1").text("parts", &folders.join("\n"));
    let image = cache::artefact("guest-image", inputs, |folder| {
        for name in kernel::FILES {
            take(&kernel, name, folder)?;
        }
        take(&initramfs, initramfs::FILE, folder)
    })?;
    point_current_at(&image)?;
    Ok(image)
}

/// Says on stderr how big the parts of an image are.
///
/// # Errors
/// When the folder cannot be read.
pub fn report_sizes(image: &Path) -> Result<()> {
    for name in ["vmlinux", "bzImage", initramfs::FILE] {
        let path = image.join(name);
        if path.exists() {
            let bytes = fs::metadata(&path)?.len();
            // Exact up to 2^52 bytes.
            #[allow(clippy::cast_precision_loss)]
            say(&format!("{name}: {:.2} MiB ({bytes} bytes)", bytes as f64 / f64::from(1 << 20)));
        }
    }
    Ok(())
}

/// A hard link: both folders are in the cache, and artefacts do not change.
fn take(from: &Path, name: &str, to: &Path) -> Result<()> {
    fs::hard_link(from.join(name), to.join(name))
        .with_context(|| format!("cannot link {} into {}", from.join(name).display(), to.display()))
}

/// Replaces the link in one step, so that a `katavm` that starts now finds the old image or the new one.
fn point_current_at(image: &Path) -> Result<()> {
    let link = cache::root()?.join(CURRENT);
    let folder = link.parent().context("the cache's root has no folder")?;
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let image = fs::canonicalize(image)?;
    if fs::read_link(&link).is_ok_and(|target| target == image) {
        return Ok(());
    }
    let fresh = folder.join(format!("current.{}", process::id()));
    symlink(&image, &fresh)?;
    fs::rename(&fresh, &link).with_context(|| format!("cannot replace {}", link.display()))
}
