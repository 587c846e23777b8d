//! The sandbox: a microVM with the agent in it, planned, booted, watched over and ended.

pub mod agent;
pub mod image;
pub mod plan;
pub mod probe;
pub mod share;
pub mod size;
pub mod vm;

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use katavm_protocol::agent::{CreateSandboxRequest, Ready};
use katavm_protocol::ports;
use katavm_vmm::ExitReason;
use std::sync::Arc;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{sleep, timeout};

use agent::{Agent, AgentError};
use vm::{Dial, Machine, SHARED_TAG};

/// How long a guest may take to boot. Generous: this is for guests that hang, not for slow hosts.
pub const BOOT_PATIENCE: Duration = Duration::from_secs(120);
/// How long connecting to the guest may take.
pub const DIAL_PATIENCE: Duration = Duration::from_secs(30);
/// How long a guest that was told to end may take.
const END_PATIENCE: Duration = Duration::from_secs(15);
/// How long a failed conversation waits for the guest's end to explain it.
const EXPLAIN_PATIENCE: Duration = Duration::from_secs(1);
/// How often the agent is asked whether it is there.
const BEAT: Duration = Duration::from_secs(10);
/// How long it may take to answer: a container that takes all CPUs slows it down, and is in its right.
const BEAT_PATIENCE: Duration = Duration::from_secs(30);

/// What happened to a sandbox that did not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The guest ended by itself.
    #[error("{reason}{}", last_lines(.console))]
    Ended {
        /// Why.
        reason: ExitReason,
        /// Its console's last output.
        console: String,
    },
    /// It does not boot.
    #[error("the guest did not get ready within {} s: {error}{}", BOOT_PATIENCE.as_secs(), last_lines(.console))]
    NotReady {
        /// What waiting for it gave.
        error: io::Error,
        /// Its console's last output.
        console: String,
    },
    /// The agent does not answer any more.
    #[error("the guest stopped answering{}", last_lines(.console))]
    Hangs {
        /// Its console's last output.
        console: String,
    },
    /// The agent refused something, or the conversation broke.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// A connection into the guest cannot be made.
    #[error("cannot connect to the guest: {0}")]
    Dial(#[source] io::Error),
    /// A descriptor or thread is not to be had.
    #[error("cannot watch over the guest: {0}")]
    Resource(#[source] io::Error),
}

/// Lines of a console that go into a message.
const LINES: usize = 12;

fn last_lines(console: &str) -> String {
    let lines: Vec<_> = console.lines().filter(|line| !line.trim().is_empty()).collect();
    if lines.is_empty() {
        return String::new();
    }
    let last = lines.get(lines.len().saturating_sub(LINES)..).unwrap_or_default();
    // What the guest printed goes to the user's terminal: no control sequences of its own.
    let clean = last.iter().map(|line| line.chars().filter(|c| !c.is_control()).collect::<String>());
    let text = clean.map(|line| format!("\n  | {line}")).collect::<String>();
    format!("; the last lines of its console:{text}")
}

/// A machine whose end can be awaited.
pub struct Sandbox {
    machine: Arc<dyn Machine>,
    dial: Arc<dyn Dial>,
    end: AsyncFd<OwnedFd>,
}

impl Sandbox {
    /// Watches over a machine that was started. Must be called on a tokio runtime.
    ///
    /// # Errors
    /// When no descriptors are left.
    pub fn new(machine: Arc<dyn Machine>, dial: Arc<dyn Dial>) -> Result<Self, SandboxError> {
        let fd = vm::end_event(&*machine).map_err(SandboxError::Resource)?;
        // SAFETY: an OwnedFd is the same open descriptor until it is dropped, and `AsyncFd` owns it from here on.
        let end = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
        let end = end.map_err(|error| SandboxError::Resource(error.into()))?;
        Ok(Self { machine, dial, end })
    }

    /// Waits for the agent and prepares the guest. `ready` blocks until the agent has reported.
    ///
    /// # Errors
    /// Any [`SandboxError`].
    pub async fn prepare(
        &self,
        ready: impl FnOnce(Duration) -> io::Result<Ready> + Send + 'static,
        hostname: &str,
    ) -> Result<(Agent, Ready), SandboxError> {
        let not_ready = |error| SandboxError::NotReady { error, console: self.machine.console_tail() };
        let ready = blocking(move || ready(BOOT_PATIENCE)).await.map_err(not_ready)?;
        let stream = self.dial(ports::RPC).await?;
        let agent = Agent::over(stream).map_err(SandboxError::Resource)?;
        let mut entropy = vec![0; 32];
        // The guest has other sources as well; too few bytes are no reason to fail.
        let got = rustix::rand::getrandom(&mut entropy, rustix::rand::GetRandomFlags::empty()).unwrap_or(0);
        entropy.truncate(got);
        let request = CreateSandboxRequest {
            hostname: hostname.into(),
            shared_tag: SHARED_TAG.into(),
            entropy,
            ..Default::default()
        };
        agent.create_sandbox(&request).await?;
        Ok((agent, ready))
    }

    /// Connects to a port of the guest.
    ///
    /// # Errors
    /// That nobody listens there, or that the guest is gone.
    pub async fn dial(&self, port: u32) -> Result<std::os::unix::net::UnixStream, SandboxError> {
        let dial = Arc::clone(&self.dial);
        blocking(move || dial.dial(port, DIAL_PATIENCE)).await.map_err(SandboxError::Dial)
    }

    /// The way into the guest, for other threads.
    #[must_use]
    pub fn dialler(&self) -> Arc<dyn Dial> {
        Arc::clone(&self.dial)
    }

    /// Returns when the guest has ended, with why.
    pub async fn ended(&self) -> SandboxError {
        match self.end.readable().await {
            Ok(_) => SandboxError::Ended {
                reason: self.machine.end().unwrap_or(ExitReason::Stopped),
                console: self.machine.console_tail(),
            },
            Err(error) => SandboxError::Resource(error),
        }
    }

    /// Finds out whether an error of the conversation is but the guest's end.
    pub async fn explain(&self, error: SandboxError) -> SandboxError {
        match &error {
            SandboxError::Agent(AgentError::Connection(_) | AgentError::Silent) | SandboxError::Dial(_) => {
                timeout(EXPLAIN_PATIENCE, self.ended()).await.unwrap_or(error)
            }
            _ => error,
        }
    }

    /// Returns when the agent has not answered for too long, although the machine runs.
    pub async fn heartbeat_lost(&self, agent: &Agent) -> SandboxError {
        loop {
            sleep(BEAT).await;
            // Twice: a host that was itself suspended finds its clocks ahead of the guest's answer.
            if agent.check(BEAT_PATIENCE).await.is_err() && agent.check(BEAT_PATIENCE).await.is_err() {
                return SandboxError::Hangs { console: self.machine.console_tail() };
            }
        }
    }

    /// Has the guest end itself, and ends it by force if it does not.
    pub async fn shut_down(&self, agent: Option<&Agent>) {
        if self.machine.end().is_some() {
            return;
        }
        let orderly = async {
            match agent {
                // The answer may get lost in the end itself.
                Some(agent) => drop(agent.destroy_sandbox().await),
                None => return,
            }
            self.ended().await;
        };
        if timeout(END_PATIENCE, orderly).await.is_err() {
            log::warn!("the guest did not end when it was told to: stopped by force");
        }
        self.machine.stop();
    }
}

/// Runs what blocks on a thread of its own.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_told_with_the_consoles_last_lines() {
        let console = (0..20).map(|n| format!("line {n}\n\n")).collect::<String>() + "\x1b[31mpanic\r";
        let text = SandboxError::Ended { reason: ExitReason::Panic, console }.to_string();
        assert!(text.starts_with("the guest kernel panicked; the last lines of its console:\n  | line 9\n"), "{text}");
        assert!(text.ends_with("\n  | [31mpanic"), "{text}");
        let silent = SandboxError::Ended { reason: ExitReason::Reset, console: String::new() };
        assert_eq!(silent.to_string(), "the guest rebooted");
    }
}
