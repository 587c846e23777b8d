//! `delete`: removes what is left of a container whose server is gone, or was never asked to make it.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use containerd_shim_protos::api::{DeleteRequest, DeleteResponse, KillRequest, ShutdownRequest, WaitRequest};
use containerd_shim_protos::shim_async::TaskClient;
use protobuf::Message as _;
use tokio::net::UnixStream;
use ttrpc::r#async::Client as Connection;
use ttrpc::r#async::transport::Socket;
use ttrpc::context::{Context, with_duration};

use super::address::{Address, group, named_group};
use super::arguments::Arguments;
use super::containers::PID_FILE;
use super::server::state_root;
use crate::hooks::{self, Point};
use crate::host;
use crate::service::timestamp;
use crate::state::{Found, Id, StateRoot, Status};

/// How long a server that lives may take to end the container; containerd waits for 5 s in all.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long killed processes may take to end.
const LAST_PATIENCE: Duration = Duration::from_secs(1);

/// Kills what runs of the container, and removes it; what containerd is told of that, serialised.
///
/// # Errors
/// When something of it cannot be removed.
pub fn delete(arguments: &Arguments) -> anyhow::Result<Vec<u8>> {
    let id: Id = arguments.id.parse()?;
    let root = StateRoot::open(state_root(&arguments.namespace))?;
    let found = root.find(&id).ok();
    let address = address(arguments, found.as_ref());
    if let Err(error) = ask(&address, id.as_str()) {
        log::debug!("the server of container {id}: {error:#}");
    }
    if let Some(found) = &found {
        end(&root, found)?;
        root.remove(&id)?;
        hooks::run_all(found.record.hooks.as_ref(), Point::Poststop, &found.record.for_hooks(Status::Stopped));
    }
    root.sweep()?;
    address.sweep().context("cannot remove the server's socket")?;
    let noted = arguments.bundle.as_ref().and_then(|bundle| noted_pid(bundle));
    let response = DeleteResponse {
        pid: found.map(|found| found.record.pid).or(noted).unwrap_or_default(),
        exit_status: 128 + libc::SIGKILL.unsigned_abs(),
        exited_at: timestamp(host::now_ns()),
        ..Default::default()
    };
    Ok(response.write_to_bytes()?)
}

/// Where the container's server is, if it lives. The bundle may be gone by now; what was written down is not.
fn address(arguments: &Arguments, found: Option<&Found>) -> Address {
    let named = found.and_then(|found| named_group(|name| found.record.annotations.get(name).map(String::as_str)));
    let bundle = arguments.bundle.as_deref().unwrap_or(Path::new("."));
    if let Some(noted) = Address::of_bundle(bundle) {
        return noted;
    }
    let group = named.map_or_else(|| group(bundle, &arguments.id), str::to_owned);
    Address::of(&arguments.address, &arguments.namespace, &group)
}

/// The pid that the server has written to the bundle.
fn noted_pid(bundle: &Path) -> Option<u32> {
    std::fs::read_to_string(bundle.join(PID_FILE)).ok()?.trim().parse().ok()
}

/// Has a server that lives end the container, and itself if that was the last one.
fn ask(address: &Address, id: &str) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // The timer wants the runtime around it.
    let asked = runtime.block_on(async { tokio::time::timeout(PATIENCE, end_by_server(address, id)).await });
    runtime.shutdown_background();
    asked.context("it does not answer")?
}

async fn end_by_server(address: &Address, id: &str) -> anyhow::Result<()> {
    let stream = UnixStream::connect(address.path()).await.context("it does not live")?;
    let server = TaskClient::new(Connection::new(Socket::new(stream)));
    let deadline = Instant::now() + PATIENCE;
    let soon = || -> Context { with_duration(deadline.saturating_duration_since(Instant::now())) };
    let id = id.to_owned();
    let signal = libc::SIGKILL.unsigned_abs();
    // One that has ended, or was never made, needs none of these.
    let kill = KillRequest { id: id.clone(), signal, all: true, ..Default::default() };
    drop(server.kill(soon(), &kill).await);
    drop(server.wait(soon(), &WaitRequest { id: id.clone(), ..Default::default() }).await);
    drop(server.delete(soon(), &DeleteRequest { id: id.clone(), ..Default::default() }).await);
    server.shutdown(soon(), &ShutdownRequest { id, ..Default::default() }).await.context("shut down")?;
    Ok(())
}

/// Sees to it that nothing of the container runs.
fn end(root: &StateRoot, found: &Found) -> anyhow::Result<()> {
    let (id, record) = (&found.record.id, &found.record);
    if root.find(id).is_ok_and(|found| found.alive) {
        if root.has_peers(found)? {
            bail!("container {id} cannot be ended: its sandbox process {} does not answer", record.sandbox_pid);
        }
        log::warn!("the sandbox process of {id} does not end: killed");
        host::kill(record.sandbox_pid)?;
        host::wait_for_end(record.sandbox_pid, LAST_PATIENCE)?;
    }
    if record.pid != record.sandbox_pid {
        // The stand-in ends with its link.
        host::wait_for_end(record.pid, LAST_PATIENCE)?;
    }
    Ok(())
}
