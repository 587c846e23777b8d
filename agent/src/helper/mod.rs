//! The helper: this binary executed anew, with one thread, to make one process of a container.
//!
//! It clones and enters namespaces, which a process with several threads cannot do safely. Its standard streams are
//! those of the process that it makes; it is told what to do in `task.json` of a directory, and says what came of it
//! in `report`. When it ends, the process that it made is PID 1's child.

mod copy_up;
mod create;
mod cwd;
mod exec;
pub mod id_map;
mod inside;
mod lookup;
pub mod pause;
mod program;
mod report;
mod trace;

use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::resource::{Resource, setrlimit};
use oci_spec::runtime::Process;
use serde::{Deserialize, Serialize};

pub use report::Report;

use crate::boot::NOFILE;
use crate::error::Error;

/// What a helper is to make.
#[derive(Debug, Serialize, Deserialize)]
pub enum Task {
    /// The first process of a container.
    Create(CreateTask),
    /// A further one.
    Exec(Box<ExecTask>),
    /// The first one of the pid namespace of a pod.
    Pause,
}

/// A container by the `config.json` of the directory.
#[derive(Debug, Serialize, Deserialize)]
pub struct CreateTask {
    /// The container's id.
    pub id: String,
    /// The socket that takes its terminal's master.
    pub console: Option<PathBuf>,
    /// Mounts that start with what the root file system has in their places.
    pub copy_up: Vec<PathBuf>,
}

/// A further process of a container, by the container's `config.json` in the directory above.
#[derive(Debug, Serialize, Deserialize)]
pub struct ExecTask {
    /// The container's first process.
    pub init: i32,
    /// The container's cgroup.
    pub cgroup: PathBuf,
    /// The socket that takes its terminal's master.
    pub console: Option<PathBuf>,
    /// What to execute, and as whom.
    pub process: Process,
}

impl Task {
    /// The helper's first argument, by which the binary knows that it is one.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Create(_) => "container-create",
            Self::Exec(_) => "container-exec",
            Self::Pause => "pod-pause",
        }
    }
}

/// Whether this execution of the binary is a helper's.
pub fn is_helper(name: &str) -> bool {
    matches!(name, "container-create" | "container-exec" | "pod-pause")
}

/// Does the task of `directory`; the status to exit with.
pub fn run(directory: &Path) -> i32 {
    let result = report::open(directory).and_then(|()| {
        let path = directory.join("task.json");
        let text = fs::read(&path).map_err(|error| Error::io(path.display(), error))?;
        let task = serde_json::from_slice(&text).map_err(|error| Error::Internal(format!("task.json: {error}")))?;
        // What PID 1 raised for itself is not for containers.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, NOFILE.0, NOFILE.1);
        match task {
            Task::Create(task) => create::run(directory, &task),
            Task::Exec(task) => exec::run(directory, *task),
            Task::Pause => pause::make(),
        }
    });
    match result {
        Ok(pid) => {
            report::write(&Report::Made { pid });
            0
        }
        Err(error) => {
            report::write(&Report::Failed { error });
            1
        }
    }
}
