//! The sandbox: a microVM with the agent in it, planned, booted, watched over and ended.

pub mod agent;
pub mod disk;
pub mod heartbeat;
pub mod image;
pub mod plan;
pub mod probe;
pub mod share;
pub mod size;
pub mod vm;
pub mod volume;

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use katavm_protocol::agent::{CreateSandboxRequest, Ready};
use katavm_protocol::ports;
use katavm_vmm::ExitReason;
use std::sync::Arc;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

use crate::descriptor::awaited;

use agent::{Agent, AgentError};
use heartbeat::Beat;
use vm::{Dial, Machine, SHARED_TAG};

/// How long a guest may take to boot. Generous: this is for guests that hang, not for slow hosts.
pub const BOOT_PATIENCE: Duration = Duration::from_secs(120);
/// How long connecting to the guest may take.
pub const DIAL_PATIENCE: Duration = Duration::from_secs(30);
/// How long a guest that was told to end may take.
const END_PATIENCE: Duration = Duration::from_secs(15);
/// How long a failed conversation waits for the guest's end to explain it: a kernel that panics tells a long story
/// after it has cut the connections.
const EXPLAIN_PATIENCE: Duration = Duration::from_secs(10);

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
    #[error("cannot connect to the agent in the guest: {error}{}", last_lines(.console))]
    Dial {
        /// What trying it gave.
        error: io::Error,
        /// Its console's last output.
        console: String,
    },
    /// A descriptor or thread is not to be had.
    #[error("cannot watch over the guest: {0}")]
    Resource(#[source] io::Error),
}

/// Lines of a console that go into a message.
const LINES: usize = 12;
/// How a kernel begins to tell why it panicked. A long trace follows.
const PANIC: &str = "Kernel panic - not syncing";

fn last_lines(console: &str) -> String {
    let lines: Vec<_> = console.lines().filter(|line| !line.trim().is_empty()).collect();
    if lines.is_empty() {
        return String::new();
    }
    let (earlier, last) = lines.split_at(lines.len().saturating_sub(LINES));
    let panic = earlier.iter().rposition(|line| line.contains(PANIC));
    let cause: &[&str] = match panic {
        Some(at) if at + 1 == earlier.len() => &[earlier[at]],
        Some(at) => &[earlier[at], "..."],
        None => &[],
    };
    // What the guest printed goes to the user's terminal: no control sequences of its own.
    let clean = cause.iter().chain(last).map(|line| line.chars().filter(|c| !c.is_control()).collect::<String>());
    let text = clean.map(|line| format!("\n  | {line}")).collect::<String>();
    format!("; the last lines of its console:{text}")
}

/// A machine whose end can be awaited.
pub struct Sandbox {
    machine: Arc<dyn Machine>,
    dial: Arc<dyn Dial>,
    end: AsyncFd<OwnedFd>,
    beat: Beat,
}

impl Sandbox {
    /// Watches over a machine that was started. Must be called on a tokio runtime.
    ///
    /// # Errors
    /// When no descriptors are left.
    pub fn new(machine: Arc<dyn Machine>, dial: Arc<dyn Dial>) -> Result<Self, SandboxError> {
        let fd = vm::end_event(&*machine).map_err(SandboxError::Resource)?;
        let end = awaited(fd, Interest::READABLE).map_err(SandboxError::Resource)?;
        Ok(Self { machine, dial, end, beat: Beat::default() })
    }

    /// With another heartbeat than the usual one.
    #[must_use]
    pub fn with_beat(self, beat: Beat) -> Self {
        Self { beat, ..self }
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
        let dialled = blocking(move || dial.dial(port, DIAL_PATIENCE)).await;
        dialled.map_err(|error| SandboxError::Dial { error, console: self.machine.console_tail() })
    }

    /// The way into the guest, for other threads.
    #[must_use]
    pub fn dialler(&self) -> Arc<dyn Dial> {
        Arc::clone(&self.dial)
    }

    /// The machine itself.
    #[must_use]
    pub fn machine(&self) -> Arc<dyn Machine> {
        Arc::clone(&self.machine)
    }

    /// Whether its machine has ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.machine.end().is_some()
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

    /// Finds out whether an error of the conversation is but the guest's end, or its silence.
    pub async fn explain(&self, error: SandboxError) -> SandboxError {
        match error {
            // It had its time.
            SandboxError::Agent(AgentError::Silent) if self.machine.end().is_none() => {
                SandboxError::Hangs { console: self.machine.console_tail() }
            }
            SandboxError::Agent(AgentError::Connection(_) | AgentError::Silent) | SandboxError::Dial { .. } => {
                timeout(EXPLAIN_PATIENCE, self.ended()).await.unwrap_or(error)
            }
            _ => error,
        }
    }

    /// Has the guest end itself, and ends it by force if it does not.
    pub async fn shut_down(&self, agent: Option<&Agent>) {
        if self.machine.end().is_some() {
            return;
        }
        let Some(agent) = agent else { return self.machine.stop() };
        let orderly = async {
            tokio::select! {
                // The answer may get lost in the end itself.
                _ = self.ended() => {}
                _ = agent.destroy_sandbox() => drop(self.ended().await),
            }
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

    #[test]
    fn why_the_kernel_panicked_is_not_lost_above_its_trace() {
        let text = |trace: usize| {
            let trace = (0..trace).map(|n| format!("trace {n}\n")).collect::<String>();
            last_lines(&format!("before\n[1.0] Kernel panic - not syncing: why\n{trace}"))
        };
        assert!(
            text(30).contains(":\n  | [1.0] Kernel panic - not syncing: why\n  | ...\n  | trace 18\n"),
            "{}",
            text(30)
        );
        assert!(text(12).contains(":\n  | [1.0] Kernel panic - not syncing: why\n  | trace 0\n"), "{}", text(12));
        assert!(
            text(3).contains("\n  | before\n  | [1.0] Kernel panic - not syncing: why\n  | trace 0\n"),
            "{}",
            text(3)
        );
    }
}
