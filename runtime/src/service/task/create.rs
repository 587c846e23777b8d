//! A further container, for a client that has claimed its state and made its stand-in.

use std::path::Path;
use std::sync::Arc;

use containerd_shim_protos::api::CreateTaskRequest;

use super::super::attach::Attached;
use crate::config::Bundle;
use crate::pod::{Pod, PodError};
use crate::sandbox::blocking;
use crate::service::{ShortPath, member};

/// Makes the container that `attached` is for; the pid of its stand-in. `directory` has the sockets of the service.
///
/// # Errors
/// Any [`PodError`]; nothing is left of it then.
pub async fn create(
    pod: &Arc<Pod>,
    directory: &ShortPath,
    attached: Attached,
    request: CreateTaskRequest,
) -> Result<u32, PodError> {
    let Attached { io, link, state } = attached;
    let Some(state) = state else { return Err(PodError::State(format!("no state was passed for {}", request.id))) };
    let directory = directory.clone();
    let plan = move || {
        let record = state.read()?;
        let bundle = Bundle::load(Path::new(&request.bundle))?;
        member(&directory, &bundle, state, record, io, Some(link))
    };
    let planned = blocking(move || plan().map_err(std::io::Error::other)).await;
    let new = planned.map_err(|error| PodError::State(error.to_string()))?;
    let id = new.id.clone();
    pod.create(new).await?;
    let container = pod.container(&id)?;
    container.keep();
    Ok(container.record().pid)
}
