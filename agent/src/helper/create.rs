//! A container and its first process, by libcontainer.

use std::error::Error as _;
use std::path::Path;

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::error::LibcontainerError;
use libcontainer::syscall::syscall::SyscallType;
use oci_spec::runtime::Spec;

use super::{CreateTask, copy_up, cwd, program, trace};
use crate::container::spec::is_below_mount;
use crate::error::Error;

/// Makes the container; the pid of its first process, which waits to be started.
///
/// # Errors
/// What libcontainer says, worded like runc where people look for it.
pub fn run(directory: &Path, task: &CreateTask) -> Result<i32, Error> {
    trace::install();
    prepare_cwd(directory)?;
    let pid = build(directory, task).map_err(|error| explain(&error))?;
    if !task.copy_up.is_empty() {
        copy_up::run(spec(directory)?.root().as_ref().map_or(Path::new("/"), |root| root.path()), pid, &task.copy_up)?;
    }
    Ok(pid)
}

fn spec(directory: &Path) -> Result<Spec, Error> {
    Spec::load(directory.join("config.json")).map_err(|error| Error::Invalid(error.to_string()))
}

fn build(directory: &Path, task: &CreateTask) -> Result<i32, LibcontainerError> {
    let container = ContainerBuilder::new(task.id.clone(), SyscallType::Linux)
        .with_executor(program::Program)
        .with_root_path(directory.join("state"))?
        .with_console_socket(task.console.as_ref())
        .as_init(directory)
        .with_systemd(false)
        .with_detach(true)
        .build()?;
    container.pid().map(|pid| pid.as_raw()).ok_or_else(|| LibcontainerError::Other("no pid".into()))
}

/// runc makes a working directory that is not there; libcontainer does not.
fn prepare_cwd(directory: &Path) -> Result<(), Error> {
    let spec = spec(directory)?;
    let (Some(root), Some(process)) = (spec.root(), spec.process()) else { return Ok(()) };
    if !root.path().is_dir() {
        return Err(Error::NotFound(format!("rootfs ({:?}) does not exist", root.path().display())));
    }
    cwd::note(process.cwd());
    if !is_below_mount(&spec, process.cwd())
        && let Err(error) = cwd::make(root.path(), process.cwd())
    {
        // Whether that matters shows when the process changes to it.
        crate::debug!("cannot make {}: {error}", process.cwd().display());
    }
    Ok(())
}

/// libcontainer's error with its causes.
fn explain(error: &LibcontainerError) -> Error {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        cause = inner.source();
    }
    match error {
        LibcontainerError::InvalidSpec(_) => Error::Invalid(text),
        _ => Error::Internal(text),
    }
}
