//! The agent's service, as a client.

use std::collections::HashMap;
use std::io;
use std::os::unix::net::UnixStream;
use std::time::Duration;

pub use katavm_protocol::agent::Process as GuestProcess;
use katavm_protocol::agent::{
    AdjustClockRequest, AttachDiskRequest, AttachDiskResponse, CheckRequest, ConfigureNetworkRequest, ContainerRequest,
    CreateContainerRequest, CreateExecRequest, CreateSandboxRequest, DetachDiskRequest, Empty, Event, Exit,
    MountOverlayRequest, ProcessRequest, RemoveContainerRequest, ResizeRequest, ResizeTerminalRequest,
    SetSysctlsRequest, SetVolumeRequest, SignalRequest, StatsResponse, UpdateContainerRequest,
};
use katavm_protocol::agent_ttrpc::AgentClient;
use tokio::time::timeout;
use ttrpc::r#async::transport::Socket;
use ttrpc::r#async::{Client, ClientStreamReceiver};
use ttrpc::context::{Context, with_duration};

use crate::host;
use crate::process::terminal::WindowSize;

/// How long the agent has for a request that waits for nobody. Generous: guests run on busy hosts; but a kubelet, and our own
/// commands, wait for two minutes, and are to hear why there is no answer.
const PATIENCE: Duration = Duration::from_secs(100);
/// How much later than this client the agent gives a request up: ttrpc's own deadline would look like a broken
/// connection here.
const LATER: Duration = Duration::from_secs(5);

/// Why the agent did not do what it was asked for.
#[derive(Clone, Debug, thiserror::Error)]
pub enum AgentError {
    /// It said no, and why.
    #[error("{reason}")]
    Refused {
        /// The kind of it.
        code: ttrpc::Code,
        /// For a person.
        reason: String,
    },
    /// It did not answer in time.
    #[error("the agent in the guest did not answer")]
    Silent,
    /// The connection does not work.
    #[error("cannot speak to the agent in the guest: {0}")]
    Connection(String),
}

/// Waits for an answer.
async fn within<T>(patience: Duration, answer: impl Future<Output = ttrpc::Result<T>>) -> Result<T, AgentError> {
    match timeout(patience, answer).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(AgentError::Silent),
    }
}

fn deadline(patience: Duration) -> Context {
    with_duration(patience.saturating_add(LATER))
}

impl From<ttrpc::Error> for AgentError {
    fn from(error: ttrpc::Error) -> Self {
        match error {
            ttrpc::Error::RpcStatus(status) if status.code() == ttrpc::Code::DEADLINE_EXCEEDED => Self::Silent,
            ttrpc::Error::RpcStatus(status) => Self::Refused { code: status.code(), reason: status.message },
            other => Self::Connection(other.to_string()),
        }
    }
}

/// A connection to the agent.
#[derive(Clone)]
pub struct Agent {
    client: AgentClient,
}

impl Agent {
    /// Speaks over `stream`. Must be called on a tokio runtime.
    ///
    /// # Errors
    /// When the stream cannot be awaited.
    pub fn over(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let stream = tokio::net::UnixStream::from_std(stream)?;
        Ok(Self { client: AgentClient::new(Client::new(Socket::new(stream))) })
    }

    /// Asks for nothing but an answer within `patience`: the guest's time, nanoseconds since the epoch.
    ///
    /// # Errors
    /// Any [`AgentError`].
    pub async fn check(&self, patience: Duration) -> Result<u64, AgentError> {
        let answer = within(patience, self.client.check(deadline(patience), &CheckRequest::new())).await?;
        Ok(answer.realtime_ns)
    }

    /// Adds `offset_ns` nanoseconds to the guest's time.
    ///
    /// # Errors
    /// Any [`AgentError`].
    pub async fn adjust_clock(&self, offset_ns: i64) -> Result<(), AgentError> {
        let request = AdjustClockRequest { offset_ns, ..Default::default() };
        within(PATIENCE, self.client.adjust_clock(deadline(PATIENCE), &request)).await?;
        Ok(())
    }

    /// Prepares the guest.
    ///
    /// # Errors
    /// Any [`AgentError`].
    pub async fn create_sandbox(&self, request: &CreateSandboxRequest) -> Result<(), AgentError> {
        within(PATIENCE, self.client.create_sandbox(deadline(PATIENCE), request)).await?;
        Ok(())
    }

    /// Configures the guest's network: [`Scan::request`](crate::network::Scan::request).
    ///
    /// # Errors
    /// Any [`AgentError`].
    pub async fn configure_network(&self, request: &ConfigureNetworkRequest) -> Result<(), AgentError> {
        within(PATIENCE, self.client.configure_network(deadline(PATIENCE), request)).await?;
        Ok(())
    }

    /// Has the guest look at a place that was given a disk, and mount the file system on it, if it is to.
    ///
    /// # Errors
    /// Any [`AgentError`].
    pub async fn attach_disk(&self, request: &AttachDiskRequest) -> Result<AttachDiskResponse, AgentError> {
        within(PATIENCE, self.client.attach_disk(deadline(PATIENCE), request)).await
    }

    /// Has the guest let go of the disk at a place when the last process of the container has ended that has it.
    ///
    /// # Errors
    /// Any [`AgentError`].
    pub async fn detach_disk(&self, place: u32, container_id: &str) -> Result<(), AgentError> {
        let request = DetachDiskRequest { place, container_id: container_id.into(), ..Default::default() };
        within(PATIENCE, self.client.detach_disk(deadline(PATIENCE), &request)).await?;
        Ok(())
    }

    /// Has the guest mount the layers of a container's root file system; where.
    ///
    /// # Errors
    /// Any [`AgentError`].
    pub async fn mount_overlay(&self, request: &MountOverlayRequest) -> Result<String, AgentError> {
        Ok(within(PATIENCE, self.client.mount_overlay(deadline(PATIENCE), request)).await?.mounted)
    }

    /// Has the guest unmount that when the last process of the container has ended.
    ///
    /// # Errors
    /// Any [`AgentError`].
    pub async fn unmount_overlay(&self, container_id: &str) -> Result<(), AgentError> {
        let request = ContainerRequest { container_id: container_id.into(), ..Default::default() };
        within(PATIENCE, self.client.unmount_overlay(deadline(PATIENCE), &request)).await?;
        Ok(())
    }

    /// Sets parameters of the guest's kernel (sysctl(8)).
    ///
    /// # Errors
    /// Any [`AgentError`].
    pub async fn set_sysctls(&self, sysctls: HashMap<String, String>) -> Result<(), AgentError> {
        let request = SetSysctlsRequest { sysctls, ..Default::default() };
        within(PATIENCE, self.client.set_sysctls(deadline(PATIENCE), &request)).await?;
        Ok(())
    }

    /// Kills what still runs and ends the guest.
    ///
    /// # Errors
    /// Any [`AgentError`]; the guest may have ended before the answer was out.
    pub async fn destroy_sandbox(&self) -> Result<(), AgentError> {
        within(PATIENCE, self.client.destroy_sandbox(deadline(PATIENCE), &Empty::new())).await?;
        Ok(())
    }

    /// Makes a container whose process waits to be started; its pid in the guest.
    ///
    /// # Errors
    /// Any [`AgentError`].
    pub async fn create_container(&self, request: &CreateContainerRequest) -> Result<u32, AgentError> {
        Ok(within(PATIENCE, self.client.create_container(deadline(PATIENCE), request)).await?.pid)
    }

    /// Makes a further process, which waits to be started; its pid in the guest.
    ///
    /// # Errors
    /// Any [`AgentError`].
    pub async fn create_exec(&self, request: &CreateExecRequest) -> Result<u32, AgentError> {
        Ok(within(PATIENCE, self.client.create_exec(deadline(PATIENCE), request)).await?.pid)
    }

    /// Copies a volume to the guest, or makes the copy what the volume is now.
    ///
    /// # Errors
    /// Any [`AgentError`].
    pub async fn set_volume(&self, request: &SetVolumeRequest) -> Result<(), AgentError> {
        within(PATIENCE, self.client.set_volume(deadline(PATIENCE), request)).await?;
        Ok(())
    }

    /// Kills what still runs in a container and removes it.
    ///
    /// # Errors
    /// Any [`AgentError`].
    pub async fn remove_container(&self, request: &RemoveContainerRequest) -> Result<(), AgentError> {
        within(PATIENCE, self.client.remove_container(deadline(PATIENCE), request)).await?;
        Ok(())
    }

    /// Lets a process go: a container's first, or a further one.
    ///
    /// # Errors
    /// Any [`AgentError`].
    pub async fn start(&self, id: &str, exec_id: &str) -> Result<(), AgentError> {
        if exec_id.is_empty() {
            within(PATIENCE, self.client.start_container(deadline(PATIENCE), &container(id))).await?;
        } else {
            within(PATIENCE, self.client.start_exec(deadline(PATIENCE), &process(id, exec_id))).await?;
        }
        Ok(())
    }

    /// Waits for the end of a process.
    ///
    /// # Errors
    /// Any [`AgentError`].
    pub async fn wait(&self, id: &str, exec_id: &str) -> Result<Exit, AgentError> {
        let response = self.client.wait(Context::default(), &process(id, exec_id)).await?;
        let exit = response.exit.into_option();
        let exit = exit.ok_or_else(|| AgentError::Connection("an answer without an exit status".into()))?;
        // By the host's clock, as all that is compared with it: the guest's is its own.
        Ok(Exit { at_ns: host::now_ns(), ..exit })
    }

    /// Sends a signal to a process.
    ///
    /// # Errors
    /// Any [`AgentError`].
    pub async fn signal(&self, id: &str, exec_id: &str, signal: i32) -> Result<(), AgentError> {
        let signal = signal.unsigned_abs();
        let request = SignalRequest { container_id: id.into(), exec_id: exec_id.into(), signal, ..Default::default() };
        within(PATIENCE, self.client.signal(deadline(PATIENCE), &request)).await?;
        Ok(())
    }

    /// Sends a signal to all processes of a container.
    ///
    /// # Errors
    /// Any [`AgentError`].
    pub async fn signal_all(&self, id: &str, signal: i32) -> Result<(), AgentError> {
        let signal = signal.unsigned_abs();
        let request = SignalRequest { container_id: id.into(), signal, all: true, ..Default::default() };
        within(PATIENCE, self.client.signal(deadline(PATIENCE), &request)).await?;
        Ok(())
    }

    /// Sets the size of a process' terminal.
    ///
    /// # Errors
    /// Any [`AgentError`].
    pub async fn resize(&self, id: &str, exec_id: &str, size: WindowSize) -> Result<(), AgentError> {
        let WindowSize { rows, columns } = size;
        let (container_id, exec_id) = (id.into(), exec_id.into());
        let request = ResizeTerminalRequest { container_id, exec_id, rows, columns, ..Default::default() };
        within(PATIENCE, self.client.resize_terminal(deadline(PATIENCE), &request)).await?;
        Ok(())
    }

    /// Freezes all processes of a container.
    ///
    /// # Errors
    /// Any [`AgentError`].
    pub async fn pause(&self, id: &str) -> Result<(), AgentError> {
        within(PATIENCE, self.client.pause(deadline(PATIENCE), &container(id))).await?;
        Ok(())
    }

    /// Thaws them.
    ///
    /// # Errors
    /// Any [`AgentError`].
    pub async fn resume(&self, id: &str) -> Result<(), AgentError> {
        within(PATIENCE, self.client.resume(deadline(PATIENCE), &container(id))).await?;
        Ok(())
    }

    /// The processes of a container.
    ///
    /// # Errors
    /// Any [`AgentError`].
    pub async fn list_processes(&self, id: &str) -> Result<Vec<GuestProcess>, AgentError> {
        Ok(within(PATIENCE, self.client.list_processes(deadline(PATIENCE), &container(id))).await?.processes)
    }

    /// What a container has used.
    ///
    /// # Errors
    /// Any [`AgentError`].
    pub async fn stats(&self, id: &str) -> Result<StatsResponse, AgentError> {
        within(PATIENCE, self.client.stats(deadline(PATIENCE), &container(id))).await
    }

    /// What happens in the guest from now on.
    ///
    /// # Errors
    /// Any [`AgentError`].
    pub async fn events(&self) -> Result<Events, AgentError> {
        Ok(Events(self.client.events(Context::default(), &Empty::new()).await?))
    }

    /// Has the containers use so many CPUs, which the machine has, and so many bytes of memory that are plugged in.
    ///
    /// # Errors
    /// Any [`AgentError`].
    pub async fn set_size(&self, cpus: u8, plugged: u64) -> Result<(), AgentError> {
        let request = ResizeRequest { cpus: cpus.into(), plugged, ..Default::default() };
        within(PATIENCE, self.client.resize(deadline(PATIENCE), &request)).await?;
        Ok(())
    }

    /// Changes a container's limits: `resources` is JSON as in the runtime specification.
    ///
    /// # Errors
    /// Any [`AgentError`].
    pub async fn update_container(&self, id: &str, resources: Vec<u8>) -> Result<(), AgentError> {
        let request = UpdateContainerRequest { container_id: id.into(), resources, ..Default::default() };
        within(PATIENCE, self.client.update_container(deadline(PATIENCE), &request)).await?;
        Ok(())
    }
}

/// What happens in the guest.
pub struct Events(ClientStreamReceiver<Event>);

impl Events {
    /// The next event; nothing when the guest has ended.
    pub async fn next(&mut self) -> Option<Event> {
        match self.0.recv().await {
            Ok(event) => event,
            Err(error) => {
                log::debug!("the agent tells of nothing more: {error}");
                None
            }
        }
    }
}

fn container(id: &str) -> ContainerRequest {
    ContainerRequest { container_id: id.into(), ..Default::default() }
}

fn process(id: &str, exec_id: &str) -> ProcessRequest {
    ProcessRequest { container_id: id.into(), exec_id: exec_id.into(), ..Default::default() }
}
