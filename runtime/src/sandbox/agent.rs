//! The agent's service, as a client.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use katavm_protocol::agent::{
    CheckRequest, ConfigureNetworkRequest, ContainerRequest, CreateContainerRequest, CreateSandboxRequest, Empty, Exit,
    ProcessRequest, ResizeTerminalRequest, SignalRequest,
};
use katavm_protocol::agent_ttrpc::AgentClient;
use ttrpc::r#async::Client;
use ttrpc::r#async::transport::Socket;
use ttrpc::context::{Context, with_duration};

use crate::process::terminal::WindowSize;

/// How long the agent has for a request that waits for nobody. Generous: guests run on busy hosts.
const PATIENCE: Duration = Duration::from_secs(60);

/// Why the agent did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// It said no, and why.
    #[error("{0}")]
    Refused(String),
    /// It did not answer in time.
    #[error("the agent in the guest did not answer")]
    Silent,
    /// The connection does not work.
    #[error("cannot speak to the agent in the guest: {0}")]
    Connection(String),
}

impl From<ttrpc::Error> for AgentError {
    fn from(error: ttrpc::Error) -> Self {
        match error {
            ttrpc::Error::RpcStatus(status) if status.code() == ttrpc::Code::DEADLINE_EXCEEDED => Self::Silent,
            ttrpc::Error::RpcStatus(status) => Self::Refused(status.message),
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

    /// Asks for nothing but an answer within `patience`.
    ///
    /// # Errors
    /// Any [`AgentError`].
    pub async fn check(&self, patience: Duration) -> Result<(), AgentError> {
        self.client.check(with_duration(patience), &CheckRequest::new()).await?;
        Ok(())
    }

    /// Prepares the guest.
    ///
    /// # Errors
    /// Any [`AgentError`].
    pub async fn create_sandbox(&self, request: &CreateSandboxRequest) -> Result<(), AgentError> {
        self.client.create_sandbox(with_duration(PATIENCE), request).await?;
        Ok(())
    }

    /// Configures the guest's network: [`Scan::request`](crate::network::Scan::request).
    ///
    /// # Errors
    /// Any [`AgentError`].
    pub async fn configure_network(&self, request: &ConfigureNetworkRequest) -> Result<(), AgentError> {
        self.client.configure_network(with_duration(PATIENCE), request).await?;
        Ok(())
    }

    /// Kills what still runs and ends the guest.
    ///
    /// # Errors
    /// Any [`AgentError`]; the guest may have ended before the answer was out.
    pub async fn destroy_sandbox(&self) -> Result<(), AgentError> {
        self.client.destroy_sandbox(with_duration(PATIENCE), &Empty::new()).await?;
        Ok(())
    }

    /// Makes a container whose process waits to be started.
    ///
    /// # Errors
    /// Any [`AgentError`].
    pub async fn create_container(&self, request: &CreateContainerRequest) -> Result<(), AgentError> {
        self.client.create_container(with_duration(PATIENCE), request).await?;
        Ok(())
    }

    /// Lets a container's process go.
    ///
    /// # Errors
    /// Any [`AgentError`].
    pub async fn start_container(&self, id: &str) -> Result<(), AgentError> {
        let request = ContainerRequest { container_id: id.into(), ..Default::default() };
        self.client.start_container(with_duration(PATIENCE), &request).await?;
        Ok(())
    }

    /// Waits for the end of a container's process.
    ///
    /// # Errors
    /// Any [`AgentError`].
    pub async fn wait(&self, id: &str) -> Result<Exit, AgentError> {
        let request = ProcessRequest { container_id: id.into(), ..Default::default() };
        let response = self.client.wait(Context::default(), &request).await?;
        response.exit.into_option().ok_or_else(|| AgentError::Connection("an answer without an exit status".into()))
    }

    /// Sends a signal to a container's process.
    ///
    /// # Errors
    /// Any [`AgentError`].
    pub async fn signal(&self, id: &str, signal: i32) -> Result<(), AgentError> {
        let signal = signal.unsigned_abs();
        let request = SignalRequest { container_id: id.into(), signal, ..Default::default() };
        self.client.signal(with_duration(PATIENCE), &request).await?;
        Ok(())
    }

    /// Sets the size of a container's terminal.
    ///
    /// # Errors
    /// Any [`AgentError`].
    pub async fn resize(&self, id: &str, size: WindowSize) -> Result<(), AgentError> {
        let WindowSize { rows, columns } = size;
        let request = ResizeTerminalRequest { container_id: id.into(), rows, columns, ..Default::default() };
        self.client.resize_terminal(with_duration(PATIENCE), &request).await?;
        Ok(())
    }
}
