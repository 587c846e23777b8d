//! A further container in a sandbox that is there.

use std::path::Path;
use std::sync::Arc;

use containerd_shim_protos::api::CreateTaskRequest;

use super::super::attach::Attached;
use crate::config::Bundle;
use crate::membership::shared_namespaces;
use crate::pod::{NewContainer, Pod, PodError};
use crate::sandbox::blocking;
use crate::sandbox::plan::{Plan, SizeOptions};
use crate::service::share;
use crate::state::{Journal, Record, StateDir};

/// Makes the container that `attached` is for; the pid of its stand-in. `directory` has the sockets of the service.
///
/// # Errors
/// Any [`PodError`]; nothing is left of it then.
pub async fn create(
    pod: &Arc<Pod>,
    directory: &Path,
    attached: Attached,
    request: CreateTaskRequest,
) -> Result<u32, PodError> {
    let Attached { io, link, state } = attached;
    let Some(state) = state else { return Err(PodError::State(format!("no state was passed for {}", request.id))) };
    let directory = directory.to_owned();
    let planned = blocking(move || plan(&directory, state, &request).map_err(std::io::Error::other)).await;
    let (plan, state, record) = planned.map_err(|error| PodError::State(error.to_string()))?;
    let new = NewContainer {
        id: record.id.to_string(),
        spec: plan.guest_spec,
        exports: plan.exports,
        io,
        link: Some(link),
        journal: Journal::new(state, record),
        cgroup: None,
    };
    let id = new.id.clone();
    pod.create(new).await?;
    let container = pod.container(&id)?;
    container.keep();
    Ok(container.record().pid)
}

fn plan(directory: &Path, state: StateDir, request: &CreateTaskRequest) -> anyhow::Result<(Plan, StateDir, Record)> {
    let mut record = state.read()?;
    record.sandbox_pid = std::process::id();
    let bundle = Bundle::load(Path::new(&request.bundle))?;
    let shared = shared_namespaces(state.root(), &record.id, &bundle.spec)?;
    let plan = Plan::new(&record.id, &bundle, SizeOptions::default(), &shared)?;
    share(directory, state.path())?;
    Ok((plan, state, record))
}
