//! A container's root file system, as containerd says: on disks that the guest mounts, or mounted here and shared.

use std::fs;
use std::path::{Path, PathBuf};

use containerd_shim_protos::api::Mount;

use super::layers;
use crate::config::{FileSystem, GuestRoot};
use crate::host::{self, FileKind};
use crate::sandbox::disk;

/// How a container has its root file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rootfs {
    /// So many are mounted here, one over the other.
    Mounted(usize),
    /// The guest mounts it.
    InGuest(GuestRoot),
}

impl Rootfs {
    /// What the guest is to mount.
    #[must_use]
    pub fn in_guest(&self) -> Option<&GuestRoot> {
        match self {
            Self::InGuest(root) => Some(root),
            Self::Mounted(_) => None,
        }
    }

    /// Makes what is here of it: for disks an empty folder, else all the mounts.
    ///
    /// # Errors
    /// Which one cannot be mounted.
    pub fn make(bundle: &Path, mounts: &[Mount]) -> Result<Self, String> {
        match on_disks(mounts) {
            Some(root) => make_folder(&folder(bundle)).map(|()| Self::InGuest(root)),
            None => Self::mount(bundle, mounts),
        }
    }

    /// Mounts it here, whatever it is on.
    ///
    /// # Errors
    /// Which one cannot be mounted.
    pub fn mount(bundle: &Path, mounts: &[Mount]) -> Result<Self, String> {
        let target = folder(bundle);
        if !mounts.is_empty() {
            make_folder(&target)?;
        }
        for (index, mount) in mounts.iter().enumerate() {
            let mounted = host::mount(&mount.type_, &mount.source, &mount.options, &target);
            if let Err(error) = mounted {
                Self::Mounted(index).unmount(bundle);
                return Err(format!("cannot mount the root file system ({} {}): {error}", mount.type_, mount.source));
            }
        }
        Ok(Self::Mounted(mounts.len()))
    }

    /// Takes off what was mounted here.
    pub fn unmount(&self, bundle: &Path) {
        let Self::Mounted(count) = self else { return };
        let target = folder(bundle);
        for _ in 0..*count {
            if let Err(error) = host::unmount(&target) {
                log::warn!("cannot unmount {}: {error}", target.display());
            }
        }
    }
}

fn folder(bundle: &Path) -> PathBuf {
    bundle.join("rootfs")
}

fn make_folder(path: &Path) -> Result<(), String> {
    fs::create_dir_all(path).map_err(|error| format!("cannot make {}: {error}", path.display()))
}

/// The one file system of these mounts, if the guest can have it on disks; what is not there is told of where it is mounted.
fn on_disks(mounts: &[Mount]) -> Option<GuestRoot> {
    let [mount] = mounts else { return None };
    if !mount.target.is_empty() {
        return None;
    }
    if mount.type_ == "overlay" {
        return layers::overlay(&mount.options).map(GuestRoot::Overlay);
    }
    if !disk::is_known(&mount.type_) {
        return None;
    }
    match host::open_shared(Path::new(&mount.source)).ok()?.1 {
        FileKind::BlockDevice | FileKind::Regular => Some(GuestRoot::Disk(FileSystem {
            kind: mount.type_.clone(),
            source: PathBuf::from(&mount.source),
            options: mount.options.clone(),
        })),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, source: &Path) -> Mount {
        Mount {
            type_: kind.into(),
            source: source.to_str().unwrap().into(),
            options: vec!["loop".into(), "rw".into()],
            ..Default::default()
        }
    }

    #[test]
    fn one_file_system_in_an_image_is_the_guests_to_mount() {
        let bundle = tempfile::tempdir().unwrap();
        let image = bundle.path().join("image");
        fs::write(&image, "").unwrap();
        let rootfs = Rootfs::make(bundle.path(), &[mount("ext4", &image)]).unwrap();
        let expected = FileSystem { kind: "ext4".into(), source: image, options: vec!["loop".into(), "rw".into()] };
        assert_eq!(rootfs.in_guest(), Some(&GuestRoot::Disk(expected)));
        assert!(folder(bundle.path()).is_dir());
        assert_eq!(Rootfs::make(bundle.path(), &[]), Ok(Rootfs::Mounted(0)), "a rootfs that is there");
    }

    #[test]
    fn what_the_guest_cannot_mount_is_mounted_here() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        fs::write(&image, "").unwrap();
        let both = [mount("ext4", &image), mount("ext4", &image)];
        let below = Mount { target: "/data".into(), ..mount("ext4", &image) };
        let none: [&[Mount]; 5] = [
            &both,
            &[below],
            &[mount("xfs", &image)],
            &[mount("ext4", folder.path())],
            &[mount("ext4", Path::new("/nowhere"))],
        ];
        for mounts in none {
            assert_eq!(on_disks(mounts), None, "{mounts:?}");
        }
    }
}
