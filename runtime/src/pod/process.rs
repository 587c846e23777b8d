//! A process in a container: the container's first, or a further one (exec).

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use katavm_protocol::agent::Exit;
use tokio::sync::watch;

use super::streams::Streams;
use super::{Io, PodError};
use crate::link::{FromStandIn, Link, ToStandIn};
use crate::process::stdio::{Inherited, OutputStop};
use crate::process::terminal::{RawMode, Terminal, WindowSize};
use crate::sandbox::agent::{Agent, AgentError};
use crate::sandbox::{Sandbox, SandboxError};

/// How long the news of the end of a further process wait for what it wrote, counted from when something has arrived
/// last: what it started may hold its streams open.
const EXEC_PATIENCE: Duration = Duration::from_secs(3);
/// How long at all: what it started may write, too.
const EXEC_LONGEST: Duration = Duration::from_secs(10);

/// How far a process is.
#[derive(Clone, Debug, PartialEq)]
pub enum Phase {
    /// It waits to be started.
    Created,
    /// It runs.
    Running,
    /// It has ended, and all that it wrote has arrived.
    Stopped(Exit),
}

/// A process in the guest, with its streams.
pub struct Process {
    container_id: String,
    exec_id: String,
    guest_pid: u32,
    agent: Agent,
    io: Io,
    phase: watch::Sender<Phase>,
    link: Option<Link>,
    streams: tokio::sync::Mutex<Streams>,
    /// The terminal is raw while this is there.
    raw: Mutex<Option<RawMode>>,
    size: Mutex<WindowSize>,
    /// It has ended, while what it wrote may still be on its way.
    exited: AtomicBool,
    /// Why its end cannot be heard of any more.
    lost: watch::Sender<Option<AgentError>>,
    /// Bytes of its output that have arrived.
    moved: Arc<AtomicU64>,
    /// End its output.
    stops: Vec<OutputStop>,
    /// Nobody waits any longer for what it wrote last.
    given_up: watch::Sender<bool>,
}

impl Process {
    /// Connects the streams of a process that the agent has made.
    pub(super) async fn connect(
        sandbox: &Sandbox,
        agent: &Agent,
        container_id: &str,
        exec_id: &str,
        guest_pid: u32,
        io: Io,
        link: Option<Link>,
    ) -> Result<Arc<Self>, PodError> {
        let moved = Arc::default();
        let mut streams = Streams::connect(sandbox, container_id, exec_id, &io, &moved).await?;
        let stops = streams.take_stops();
        // The streams have duplicates, which go when they end: whoever reads the other end of a pipe hears of that.
        let io = Io { stdio: Inherited { stdin: None, stdout: None, stderr: None }, ..io };
        let size = Mutex::new(io.size());
        Ok(Arc::new(Self {
            container_id: container_id.into(),
            exec_id: exec_id.into(),
            guest_pid,
            agent: agent.clone(),
            io,
            phase: watch::Sender::new(Phase::Created),
            link,
            streams: tokio::sync::Mutex::new(streams),
            raw: Mutex::default(),
            size,
            exited: AtomicBool::new(false),
            lost: watch::Sender::new(None),
            moved,
            stops,
            given_up: watch::Sender::new(false),
        }))
    }

    /// Its pid in the guest's first pid namespace.
    #[must_use]
    pub fn guest_pid(&self) -> u32 {
        self.guest_pid
    }

    /// How far it is now.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase.borrow().clone()
    }

    /// Returns when it has ended.
    pub async fn wait(&self) -> Exit {
        let mut phase = self.phase.subscribe();
        loop {
            if let Phase::Stopped(exit) = &*phase.borrow_and_update() {
                return exit.clone();
            }
            // The sender lives in this process.
            let _ = phase.changed().await;
        }
    }

    /// Returns when the conversation with the agent about it has broken off, with why.
    pub async fn lost(&self) -> AgentError {
        let mut lost = self.lost.subscribe();
        loop {
            if let Some(error) = &*lost.borrow_and_update() {
                return error.clone();
            }
            // The sender lives in this process.
            let _ = lost.changed().await;
        }
    }

    /// Returns when it runs or has ended.
    pub async fn started(&self) {
        // The sender lives in this process.
        let _ = self.phase.subscribe().wait_for(|phase| *phase != Phase::Created).await;
    }

    /// Has the stand-in take up its view of the container's files.
    ///
    /// # Errors
    /// That it cannot, or has died.
    pub(super) async fn settle_stand_in(&self) -> Result<(), PodError> {
        let Some(link) = &self.link else { return Ok(()) };
        let failed = |error: std::io::Error| PodError::StandIn(error.to_string());
        link.send(&ToStandIn::Made).await.map_err(failed)?;
        loop {
            match link.receive().await.map_err(failed)? {
                Some((FromStandIn::Settled(result), _)) => return result.map_err(PodError::StandIn),
                // It does not run yet.
                Some((FromStandIn::Entered(_) | FromStandIn::Signal(_) | FromStandIn::Resized, _)) => {}
                None => return Err(PodError::StandIn("it has died".into())),
            }
        }
    }

    /// Lets it execute its program.
    ///
    /// # Errors
    /// Any [`PodError`].
    pub async fn start(self: &Arc<Self>) -> Result<(), PodError> {
        if self.phase() != Phase::Created {
            let what = if self.exec_id.is_empty() { "container" } else { "process" };
            let how = if self.phase() == Phase::Running { "running" } else { "stopped" };
            return Err(PodError::State(format!("cannot start an already {how} {what}")));
        }
        *lock(&self.raw) = self.io.terminal.as_ref().map(Terminal::raw).transpose()?;
        if let Err(error) = self.agent.start(&self.container_id, &self.exec_id).await {
            *lock(&self.raw) = None;
            return Err(error.into());
        }
        self.phase.send_if_modified(|phase| {
            let first = *phase == Phase::Created;
            if first {
                *phase = Phase::Running;
            }
            first
        });
        // It may have changed while the process was made.
        self.resized().await;
        Ok(())
    }

    /// Follows it from its making to its end: call it once. Nobody hears of the end before `last` is done.
    pub(super) async fn follow(&self, last: impl Future<Output = ()>) {
        tokio::select! {
            exit = self.agent.wait(&self.container_id, &self.exec_id) => match exit {
                Ok(exit) => {
                    self.exited.store(true, Ordering::Relaxed);
                    // What has not arrived when this is over goes on by itself.
                    match (self.exec_id.is_empty(), self.io.patience) {
                        // The others of its pid namespace have ended with it: nobody holds its streams open.
                        (true, None) => self.drain().await,
                        (true, Some(patience)) => self.drain_while_read(patience).await,
                        (false, _) => {
                            let drained = self.drain_while_read(EXEC_PATIENCE);
                            let _ = tokio::time::timeout(EXEC_LONGEST, drained).await;
                        }
                    }
                    last.await;
                    self.end(exit);
                }
                Err(error) => {
                    self.lost.send_replace(Some(error));
                    // How it ended nobody knows; that it has is told with the end of its sandbox.
                    self.wait().await;
                }
            },
            () = self.heed_link() => {}
            // Ended from outside.
            _ = self.wait() => {}
        }
    }

    /// Whether something stands for it on the host.
    pub(super) fn has_stand_in(&self) -> bool {
        self.link.is_some()
    }

    /// Lets what stands for it on the host end with its status: whoever waits for that finds everything done.
    pub(super) async fn dismiss_stand_in(&self) {
        if let (Phase::Stopped(exit), Some(link)) = (self.phase(), &self.link) {
            // One that died needs not be told.
            let _ = link.send(&ToStandIn::Exited(exit.status)).await;
        }
    }

    /// Notes its end, once.
    pub(super) fn end(&self, exit: Exit) {
        *lock(&self.raw) = None;
        self.phase.send_if_modified(|phase| {
            let first = !matches!(phase, Phase::Stopped(_));
            if first {
                *phase = Phase::Stopped(exit);
            }
            first
        });
    }

    /// Whether it has ended, even if what it wrote is still on its way.
    #[must_use]
    pub fn has_exited(&self) -> bool {
        self.exited.load(Ordering::Relaxed)
    }

    /// Waits until all that it wrote has arrived, or nobody waits for it any longer.
    pub async fn drain(&self) {
        let mut given_up = self.given_up.subscribe();
        tokio::select! {
            () = async {
                let mut streams = self.streams.lock().await;
                streams.close_input();
                streams.drained().await;
            } => {}
            // The sender lives in this process.
            _ = given_up.wait_for(|given_up| *given_up) => {}
        }
    }

    /// The same, as long as something arrives within `patience`.
    async fn drain_while_read(&self, patience: Duration) {
        let drained = self.drain();
        tokio::pin!(drained);
        loop {
            let before = self.moved.load(Ordering::Relaxed);
            let over = tokio::time::timeout(patience, &mut drained).await.is_ok();
            if over || self.moved.load(Ordering::Relaxed) == before {
                return;
            }
        }
    }

    /// Ends its output: what has not arrived, and does not within `patience`, is lost. It has ended.
    pub async fn close_output(&self, patience: Duration) {
        self.drain_while_read(patience).await;
        self.stops.iter().for_each(OutputStop::stop);
    }

    /// Does not wait any longer for what it wrote last.
    pub fn give_up(&self) {
        self.given_up.send_replace(true);
    }

    /// Does what the one that stands for it on the host says. Never returns without a link.
    async fn heed_link(&self) {
        let Some(link) = &self.link else { return std::future::pending().await };
        loop {
            match link.receive().await {
                Ok(Some((FromStandIn::Signal(signal), _))) => report(self.signal(signal).await, "send a signal"),
                Ok(Some((FromStandIn::Resized, _))) => self.resized().await,
                Ok(Some((FromStandIn::Entered(_) | FromStandIn::Settled(_), _))) => {}
                Ok(None) | Err(_) => {
                    // Whoever kills the stand-in means the container. A further process may outlive who asked for it.
                    if self.exec_id.is_empty() {
                        report(self.signal(libc::SIGKILL).await, "kill the container");
                    }
                    return std::future::pending().await;
                }
            }
        }
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// That it has ended, or any other [`PodError`].
    pub async fn signal(&self, signal: i32) -> Result<(), PodError> {
        if matches!(self.phase(), Phase::Stopped(_)) {
            return Err(PodError::State("container not running".into()));
        }
        if signal == libc::SIGCONT
            && let Some(Err(error)) = lock(&self.raw).as_ref().map(RawMode::renew)
        {
            log::warn!("{error}");
        }
        Ok(self.agent.signal(&self.container_id, &self.exec_id, signal).await?)
    }

    /// Passes the size of its terminal on, if that has changed.
    pub async fn resized(&self) {
        let now = self.io.size();
        if self.io.terminal.is_some() && std::mem::replace(&mut *lock(&self.size), now) != now {
            report(self.resize(now).await, "resize the terminal");
        }
    }

    /// Sets the size of its terminal.
    ///
    /// # Errors
    /// Any [`PodError`].
    pub async fn resize(&self, size: WindowSize) -> Result<(), PodError> {
        Ok(self.agent.resize(&self.container_id, &self.exec_id, size).await?)
    }

    /// Ends its standard input when what is on its way has arrived. One that has ended has none.
    pub fn close_stdin(&self) {
        if let Ok(streams) = self.streams.try_lock() {
            streams.end_input();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What fails because the process has ended meanwhile is no news.
fn report(result: Result<(), PodError>, what: &str) {
    match result {
        Ok(()) => {}
        Err(PodError::State(reason)) => log::debug!("cannot {what}: {reason}"),
        Err(PodError::Sandbox(SandboxError::Agent(AgentError::Refused { reason, .. }))) => {
            log::debug!("cannot {what}: {reason}");
        }
        Err(error) => log::warn!("cannot {what}: {error}"),
    }
}
