//! The record of one sandbox, `state.json`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Id;

/// How far a container is (OCI runtime specification, "State").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Being made.
    Creating,
    /// Its process runs.
    Running,
    /// Its process has ended.
    Stopped,
}

/// What is known about a sandbox. The names are those of the specification's state, where it has one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// Of the specification.
    pub oci_version: String,
    /// The container's id.
    pub id: Id,
    /// How far it is.
    pub status: Status,
    /// The sandbox process.
    pub pid: u32,
    /// The bundle's absolute path.
    pub bundle: PathBuf,
}

impl Record {
    /// Of a container that this process is about to make.
    #[must_use]
    pub fn new(id: &Id, bundle: &Path) -> Self {
        Self {
            oci_version: "1.2.0".into(),
            id: id.clone(),
            status: Status::Creating,
            pid: std::process::id(),
            bundle: bundle.into(),
        }
    }

    pub(super) fn write(&self, path: &Path) -> io::Result<()> {
        let scratch = path.with_extension("json.new");
        fs::write(&scratch, serde_json::to_vec_pretty(self)?)?;
        fs::rename(scratch, path)
    }
}
