//! The files of the host that the guest sees.

use std::collections::HashMap;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use katavm_devices::fs::{ExportOptions, FsShare, HostMounts, MountEntry};
use oci_spec::runtime::Spec;

use super::plan::{Export, SHARED};
use crate::host::{self, Place};

/// In a container's own root file system nobody else makes files, but for a `cp` of an engine now and then: so a name that was
/// not there is not looked for again in this time. In volumes it is, each time.
const ROOT_CACHE_ABSENT: Duration = Duration::from_secs(1);

/// Why something cannot be shared.
#[derive(Debug, thiserror::Error)]
#[error("cannot share {path} with the guest: {error}")]
pub struct ShareError {
    /// On the host.
    path: PathBuf,
    /// What the system said.
    error: io::Error,
}

/// What the containers of a guest see of the host. A directory that several of them have as a volume is one to the guest
/// as well: only so are its sockets, named pipes, locks and mapped files the same to all.
#[derive(Clone, Default)]
pub struct Share {
    files: FsShare,
    volumes: Arc<Mutex<Volumes>>,
    /// None where mounts cannot be watched: their files stay open when they go.
    _watch: Option<Arc<MountWatch>>,
}

/// A file server for one guest that lets the host unmount what is mounted below the files that are shared.
#[must_use]
pub fn file_server() -> FsShare {
    struct Mounts;
    impl HostMounts for Mounts {
        fn copy(&self, root: BorrowedFd<'_>) -> io::Result<OwnedFd> {
            host::private_copy(root)
        }
        fn list(&self) -> io::Result<Vec<MountEntry>> {
            host::list_mounts()
        }
    }
    FsShare::over(Arc::new(Mounts))
}

/// A thread that tells a file server of changes of the mount table. It ends when this is dropped.
struct MountWatch {
    _stop: io::PipeWriter,
}

impl MountWatch {
    fn start(files: FsShare) -> io::Result<Self> {
        let (stopped, stop) = io::pipe()?;
        let changes = host::MountChanges::watch()?;
        thread::Builder::new().name("mounts".into()).spawn(move || {
            loop {
                match changes.wait(stopped.as_fd()) {
                    Ok(true) => files.refresh_mounts(),
                    Ok(false) => return,
                    Err(error) => return log::warn!("mounts are not watched any more: {error}"),
                }
            }
        })?;
        Ok(Self { _stop: stop })
    }
}

#[derive(Default)]
struct Volumes {
    /// How many names have been given.
    named: u64,
    by_place: HashMap<Place, Volume>,
}

struct Volume {
    name: String,
    users: usize,
    read_only: bool,
}

/// Exports of one container in its guest's share. They are taken out again with the last container that has them, when
/// these are released or dropped.
pub struct Exports {
    share: Share,
    held: Vec<Held>,
}

struct Held {
    /// As it was planned.
    planned: String,
    /// As it is in the share.
    name: String,
    /// Of one that may be shared.
    place: Option<Place>,
}

impl Share {
    /// Over the guest's file server.
    #[must_use]
    pub fn over(files: FsShare) -> Self {
        let watch = MountWatch::start(files.clone());
        let watch = watch.inspect_err(|error| log::warn!("mounts are not watched: {error}")).ok();
        Self { files, volumes: Arc::default(), _watch: watch.map(Arc::new) }
    }

    /// Opens the exports of a plan and puts those into the share that are not there yet.
    ///
    /// # Errors
    /// Which of them cannot be opened or served; nothing is in the share then that was not before.
    pub fn add(&self, exports: &[Export]) -> Result<Exports, ShareError> {
        let mut added = Exports { share: self.clone(), held: Vec::with_capacity(exports.len()) };
        for export in exports {
            let put = self.put(export).map_err(|error| ShareError { path: export.path.clone(), error })?;
            added.held.push(put);
        }
        Ok(added)
    }

    fn put(&self, export: &Export) -> io::Result<Held> {
        let planned = export.name.clone();
        let cache_absent = if export.is_volume { Duration::ZERO } else { ROOT_CACHE_ABSENT };
        let only = export.only.iter().map(|name| CString::new(name.as_str())).collect::<Result<_, _>>()?;
        // One of which not all is shown is the upper layer of an overlay.
        let (read_only, drop_labels) = (export.read_only, !export.only.is_empty());
        let options = ExportOptions { read_only, cache_absent, only, drop_labels, ..ExportOptions::default() };
        let (fd, place) = open(export)?;
        let Some(place) = place else {
            self.files.add_export(&planned, fd, options)?;
            return Ok(Held { name: planned.clone(), planned, place });
        };
        let mut volumes = self.volumes();
        if let Some(volume) = volumes.by_place.get_mut(&place) {
            volume.users += 1;
            if volume.read_only && !export.read_only {
                volume.read_only = !self.files.make_writable(&volume.name);
            }
            return Ok(Held { planned, name: volume.name.clone(), place: Some(place) });
        }
        let name = format!("volume-{}", volumes.named);
        self.files.add_export(&name, fd, options)?;
        volumes.named += 1;
        volumes.by_place.insert(place, Volume { name: name.clone(), users: 1, read_only: export.read_only });
        Ok(Held { planned, name, place: Some(place) })
    }

    fn volumes(&self) -> MutexGuard<'_, Volumes> {
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives one up; whether nobody has it any more.
    fn take(&self, held: &Held) -> bool {
        if let Some(place) = held.place {
            let mut volumes = self.volumes();
            if let Some(volume) = volumes.by_place.get_mut(&place) {
                volume.users -= 1;
                if volume.users > 0 {
                    return false;
                }
            }
            volumes.by_place.remove(&place);
            // Under the lock: who comes next must not find it.
            return self.files.remove_export(&held.name);
        }
        self.files.remove_export(&held.name)
    }
}

impl Exports {
    /// Each source in the configuration as it was planned, and as it is.
    pub fn sources(&self) -> impl Iterator<Item = (PathBuf, PathBuf)> {
        let path = |name: &str| Path::new(SHARED).join(name);
        self.held.iter().map(move |held| (path(&held.planned), path(&held.name)))
    }

    /// Gives them up; the names of those that are not in the share any more.
    #[must_use]
    pub fn release(mut self) -> Vec<String> {
        let held = std::mem::take(&mut self.held);
        held.into_iter().filter(|held| self.share.take(held)).map(|held| held.name).collect()
    }
}

impl Drop for Exports {
    fn drop(&mut self) {
        for held in &self.held {
            self.share.take(held);
        }
    }
}

/// A configuration in which mounts have other sources.
///
/// # Errors
/// That it is none.
pub fn with_sources(spec: Vec<u8>, sources: impl Iterator<Item = (PathBuf, PathBuf)>) -> serde_json::Result<Vec<u8>> {
    let sources: HashMap<_, _> = sources.filter(|(planned, is)| planned != is).collect();
    if sources.is_empty() {
        return Ok(spec);
    }
    let mut spec: Spec = serde_json::from_slice(&spec)?;
    for mount in spec.mounts_mut().iter_mut().flatten() {
        if let Some(source) = mount.source().as_ref().and_then(|source| sources.get(source)) {
            mount.set_source(Some(source.clone()));
        }
    }
    serde_json::to_vec(&spec)
}

/// Opens an export; with its place if it may be shared.
fn open(export: &Export) -> io::Result<(OwnedFd, Option<Place>)> {
    let Some(id_map) = &export.id_map else {
        let fd = host::open_shared(&export.path)?.0;
        let place = export.is_volume.then(|| Place::of(&fd)).transpose()?;
        return Ok((fd, place));
    };
    let tree = host::clone_tree(&export.path)?;
    let refused =
        |error: io::Error| io::Error::new(error.kind(), format!("its file system cannot be identity-mapped: {error}"));
    id_map.apply(&tree).map_err(refused)?;
    Ok((tree, None))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn export(name: &str, path: &Path, read_only: bool) -> Export {
        let (name, path, is_volume) = (name.to_owned(), path.to_owned(), name != "rootfs");
        Export { name, path, read_only, id_map: None, is_volume, only: Vec::new() }
    }

    fn sources(exports: &Exports, planned: &[&str]) -> Vec<String> {
        let mounts = planned.iter().map(|name| json!({ "destination": "/x", "source": Path::new(SHARED).join(name) }));
        let spec = json!({ "ociVersion": "1.2.0", "mounts": mounts.collect::<Vec<_>>() });
        let named = with_sources(spec.to_string().into(), exports.sources()).unwrap();
        let named: Value = serde_json::from_slice(&named).unwrap();
        let mounts = named["mounts"].as_array().unwrap();
        mounts.iter().map(|mount| mount["source"].as_str().unwrap().rsplit('/').next().unwrap().to_owned()).collect()
    }

    #[test]
    fn what_is_gone_is_named() {
        let exports = [export("rootfs", Path::new("/nowhere"), false)];
        let error = Share::default().add(&exports).err().map(|error| error.to_string()).unwrap();
        assert!(error.starts_with("cannot share /nowhere with the guest: No such file"), "{error}");
    }

    #[test]
    fn files_and_directories_are_shared() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "x").unwrap();
        let exports = [export("rootfs", dir.path(), true), export("f", &file, true)];
        let share = Share::default();
        let added = share.add(&exports).unwrap();
        assert!(share.add(&exports).is_err(), "the name of the root is taken");
        drop(added);
        share.add(&exports).unwrap();
    }

    #[test]
    fn containers_that_share_a_volume_have_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let (one, other) = (dir.path().join("one"), dir.path().join("other"));
        for path in [&one, &other] {
            std::fs::create_dir(path).unwrap();
        }
        let share = Share::default();
        let first = share.add(&[export("a.1", &one, true), export("a.2", &other, false)]).unwrap();
        let second = share.add(&[export("b.1", &dir.path().join("other/../one"), false)]).unwrap();
        assert_eq!(sources(&first, &["a.1", "a.2", "more"]), ["volume-0", "volume-1", "more"]);
        assert_eq!(sources(&second, &["b.1"]), ["volume-0"]);
        assert_eq!(first.release(), ["volume-1"], "the other is still in use");
        assert_eq!(second.release(), ["volume-0"]);
        let third = share.add(&[export("c.1", &one, false)]).unwrap();
        assert_eq!(sources(&third, &["c.1"]), ["volume-2"], "what the guest knew by the old name is stale");
    }
}
