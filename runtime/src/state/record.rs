//! The record of one container, `state.json`.

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Hooks;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Id;
use crate::host::{self, Cgroup};

/// How far a container is (OCI runtime specification, "State"; `paused` as runc has it).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Being made.
    Creating,
    /// Its process waits to be started.
    Created,
    /// Its process runs.
    Running,
    /// Its processes are frozen.
    Paused,
    /// Its process has ended.
    Stopped,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        })
    }
}

/// What is known about a container. The first names are those of the specification's state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// Of the specification.
    pub oci_version: String,
    /// The container's id.
    pub id: Id,
    /// How far it is.
    pub status: Status,
    /// The process that stands for it on the host; before there is one, the sandbox process.
    pub pid: u32,
    /// The bundle's absolute path.
    pub bundle: PathBuf,
    /// Those of the configuration.
    #[serde(default)]
    pub annotations: HashMap<String, String>,
    /// The root file system on the host.
    pub rootfs: PathBuf,
    /// When it was made, in nanoseconds since the epoch.
    pub created_ns: u64,
    /// The user who made it.
    pub uid: u32,
    /// The sandbox process.
    pub sandbox_pid: u32,
    /// The control group of the sandbox on the host.
    #[serde(default)]
    pub cgroup: Option<Cgroup>,
    /// Programs of the engine, for `start` and `delete`.
    #[serde(default)]
    pub hooks: Option<Hooks>,
    /// There is no container: it is a sandbox that is there before its first one.
    #[serde(default)]
    pub is_sandbox: bool,
    /// It stays until it is deleted: made by `create` or `run --detach`.
    pub kept: bool,
}

impl Record {
    /// Of a container that this process is about to make.
    #[must_use]
    pub fn new(id: &Id, bundle: &Path, rootfs: &Path) -> Self {
        Self {
            oci_version: "1.2.0".into(),
            id: id.clone(),
            status: Status::Creating,
            pid: std::process::id(),
            bundle: bundle.into(),
            annotations: HashMap::new(),
            rootfs: rootfs.into(),
            created_ns: host::now_ns(),
            uid: rustix::process::getuid().as_raw(),
            sandbox_pid: std::process::id(),
            cgroup: None,
            hooks: None,
            is_sandbox: false,
            kept: false,
        }
    }

    /// What a hook is told (OCI runtime specification, "State").
    #[must_use]
    pub fn for_hooks(&self, status: Status) -> Value {
        json!({
            "ociVersion": self.oci_version,
            "id": self.id,
            "status": status,
            "pid": if status == Status::Stopped { 0 } else { self.pid },
            "bundle": self.bundle,
            "annotations": self.annotations,
        })
    }

    pub(super) fn write(&self, path: &Path) -> io::Result<()> {
        let scratch = path.with_extension("json.new");
        fs::write(&scratch, serde_json::to_vec_pretty(self)?)?;
        fs::rename(scratch, path)
    }

    pub(super) fn read(path: &Path) -> io::Result<Self> {
        Ok(serde_json::from_slice(&fs::read(path)?)?)
    }
}
