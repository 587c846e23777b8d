//! `katavm delete`

use std::time::Duration;

use anyhow::bail;

use super::arguments::{Delete, Global};
use super::state_root;
use crate::hooks::{self, Point};
use crate::host;
use crate::service::{Client, ClientError};
use crate::state::{Found, Id, StateError, StateRoot, Status};

/// How long a sandbox process may take to end once its container was killed, before it is killed itself.
const PATIENCE: Duration = Duration::from_secs(30);

/// Removes a container.
///
/// # Errors
/// That it runs, or that there is none; neither with `--force`.
pub fn delete(global: &Global, options: &Delete) -> anyhow::Result<u8> {
    let root = state_root(global)?;
    if options.force {
        by_force(&root, &options.id)?;
        return Ok(0);
    }
    let found = root.find(&options.id)?;
    if found.record.status != Status::Stopped {
        bail!("cannot delete container {} that is not stopped: {}", options.id, found.record.status);
    }
    remove(&root, &found)?;
    Ok(0)
}

/// Kills what runs of a container, and removes it; no error if there is none.
///
/// # Errors
/// When something of it cannot be removed.
pub fn by_force(root: &StateRoot, id: &Id) -> anyhow::Result<()> {
    let found = match root.find(id) {
        Ok(found) => found,
        Err(StateError::Unknown(_)) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    if found.alive && found.record.status != Status::Stopped {
        // A guest that does not answer is ended with its sandbox process, below.
        if let Err(error) = Client::connect(&found.path, id.as_str()).and_then(|c| c.kill("", libc::SIGKILL, true)) {
            log::info!("cannot kill container {id} by its sandbox process: {error}");
        }
    }
    remove(root, &found)
}

/// Waits for the end of a container that has stopped or was killed, and removes what is left.
fn remove(root: &StateRoot, found: &Found) -> anyhow::Result<()> {
    let id = &found.record.id;
    if found.alive {
        match Client::connect(&found.path, id.as_str()).and_then(|client| client.wait_and_delete(PATIENCE)) {
            Ok(()) => {}
            // The sandbox process has ended with its last container.
            Err(ClientError::Connection(_) | ClientError::Io(_)) => {}
            Err(error @ ClientError::Refused(_)) => log::debug!("{error}"),
        }
        if !is_over(root, found)? {
            log::warn!("the sandbox process of {id} does not end: killed");
            host::kill(found.record.sandbox_pid)?;
        }
    }
    if found.record.pid != found.record.sandbox_pid {
        // The stand-in ends with its link; until then it is in the control group.
        host::wait_for_end(found.record.pid, PATIENCE)?;
    }
    root.remove(id)?;
    hooks::run_all(found.record.hooks.as_ref(), Point::Poststop, &found.record.for_hooks(Status::Stopped));
    Ok(())
}

/// Waits for the end of the sandbox process, which goes on while there are other containers in the sandbox.
fn is_over(root: &StateRoot, found: &Found) -> anyhow::Result<bool> {
    let lives = || root.find(&found.record.id).is_ok_and(|found| found.alive);
    if !lives() && root.has_peers(found)? {
        return Ok(true);
    }
    Ok(host::wait_for_end(found.record.sandbox_pid, PATIENCE)? || !lives())
}
