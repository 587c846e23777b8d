//! Commands that ask the sandbox process for one thing: `start`, `kill`, `pause`, `resume`.

use anyhow::bail;

use super::arguments::{Global, Kill};
use super::find;
use crate::hooks::{self, Point};
use crate::service::Client;
use crate::state::{Found, Id, Status};

/// The sandbox process of a container that must live.
///
/// # Errors
/// That it does not.
pub fn client(found: &Found, otherwise: &str) -> anyhow::Result<Client> {
    if !found.alive || found.record.status == Status::Stopped {
        bail!("{otherwise}");
    }
    Ok(Client::connect(&found.path, found.record.id.as_str())?)
}

/// Starts the process of a container that was created.
///
/// # Errors
/// That it is in another state, or that it cannot be started.
pub fn start(global: &Global, id: &Id) -> anyhow::Result<u8> {
    let found = find(global, id)?;
    let client = client(&found, "cannot start a container that has stopped")?;
    client.start("")?;
    let state = found.record.for_hooks(Status::Running);
    if let Err(error) = hooks::run(found.record.hooks.as_ref(), Point::Poststart, &state) {
        // As with runc: a container whose engine cannot follow must not run.
        client.kill("", libc::SIGKILL, true)?;
        return Err(error.into());
    }
    Ok(0)
}

/// Sends a signal to a container.
///
/// # Errors
/// That it does not run.
pub fn kill(global: &Global, options: &Kill) -> anyhow::Result<u8> {
    let found = find(global, &options.id)?;
    if options.all && !found.alive {
        // As with runc: there is nobody left who could be meant.
        return Ok(0);
    }
    client(&found, "container not running")?.kill("", options.signal, options.all)?;
    Ok(0)
}

/// Freezes a container.
///
/// # Errors
/// That it does not run.
pub fn pause(global: &Global, id: &Id) -> anyhow::Result<u8> {
    client(&find(global, id)?, "container not running or created: stopped")?.pause()?;
    Ok(0)
}

/// Thaws a container.
///
/// # Errors
/// That it is not frozen.
pub fn resume(global: &Global, id: &Id) -> anyhow::Result<u8> {
    client(&find(global, id)?, "container not paused")?.resume()?;
    Ok(0)
}
