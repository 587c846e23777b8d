//! What a sandbox process does: boots the virtual machine, makes the container, serves those who ask about it, and
//! ends everything when the last container has ended.

use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use katavm_devices::fs::FsShare;
use katavm_protocol::agent::{Exit, Ready};
use katavm_vmm::{ExitReason, Microvm};
use serde::{Deserialize, Serialize};
use tokio::sync::{oneshot, watch};

use crate::cri::is_sandbox;
use crate::hooks::{self, Point};
use crate::host;
use crate::launch::{Launch, StandIn};
use crate::link::Link;
use crate::network::{GuestNetwork, NetworkError, UserNetwork};
use crate::pod::{Io, Network, NewContainer, Phase, Pod, PodError, Process};
use crate::process::signals::{Listening, Received, Signals};
use crate::sandbox::agent::AgentError;
use crate::sandbox::plan::Plan;
use crate::sandbox::share::file_server;
use crate::sandbox::vm::{self, Boot, ReadyPort, Started};
use crate::sandbox::{Sandbox, SandboxError, blocking, probe};
use crate::service;
use crate::state::{Journal, Record, Status};
use crate::timings::{self, Timings};

/// How long what a failed guest has sent is waited for.
const LEFTOVER_PATIENCE: Duration = Duration::from_secs(2);

/// How the sandbox process lives.
pub enum Mode {
    /// It is the user's own process: starts the container at once, and passes signals on.
    Foreground,
    /// It goes on by itself when it has reported; the container is started by whoever asks for it.
    Background(Report),
    /// The same, for whoever asks this process itself; it goes on when its containers have ended, too.
    Served(Served),
}

/// What tells of a pod that others in this process serve.
pub struct Served {
    /// The pod when its first container is made, or why that was not.
    pub made: oneshot::Sender<Result<Arc<Pod>, String>>,
    /// Becomes true when the pod is to end.
    pub end: watch::Receiver<bool>,
}

/// A sandbox without a first container: what stands for it on the host goes with this.
struct Empty {
    _link: Link,
    _journal: Journal,
}

/// The container's streams and what speaks for it on the host.
pub struct Outside {
    /// Its streams; nothing for a sandbox that is to be there before its first container.
    pub io: Option<Io>,
    /// What speaks for it.
    pub stand_in: StandIn,
    /// Meant for it.
    pub signals: Signals,
    /// Where its state is written down.
    pub journal: Journal,
    /// Its state directory.
    pub directory: PathBuf,
}

/// Tells the process that made this one how it went.
pub struct Report(PipeWriter);

/// Hears it.
pub struct Reported(PipeReader);

#[derive(Serialize, Deserialize)]
struct Outcome(Result<(), String>);

/// Both ends of a report.
///
/// # Errors
/// Those of pipe2(2).
pub fn report() -> io::Result<(Report, Reported)> {
    let (reader, writer) = io::pipe()?;
    Ok((Report(writer), Reported(reader)))
}

impl Report {
    /// Tells, once.
    pub fn tell(mut self, outcome: Result<(), String>) {
        // Whoever waited may be gone; the container is there all the same.
        let _ = serde_json::to_vec(&Outcome(outcome)).map(|bytes| self.0.write_all(&bytes));
    }
}

impl Reported {
    /// Waits for it.
    ///
    /// # Errors
    /// Why the container was not made.
    pub fn wait(mut self) -> Result<(), String> {
        let mut bytes = Vec::new();
        self.0.read_to_end(&mut bytes).map_err(|error| error.to_string())?;
        match serde_json::from_slice(&bytes) {
            Ok(Outcome(outcome)) => outcome,
            Err(_) => Err("the sandbox process ended unexpectedly".into()),
        }
    }
}

/// Runs a container to its end in a sandbox made for it; the exit of its first process.
///
/// # Errors
/// Whatever keeps it from coming to its end.
pub fn supervise(launch: &Launch, outside: Outside, mode: Mode, timings: &mut Timings) -> anyhow::Result<Exit> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.context("cannot start the runtime for the agent's service")?;
    let outcome = runtime.block_on(attend(launch, outside, mode, timings));
    // Threads that wait for a guest that is gone need not be waited for.
    runtime.shutdown_background();
    outcome
}

/// The same on a runtime that is there.
///
/// # Errors
/// Those of [`supervise`].
pub async fn attend(launch: &Launch, outside: Outside, mode: Mode, timings: &mut Timings) -> anyhow::Result<Exit> {
    let mut mode = Some(mode);
    let share = file_server();
    let outcome = match boot(launch, &outside, share.clone()) {
        Ok((started, network, user_network)) => {
            let work = Work { launch, share, user_network, mode: &mut mode, end: None, timings };
            work.run(started, network, outside).await
        }
        Err(error) => Err(error),
    };
    let outcome = outcome.map_err(explain);
    if let Err(error) = &outcome {
        let reason = format!("{error:#}");
        match mode {
            Some(Mode::Background(report)) => report.tell(Err(reason)),
            Some(Mode::Served(served)) => drop(served.made.send(Err(reason))),
            Some(Mode::Foreground) | None => {}
        }
    }
    outcome
}

type Booted = (Started, Option<GuestNetwork>, Option<UserNetwork>);

fn boot(launch: &Launch, outside: &Outside, share: FsShare) -> anyhow::Result<Booted> {
    let console = launch.console.then(|| io::stderr().as_fd().try_clone_to_owned());
    let console = console.transpose().context("cannot duplicate standard error")?;
    let netns =
        outside.stand_in.netns.as_ref().map(OwnedFd::try_clone).transpose().context("cannot duplicate a descriptor")?;
    let (network, nets) = netns.map(|netns| GuestNetwork::new(netns, launch.plan.size.vcpus)).transpose()?.unzip();
    let start = |ports: &Vec<_>| UserNetwork::start(ports, &outside.directory);
    let (user_network, net) = launch.user_network.as_ref().map(start).transpose()?.unzip();
    let nets = nets.into_iter().flatten().chain(net).collect();
    let places = launch.plan.places();
    let (image, size, most) = (launch.image.clone(), launch.plan.size, launch.plan.most);
    let huge_pages = launch.plan.huge_pages;
    let started = vm::boot(Boot { image, size, most, huge_pages, share, nets, places, console })?;
    Ok((started, network, user_network))
}

struct Work<'a> {
    launch: &'a Launch,
    share: FsShare,
    user_network: Option<UserNetwork>,
    /// Nothing once it has been told that the container is made.
    mode: &'a mut Option<Mode>,
    /// Ends a pod that does not end with its containers.
    end: Option<watch::Receiver<bool>>,
    timings: &'a mut Timings,
}

impl Work<'_> {
    async fn run(mut self, started: Started, network: Option<GuestNetwork>, outside: Outside) -> anyhow::Result<Exit> {
        let Started { vm, host, ready } = started;
        let vm = Arc::new(vm);
        let network = network.map(|network| Network::new(Arc::clone(&vm), network)).transpose();
        let machine = Arc::clone(&vm);
        let sandbox = Arc::new(Sandbox::new(machine, Arc::new(host))?);
        let mut pod = None;
        let exits = || vm.exits();
        let outcome = tokio::select! {
            ended = sandbox.ended() => Err(ended.into()),
            outcome = async { self.contain(&sandbox, network?, ready, outside, &mut pod, &exits).await } => outcome,
        };
        let outcome = match outcome {
            Err(PodError::Sandbox(error)) => Err(sandbox.explain(error).await.into()),
            outcome => outcome,
        };
        let hangs = matches!(outcome, Err(PodError::Sandbox(SandboxError::Hangs { .. })));
        let agent = pod.as_deref().map(Pod::agent).filter(|_| !hangs);
        sandbox.shut_down(agent).await;
        vm.hang_up();
        if let Some(pod) = &pod {
            // The streams have ended with the machine: what was on its way is written still.
            if tokio::time::timeout(LEFTOVER_PATIENCE, pod.drained()).await.is_err() {
                log::warn!("nobody reads what the container wrote last");
            }
            pod.end_all();
            if tokio::time::timeout(LEFTOVER_PATIENCE, pod.unwatched()).await.is_err() {
                log::warn!("who watches the container does not hear of its end");
            }
        }
        self.finish(&vm);
        Ok(outcome?)
    }

    /// Makes the container and stays with it to its end.
    async fn contain(
        &mut self,
        sandbox: &Arc<Sandbox>,
        network: Option<Network>,
        ready: ReadyPort,
        outside: Outside,
        pod: &mut Option<Arc<Pod>>,
        exits: &dyn Fn() -> u64,
    ) -> Result<Exit, PodError> {
        let end = match &self.mode {
            Some(Mode::Served(served)) => Some(served.end.clone()),
            _ => None,
        };
        let called_off = async {
            match end {
                Some(end) => ended(end).await,
                None => std::future::pending().await,
            }
        };
        let signals = outside.signals.listen().map_err(|error| PodError::Signals(io::Error::other(error)))?;
        let made = async {
            let hostname = self.launch.bundle.spec.hostname().clone().unwrap_or_default();
            let ready = move |patience| ready.wait(patience);
            let (share, cgroup, has_limit) =
                (self.share.clone(), self.launch.cgroup.clone(), self.launch.has_memory_limit());
            let (prepared, ready) = Pod::prepare(sandbox, network, share, cgroup, has_limit, ready, &hostname).await?;
            self.note_ready(&ready, exits());
            let pod = pod.insert(prepared);
            if let Some(network) = &self.user_network {
                pod.agent().configure_network(&network.request()).await?;
            }
            let plan = self.plan(&outside.directory)?;
            let stand_in = |error: io::Error| PodError::StandIn(error.to_string());
            let link = Link::new(outside.stand_in.link).map_err(stand_in)?;
            let first = match outside.io {
                Some(io) => {
                    let new = NewContainer {
                        id: self.launch.id.to_string(),
                        spec: plan.guest_spec,
                        exports: plan.exports,
                        tmpfs: plan.tmpfs,
                        replaced: plan.replaced,
                        disks: plan.disks,
                        overlay: plan.overlay,
                        io,
                        link: Some(link),
                        journal: outside.journal,
                        cgroup: self.launch.cgroup.clone(),
                        limits: Some(plan.limits).filter(|_| !is_sandbox(&self.launch.bundle.spec)),
                        cpuset: self.launch.cpuset(),
                        is_first: true,
                    };
                    Ok(pod.create(new).await?)
                }
                None => {
                    // There is no container that would have them set for all.
                    let sysctls = self.launch.bundle.spec.linux().as_ref().and_then(|linux| linux.sysctl().clone());
                    if let Some(sysctls) = sysctls.filter(|sysctls| !sysctls.is_empty()) {
                        pod.agent().set_sysctls(sysctls).await?;
                    }
                    let mut journal = outside.journal;
                    journal.set_status(Status::Running);
                    Err(Empty { _link: link, _journal: journal })
                }
            };
            self.timings.mark(timings::CREATED);
            let server = service::serve(pod, &outside.directory).await?;
            Ok::<_, PodError>((Arc::clone(pod), first, server))
        };
        let (pod, first, _server) = tokio::select! {
            made = made => made?,
            interrupted = interrupted(&signals) => return Err(interrupted),
            () = called_off => return Err(PodError::State("it was called off".into())),
        };
        let mut foreground = false;
        match self.mode.take() {
            Some(Mode::Foreground) => {
                foreground = true;
                pod.start(self.launch.id.as_str(), "").await?;
                self.timings.mark(timings::RUNNING);
                let record = pod.container(self.launch.id.as_str())?.record();
                poststart(record).await?;
            }
            Some(Mode::Background(report)) => {
                pod.container(self.launch.id.as_str())?.keep();
                report.tell(Ok(()));
            }
            Some(Mode::Served(served)) => {
                self.end = Some(served.end);
                // Whoever asked may have gone away; the container is there all the same.
                let _ = served.made.send(Ok(Arc::clone(&pod)));
            }
            None => {}
        }
        if let Err(error) = host::let_go_of_code() {
            log::debug!("cannot let go of what made the sandbox: {error}");
        }
        tokio::select! {
            () = over(&pod, self.end.clone()) => {}
            lost = lost(first.as_ref().ok()) => return Err(lost.into()),
            lost = sandbox.heartbeat_lost(pod.agent()) => return Err(lost.into()),
            failed = pod.follow_network() => return Err(failed),
            failed = forward(first.as_deref().ok(), &signals, foreground) => return Err(failed),
        }
        self.timings.mark(timings::EXITED);
        let Ok(process) = first else { return Ok(Exit::default()) };
        match process.phase() {
            Phase::Stopped(exit) => Ok(exit),
            Phase::Created | Phase::Running => Err(PodError::State("the container has not ended".into())),
        }
    }

    /// What the container gets, with what its network takes.
    fn plan(&self, directory: &Path) -> Result<Plan, PodError> {
        let plan = &self.launch.plan;
        if self.user_network.is_none() {
            return Ok(plan.clone());
        }
        let file = UserNetwork::name_servers(directory).map_err(NetworkError::Socket)?;
        let plan = plan.with_file(&self.launch.id, Path::new("/etc/resolv.conf"), file);
        plan.map_err(|error| PodError::State(error.to_string()))
    }

    fn note_ready(&mut self, ready: &Ready, exits: u64) {
        let now = katavm_vmm::now();
        self.timings.fact("agent_ready_exits", exits);
        self.timings.mark_at(timings::AGENT_READY, now);
        // The guest's clock starts with its kernel: counted back from when its report arrived.
        self.timings.mark_at(timings::GUEST_CLOCK, now.saturating_sub(ready.ready_ns));
        let since_main = ready.ready_ns.saturating_sub(ready.agent_main_ns);
        self.timings.mark_at(timings::AGENT_MAIN, now.saturating_sub(since_main));
        self.timings.fact("guest_kernel", ready.kernel_release.clone());
    }

    /// Notes what the machine knows of its own time.
    fn finish(&mut self, vm: &Microvm) {
        vm.stop();
        self.timings.mark_at(timings::VM_CREATED, vm.timeline().vm_created());
        self.timings.mark_at(timings::FIRST_RUN, vm.timeline().first_run());
        self.timings.mark_at(timings::VM_ENDED, vm.timeline().ended());
        self.timings.fact("kvm_exits", vm.exits());
    }
}

/// Returns when the first process cannot be heard of any more.
async fn lost(process: Option<&Arc<Process>>) -> AgentError {
    match process {
        Some(process) => process.lost().await,
        None => std::future::pending().await,
    }
}

/// Returns when the pod is to end: when it is told so, or with its last container.
async fn over(pod: &Pod, end: Option<watch::Receiver<bool>>) {
    match end {
        Some(end) => ended(end).await,
        None => pod.deserted().await,
    }
}

/// Returns when a pod is to end.
async fn ended(mut end: watch::Receiver<bool>) {
    // Whoever could say so is gone: nobody needs the pod any more.
    drop(end.wait_for(|end| *end).await);
}

/// Runs the hooks that follow the start; the container is not to run if one fails.
///
/// # Errors
/// Which one failed.
pub async fn poststart(record: Record) -> Result<(), PodError> {
    let hooks = move || {
        let state = record.for_hooks(Status::Running);
        hooks::run(record.hooks.as_ref(), Point::Poststart, &state).map_err(io::Error::other)
    };
    blocking(hooks).await.map_err(|error| PodError::State(error.to_string()))
}

/// Returns when a signal comes that ends what nobody waits for; others are taken and dropped.
async fn interrupted(signals: &Listening) -> PodError {
    loop {
        match signals.next().await.map(Received::ends) {
            Ok(Some(signal)) => return PodError::Interrupted(signal),
            Ok(None) => {}
            Err(error) => return PodError::Signals(error),
        }
    }
}

/// Passes signals on, one after the other; returns only when they cannot be read any more. Without a process they are
/// dropped.
///
/// In the background only SIGTERM is meant for the container: the host goes down.
async fn forward(process: Option<&Process>, signals: &Listening, foreground: bool) -> PodError {
    loop {
        let received = signals.next().await;
        let Some(process) = process else {
            match received {
                Ok(_) => continue,
                Err(error) => return PodError::Signals(error),
            }
        };
        match received {
            Ok(Received::Resized) => process.resized().await,
            // Nobody reads on, and the user has had enough.
            Ok(received) if process.has_exited() && received.ends().is_some() => process.give_up(),
            Ok(Received::Forward(signal)) if foreground || signal == libc::SIGTERM => {
                // The process may have ended meanwhile.
                if let Err(error) = process.signal(signal).await {
                    log::debug!("cannot send signal {signal} to the container: {error}");
                }
            }
            Ok(Received::Forward(_)) => {}
            Err(error) => return PodError::Signals(error),
        }
    }
}

/// A KVM that gives up on a guest may be one that cannot run any: that is asked again then.
fn explain(error: anyhow::Error) -> anyhow::Error {
    let gave_up = matches!(
        error.downcast_ref(),
        Some(PodError::Sandbox(SandboxError::Ended { reason: ExitReason::InternalError { .. }, .. }))
    );
    if !gave_up {
        return error;
    }
    match katavm_vmm::probe::check(std::path::Path::new(probe::KVM)) {
        Err(reason) => error.context(reason),
        Ok(_) => error,
    }
}
