//! The files of the host that the guest sees.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use katavm_devices::fs::{ExportOptions, FsShare};

use super::plan::Export;
use crate::host;

/// Why something cannot be shared.
#[derive(Debug, thiserror::Error)]
#[error("cannot share {path} with the guest: {error}")]
pub struct ShareError {
    /// On the host.
    path: PathBuf,
    /// What the system said.
    error: io::Error,
}

/// Exports of one container in its guest's share; they are taken out again when this is dropped.
pub struct Exports {
    share: FsShare,
    names: Vec<String>,
}

impl Exports {
    /// Opens the exports of a plan and puts them into the share.
    ///
    /// # Errors
    /// Which of them cannot be opened or served; none is in the share then.
    pub fn add(share: &FsShare, exports: &[Export]) -> Result<Self, ShareError> {
        let mut added = Self { share: share.clone(), names: Vec::with_capacity(exports.len()) };
        for export in exports {
            let options = ExportOptions { read_only: export.read_only, ..ExportOptions::default() };
            let put = open(export).and_then(|fd| share.add_export(&export.name, fd, options));
            put.map_err(|error| ShareError { path: export.path.clone(), error })?;
            added.names.push(export.name.clone());
        }
        Ok(added)
    }
}

fn open(export: &Export) -> io::Result<OwnedFd> {
    let Some(id_map) = &export.id_map else { return Ok(host::open_shared(&export.path)?.0) };
    let tree = host::clone_tree(&export.path)?;
    let refused =
        |error: io::Error| io::Error::new(error.kind(), format!("its file system cannot be identity-mapped: {error}"));
    id_map.apply(&tree).map_err(refused)?;
    Ok(tree)
}

impl Drop for Exports {
    fn drop(&mut self) {
        for name in &self.names {
            self.share.remove_export(name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_gone_is_named() {
        let export = Export { name: "rootfs".into(), path: "/nowhere".into(), read_only: false, id_map: None };
        let error = Exports::add(&FsShare::new(), &[export]).err().map(|error| error.to_string()).unwrap();
        assert!(error.starts_with("cannot share /nowhere with the guest: No such file"), "{error}");
    }

    #[test]
    fn files_and_directories_are_shared() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "x").unwrap();
        let export = |name: &str, path| Export { name: name.into(), path, read_only: true, id_map: None };
        let exports = [export("d", dir.path().to_owned()), export("f", file)];
        let share = FsShare::new();
        let added = Exports::add(&share, &exports).unwrap();
        assert!(Exports::add(&share, &exports).is_err(), "the names are taken");
        drop(added);
        Exports::add(&share, &exports).unwrap();
    }
}
