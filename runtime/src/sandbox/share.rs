//! The files of the host that the guest sees.

use std::io;
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

/// Opens the exports of a plan and puts them into one share.
///
/// # Errors
/// Which of them cannot be opened or served.
pub fn open(exports: &[Export]) -> Result<FsShare, ShareError> {
    let share = FsShare::new();
    for export in exports {
        let options = ExportOptions { read_only: export.read_only, ..ExportOptions::default() };
        let added = host::open_shared(&export.path).and_then(|(fd, _)| share.add_export(&export.name, fd, options));
        added.map_err(|error| ShareError { path: export.path.clone(), error })?;
    }
    Ok(share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_gone_is_named() {
        let export = Export { name: "rootfs".into(), path: "/nowhere".into(), read_only: false };
        let error = open(&[export]).err().map(|error| error.to_string()).unwrap();
        assert!(error.starts_with("cannot share /nowhere with the guest: No such file"), "{error}");
    }

    #[test]
    fn files_and_directories_are_shared() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "x").unwrap();
        let export = |name: &str, path| Export { name: name.into(), path, read_only: true };
        open(&[export("d", dir.path().to_owned()), export("f", file)]).unwrap();
    }
}
