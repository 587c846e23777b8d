//! The container's root file system and volumes as the stand-in has them: what an engine sees that joins its mount
//! namespace (`podman cp`), or looks through `/proc/<pid>/root`.
//!
//! File systems that only the guest has (tmpfs, the guest's /proc and /sys, those on its disks) are not there. Where the root
//! is one of these, an empty folder is in its place: nobody takes what is written there for the container's.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use crate::host::{self, IdMap};

/// A bind mount of the container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// On the host.
    pub source: PathBuf,
    /// In the container.
    pub destination: PathBuf,
    /// Whether the container may not write to it.
    pub read_only: bool,
    /// Whose its files seem to be.
    pub id_map: Option<IdMap>,
}

/// What a stand-in sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// The root file system on the host.
    pub rootfs: PathBuf,
    /// The guest has the root file system on a disk, and the host has an empty folder.
    pub is_elsewhere: bool,
    /// In the order of their mounting.
    pub volumes: Vec<Volume>,
}

impl View {
    /// The user namespaces that the identity-mapped volumes are mapped by, in the order of these. They are made in the
    /// namespaces of the host: a process can write the maps of one that it knows by its pid in /proc.
    ///
    /// # Errors
    /// Those of [`IdMap::namespace`].
    pub fn id_maps(&self) -> io::Result<Vec<OwnedFd>> {
        self.volumes.iter().filter_map(|volume| volume.id_map.as_ref()).map(IdMap::namespace).collect()
    }

    /// Makes it the calling process' root. The process must have a mount namespace of its own.
    ///
    /// # Errors
    /// Which step failed.
    pub fn take_up(self, id_maps: &[OwnedFd]) -> io::Result<()> {
        let root = self.step("clone", host::clone_tree(&self.rootfs))?;
        if self.is_elsewhere {
            self.step("protect", host::make_read_only(&root))?;
        }
        let mut volumes = Vec::with_capacity(self.volumes.len());
        let mut id_maps = id_maps.iter();
        for volume in &self.volumes {
            let namespace = volume.id_map.as_ref().and_then(|_| id_maps.next());
            volumes.push((self.step("clone", volume.open(namespace))?, volume));
        }
        // Root of a user namespace may mount one only where the engine's is whole.
        let proc = host::new_proc();
        // Any directory will do for the moment: the namespace is this process' alone.
        self.step("change to", host::change_root(&root, Path::new("/proc")))?;
        for (tree, volume) in volumes {
            volume.attach(&tree, &root);
        }
        // A root file system without /proc is possible.
        if let Err(error) = proc.and_then(|proc| host::attach_inside(&proc, &root, Path::new("proc"))) {
            log::debug!("no /proc for the stand-in: {error}");
        }
        Ok(())
    }

    fn step<T>(&self, what: &str, result: io::Result<T>) -> io::Result<T> {
        let rootfs = self.rootfs.display();
        result.map_err(|error| io::Error::new(error.kind(), format!("cannot {what} the root {rootfs}: {error}")))
    }
}

impl Volume {
    fn open(&self, namespace: Option<&OwnedFd>) -> io::Result<OwnedFd> {
        let tree = host::clone_tree(&self.source)?;
        if let (Some(id_map), Some(namespace)) = (&self.id_map, namespace) {
            id_map.set(&tree, namespace)?;
        }
        if self.read_only {
            host::make_read_only(&tree)?;
        }
        Ok(tree)
    }

    /// Its mount point may lie in a file system that only the guest has.
    fn attach(&self, tree: &OwnedFd, root: &OwnedFd) {
        if let Err(error) = host::attach_inside(tree, root, &self.destination) {
            log::debug!("{} is not seen by the stand-in: {error}", self.destination.display());
        }
    }
}
