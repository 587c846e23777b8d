//! One container in a sandbox, from its making to its exit status.

mod streams;

use katavm_protocol::agent::{CreateContainerRequest, Exit, Ready, Stdio};

use crate::process::signals::{Listening, Received};
use crate::process::stdio::Inherited;
use crate::process::terminal::{RawMode, Terminal, TerminalError, WindowSize};
use crate::sandbox::agent::{Agent, AgentError};
use crate::sandbox::{Sandbox, SandboxError};
pub use streams::Streams;

/// Why a container did not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// The sandbox around it.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The terminal.
    #[error(transparent)]
    Terminal(#[from] TerminalError),
    /// One of its streams.
    #[error("cannot connect the container's {stream}: {error}")]
    Stream {
        /// Which.
        stream: &'static str,
        /// What went wrong.
        error: std::io::Error,
    },
    /// Signals cannot be read.
    #[error("cannot receive signals: {0}")]
    Signals(#[source] std::io::Error),
    /// It was ended by this signal before it ran.
    #[error("interrupted by signal {0}")]
    Interrupted(i32),
}

impl From<AgentError> for ContainerError {
    fn from(error: AgentError) -> Self {
        Self::Sandbox(error.into())
    }
}

/// What is to run.
pub struct Job {
    /// The container's id.
    pub id: String,
    /// Its configuration as the guest shall see it.
    pub spec: Vec<u8>,
    /// The guest's host name; empty for none.
    pub hostname: String,
    /// The streams of this process.
    pub stdio: Inherited,
    /// The terminal, if the container's process is to have it.
    pub terminal: Option<Terminal>,
    /// The size of a terminal that does not know its own.
    pub fallback_size: WindowSize,
}

/// How far a container is.
#[derive(Debug)]
pub enum Step {
    /// The guest is ready.
    Ready(Ready),
    /// The container is made.
    Created,
    /// Its process runs.
    Running,
    /// Its process has ended.
    Exited,
}

/// Runs a container in a sandbox that was started, and ends the sandbox; the exit of the container's process.
///
/// After a failure, `streams` may still carry what the container wrote before.
///
/// # Errors
/// Any [`ContainerError`]; the sandbox has ended all the same.
pub async fn run(
    sandbox: &Sandbox<'_>,
    ready: impl FnOnce(std::time::Duration) -> std::io::Result<Ready> + Send + 'static,
    job: Job,
    signals: &Listening,
    streams: &mut Streams,
    progress: &mut dyn FnMut(Step),
) -> Result<Exit, ContainerError> {
    let mut agent = None;
    let work = Work { sandbox, job: &job, signals, progress, agent: &mut agent, streams };
    let outcome = tokio::select! {
        ended = sandbox.ended() => Err(ended.into()),
        outcome = work.run(ready) => outcome,
    };
    let outcome = match outcome {
        Err(ContainerError::Sandbox(error)) => Err(sandbox.explain(error).await.into()),
        outcome => outcome,
    };
    let hangs = matches!(outcome, Err(ContainerError::Sandbox(SandboxError::Hangs { .. })));
    sandbox.shut_down(agent.as_ref().filter(|_| !hangs)).await;
    outcome
}

struct Work<'a> {
    sandbox: &'a Sandbox<'a>,
    job: &'a Job,
    signals: &'a Listening,
    progress: &'a mut dyn FnMut(Step),
    agent: &'a mut Option<Agent>,
    streams: &'a mut Streams,
}

impl Work<'_> {
    async fn run(
        self,
        ready: impl FnOnce(std::time::Duration) -> std::io::Result<Ready> + Send + 'static,
    ) -> Result<Exit, ContainerError> {
        let Self { sandbox, job, signals, progress, agent, streams } = self;
        let prepared = async {
            let (client, ready) = sandbox.prepare(ready, &job.hostname).await?;
            progress(Step::Ready(ready));
            let agent: &Agent = agent.insert(client);
            let first_size = job.size();
            let stdio = job.stdio(first_size);
            let request = CreateContainerRequest {
                container_id: job.id.clone(),
                spec: job.spec.clone(),
                stdio: Some(stdio).into(),
                ..Default::default()
            };
            agent.create_container(&request).await?;
            progress(Step::Created);
            streams.connect(sandbox, job).await?;
            Ok::<_, ContainerError>((agent, first_size))
        };
        let (agent, first_size) = tokio::select! {
            prepared = prepared => prepared?,
            interrupted = interrupted(signals) => return Err(interrupted),
        };
        let raw = job.terminal.as_ref().map(Terminal::raw).transpose()?;
        agent.start_container(&job.id).await?;
        progress(Step::Running);
        let exit = tokio::select! {
            exit = agent.wait(&job.id) => exit?,
            lost = sandbox.heartbeat_lost(agent) => return Err(lost.into()),
            failed = forward(job, agent, signals, raw.as_ref(), first_size) => return Err(failed),
        };
        progress(Step::Exited);
        tokio::select! {
            () = streams.drained() => {}
            lost = sandbox.heartbeat_lost(agent) => return Err(lost.into()),
            // Nobody reads on, and the user has had enough.
            _ = interrupted(signals) => {}
        }
        Ok(exit)
    }
}

impl Job {
    fn size(&self) -> WindowSize {
        let size = self.terminal.as_ref().map(Terminal::size).unwrap_or_default();
        if size == WindowSize::default() { self.fallback_size } else { size }
    }

    fn stdio(&self, size: WindowSize) -> Stdio {
        let WindowSize { rows, columns } = size;
        match self.terminal {
            Some(_) => Stdio { rows, columns, ..Default::default() },
            None => Stdio {
                stdin: self.stdio.stdin.is_some(),
                stdout: self.stdio.stdout.is_some(),
                stderr: self.stdio.stderr.is_some(),
                ..Default::default()
            },
        }
    }
}

/// Returns when a signal comes that ends what nobody waits for; others are taken and dropped.
async fn interrupted(signals: &Listening) -> ContainerError {
    loop {
        match signals.next().await.map(Received::ends) {
            Ok(Some(signal)) => return ContainerError::Interrupted(signal),
            Ok(None) => {}
            Err(error) => return ContainerError::Signals(error),
        }
    }
}

/// Passes signals on, one after the other; returns only when they cannot be read any more.
async fn forward(
    job: &Job,
    agent: &Agent,
    signals: &Listening,
    raw: Option<&RawMode<'_>>,
    first_size: WindowSize,
) -> ContainerError {
    let mut size = first_size;
    loop {
        // First of all: it may have changed while the container was made.
        let now = job.size();
        if job.terminal.is_some() && now != size {
            size = now;
            report(agent.resize(&job.id, size).await, "resize the container's terminal");
        }
        match signals.next().await {
            Ok(Received::Resized) => {}
            Ok(Received::Forward(signal)) => {
                if signal == libc::SIGCONT
                    && let Some(Err(error)) = raw.map(RawMode::renew)
                {
                    log::warn!("{error}");
                }
                report(agent.signal(&job.id, signal).await, "send a signal to the container");
            }
            Err(error) => return ContainerError::Signals(error),
        }
    }
}

fn report(result: Result<(), AgentError>, what: &str) {
    match result {
        Ok(()) => {}
        // The process has ended meanwhile, most likely.
        Err(AgentError::Refused(reason)) => log::debug!("cannot {what}: {reason}"),
        Err(error) => log::warn!("cannot {what}: {error}"),
    }
}
