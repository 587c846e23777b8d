//! A container's root file system, mounted as containerd says.

use std::fs;
use std::path::Path;

use containerd_shim_protos::api::Mount;

use crate::host;

/// Mounts one over the other at `rootfs` of a bundle.
///
/// # Errors
/// Which one cannot be mounted.
pub fn mount(bundle: &Path, mounts: &[Mount]) -> Result<(), String> {
    let target = bundle.join("rootfs");
    if !mounts.is_empty() {
        fs::create_dir_all(&target).map_err(|error| format!("cannot make {}: {error}", target.display()))?;
    }
    for (index, mount) in mounts.iter().enumerate() {
        let mounted = host::mount(&mount.type_, &mount.source, &mount.options, &target);
        if let Err(error) = mounted {
            unmount(bundle, index);
            return Err(format!("cannot mount the root file system ({} {}): {error}", mount.type_, mount.source));
        }
    }
    Ok(())
}

/// Takes off what was mounted.
pub fn unmount(bundle: &Path, count: usize) {
    let target = bundle.join("rootfs");
    for _ in 0..count {
        if let Err(error) = host::unmount(&target) {
            log::warn!("cannot unmount {}: {error}", target.display());
        }
    }
}
