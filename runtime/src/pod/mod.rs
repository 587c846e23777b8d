//! A pod: the containers that share one sandbox, and what is done to them while the sandbox lives.

mod container;
mod cpusets;
mod disks;
mod forward;
mod io;
mod names;
mod network;
mod process;
mod size;
mod streams;
mod volumes;
mod watch;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use katavm_devices::fs::FsShare;
use katavm_protocol::agent::event::What;
use katavm_protocol::agent::{
    CreateContainerRequest, CreateExecRequest, MountOverlayRequest, Ready, RemoveContainerRequest, StatsResponse, Tmpfs,
};
use katavm_vmm::MicrovmError;
use oci_spec::runtime::LinuxResources;
use tokio::sync::watch::Sender;

use crate::cpuset::Cpuset;
use crate::host::Cgroup;
use crate::limits;
use crate::link::Link;
use crate::network::NetworkError;
use crate::process::terminal::TerminalError;
use crate::sandbox::agent::{Agent, AgentError, GuestProcess};
use crate::sandbox::disk::{Disk, Part};
use crate::sandbox::plan::{Export, Replaced};
use crate::sandbox::share::{Share, ShareError, with_sources};
use crate::sandbox::size::Limits;
use crate::sandbox::{Sandbox, SandboxError};
use crate::state::{Journal, Status};
pub use container::Container;
use container::{Held, Seen};
use cpusets::Cpusets;
pub use disks::DiskError;
use disks::Disks;
pub use io::Io;
pub use network::Network;
pub use process::{Phase, Process};
use size::Sizes;
use volumes::Volumes;
pub use watch::{News, Watched};

/// Why something was not done to a container.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
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
    /// No such container.
    #[error("container {0} does not exist")]
    NoContainer(String),
    /// No such process.
    #[error("container {container} has no process {process}")]
    NoProcess {
        /// The container's id.
        container: String,
        /// The process' id.
        process: String,
    },
    /// The id is taken.
    #[error("{0} exists already")]
    Exists(String),
    /// It is in a state in which this cannot be done.
    #[error("{0}")]
    State(String),
    /// The network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// What of the host it is to see.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// What it is to have as disks.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The process that stands for it on the host.
    #[error("the container's stand-in on the host: {0}")]
    StandIn(String),
}

impl PodError {
    /// Whether the guest cannot have as disks what the host may yet mount and share.
    #[must_use]
    pub fn is_of_disks(&self) -> bool {
        let Self::Disk(error) = self else { return false };
        matches!(
            error,
            DiskError::Attach { error: MicrovmError::NoPlace, .. }
                | DiskError::Guest { part: Part::Layer(_), .. }
                | DiskError::Overlay(_)
        )
    }
}

impl From<AgentError> for PodError {
    fn from(error: AgentError) -> Self {
        Self::Sandbox(error.into())
    }
}

/// A container that is to be made.
pub struct NewContainer {
    /// Its id.
    pub id: String,
    /// Its configuration as the guest shall see it.
    pub spec: Vec<u8>,
    /// What of the host it sees.
    pub exports: Vec<Export>,
    /// What file systems of the guest's memory it sees.
    pub tmpfs: Vec<Tmpfs>,
    /// Of which volumes it sees copies.
    pub replaced: Vec<Replaced>,
    /// What of the host it has as disks.
    pub disks: Vec<Disk>,
    /// How layers among them are put together to its root file system.
    pub overlay: Option<MountOverlayRequest>,
    /// The streams of its first process.
    pub io: Io,
    /// To its stand-in.
    pub link: Option<Link>,
    /// Where its state is written down.
    pub journal: Journal,
    /// The control group on the host that its limits hold for as well; nothing if that is another container's, or if
    /// there is none.
    pub cgroup: Option<Cgroup>,
    /// What it may use, as far as the sandbox' size depends on it; nothing if it only holds a pod together.
    pub limits: Option<Limits>,
    /// What of the host it names to run on.
    pub cpuset: Cpuset,
    /// The sandbox was made for it: its state directory and control group are the sandbox' as well.
    pub is_first: bool,
}

/// A sandbox that is ready, and its containers by their ids.
pub struct Pod {
    sandbox: Arc<Sandbox>,
    agent: Agent,
    /// Nothing for an ordinary user's, whose guest has the loopback only.
    network: Option<Network>,
    /// What of the host the guest sees.
    share: Share,
    /// How large it is.
    sizes: Sizes,
    /// What of the host it runs on.
    cpusets: Cpusets,
    /// What of the host was copied to the guest.
    volumes: Volumes,
    containers: Mutex<BTreeMap<String, Arc<Container>>>,
    /// The first one once it was removed: its state directory and control group stay with the sandbox.
    retired: Mutex<Option<Arc<Container>>>,
    /// How many containers have a first process that has not ended; changes when one is made or ends.
    alive: Sender<usize>,
    /// How many watch a container.
    watchers: Sender<usize>,
    /// What happens in the guest is followed: from when somebody wants to know on.
    followed: AtomicBool,
}

impl Pod {
    /// Waits for a sandbox that was started, and prepares its guest. `cgroup` holds the sandbox, and its memory to
    /// a limit if it `has_memory_limit`.
    ///
    /// # Errors
    /// Any [`PodError`].
    pub async fn prepare(
        sandbox: &Arc<Sandbox>,
        network: Option<Network>,
        share: FsShare,
        cgroup: Option<Cgroup>,
        has_memory_limit: bool,
        ready: impl FnOnce(Duration) -> std::io::Result<Ready> + Send + 'static,
        hostname: &str,
    ) -> Result<(Arc<Self>, Ready), PodError> {
        let (agent, ready) = sandbox.prepare(ready, hostname).await?;
        let (containers, retired) = (Mutex::default(), Mutex::default());
        let (alive, watchers) = (Sender::new(0), Sender::new(0));
        let followed = AtomicBool::new(false);
        let (sandbox, share) = (Arc::clone(sandbox), Share::over(share));
        let volumes = Volumes::new(agent.clone());
        let sizes = Sizes::new(&*sandbox.machine(), cgroup.clone().filter(|_| has_memory_limit));
        let cpusets = Cpusets::new(cgroup);
        let pod = Self {
            sandbox,
            agent,
            network,
            share,
            sizes,
            cpusets,
            volumes,
            containers,
            retired,
            alive,
            watchers,
            followed,
        };
        pod.update_network().await?;
        Ok((Arc::new(pod), ready))
    }

    /// Carries over to the guest what has changed in the pod's network namespace on the host.
    async fn update_network(&self) -> Result<(), PodError> {
        match &self.network {
            Some(network) => network.update(&self.agent).await,
            None => Ok(()),
        }
    }

    /// Does so whenever something has changed, and forwards what is connected to from within the namespace; returns only
    /// when it cannot hear of changes any more.
    pub async fn follow_network(&self) -> PodError {
        let Some(network) = &self.network else { return std::future::pending().await };
        tokio::select! {
            error = network.follow(&self.agent) => NetworkError::Socket(error).into(),
            never = network.forward(self.sandbox.dialler()) => match never {},
            never = network.resolve(self.sandbox.dialler()) => match never {},
        }
    }

    /// The service of the agent.
    #[must_use]
    pub fn agent(&self) -> &Agent {
        &self.agent
    }

    /// Makes a container whose first process waits to be started, connects its streams, and has its stand-in take up
    /// its view of the container's files.
    ///
    /// # Errors
    /// Any [`PodError`]; nothing is left of it then.
    pub async fn create(self: &Arc<Self>, new: NewContainer) -> Result<Arc<Process>, PodError> {
        if self.containers().contains_key(&new.id) {
            return Err(PodError::Exists(format!("container {}", new.id)));
        }
        if new.is_first {
            // The sandbox was planned for it, and is held to its cpuset.
            self.cpusets.begin(&new.id, new.cpuset.clone()).await;
            return self.make(new).await;
        }
        let (id, limits, cpuset) = (new.id.clone(), new.limits, new.cpuset.clone());
        let made = async {
            self.cpusets.join(&id, cpuset).await?;
            self.make(new).await
        };
        let made = self.with_room(&id, limits, made).await;
        if made.is_err() {
            self.cpusets.leave(&id).await;
            self.take_back();
        }
        made
    }

    async fn make(self: &Arc<Self>, new: NewContainer) -> Result<Arc<Process>, PodError> {
        let NewContainer {
            id,
            spec,
            exports,
            tmpfs,
            replaced,
            disks,
            overlay,
            io,
            link,
            journal,
            cgroup,
            limits,
            is_first,
            ..
        } = new;
        let (exports, copies) = (self.share.add(&exports)?, self.volumes.add(&replaced).await?);
        let mut seen = Seen { exports, copies, disks: Disks::default() };
        let spec = match Disks::attach(&self.sandbox, &self.agent, &id, &disks, overlay, spec).await {
            Ok((spec, attached)) => {
                seen.disks = attached;
                spec
            }
            Err(error) => {
                self.give_up(&id, seen).await;
                return Err(error);
            }
        };
        let spec = match with_sources(spec, seen.exports.sources().chain(seen.copies.sources())) {
            Ok(spec) => spec,
            Err(error) => {
                self.give_up(&id, seen).await;
                return Err(PodError::State(format!("the configuration: {error}")));
            }
        };
        let request = CreateContainerRequest {
            container_id: id.clone(),
            spec,
            tmpfs,
            stdio: Some(io.wanted()).into(),
            ..Default::default()
        };
        let guest_pid = match self.agent.create_container(&request).await {
            Ok(guest_pid) => guest_pid,
            Err(error) => {
                // What was shared with it and copied for it is there still.
                self.give_up(&id, seen).await;
                return Err(error.into());
            }
        };
        let connected = async {
            let process = Process::connect(&self.sandbox, &self.agent, &id, "", guest_pid, io, link).await?;
            process.settle_stand_in().await?;
            Ok::<_, PodError>(process)
        };
        let process = match connected.await {
            Ok(process) => process,
            Err(error) => {
                // Its making failed in the middle; why is in `error`.
                self.give_up(&id, seen).await;
                return Err(error);
            }
        };
        let held = Held { cgroup, limits };
        let container = Arc::new(Container::new(id.clone(), Arc::clone(&process), seen, journal, held, is_first));
        self.containers().insert(id, Arc::clone(&container));
        self.alive.send_modify(|alive| *alive += 1);
        let pod = Arc::clone(self);
        tokio::spawn(async move {
            container.follow().await;
            pod.alive.send_modify(|alive| *alive -= 1);
            if !pod.sandbox.has_ended() {
                pod.cpusets.leave(container.id()).await;
            }
            pod.take_back();
        });
        Ok(process)
    }

    /// Removes what is left of a container that was not made.
    async fn give_up(&self, id: &str, mut seen: Seen) {
        let it = RemoveContainerRequest { container_id: id.into(), ..Default::default() };
        drop(self.agent.remove_container(&it).await);
        // As long as the upper layer of an overlay of disks is shared.
        seen.disks.detach().await;
        drop(self.agent.remove_container(&seen.release(id)).await);
    }

    /// Makes a further process in a running container; it waits to be started.
    ///
    /// # Errors
    /// Any [`PodError`]; nothing is left of it then.
    pub async fn create_exec(
        &self,
        container_id: &str,
        exec_id: &str,
        spec: Vec<u8>,
        io: Io,
        link: Option<Link>,
    ) -> Result<Arc<Process>, PodError> {
        let container = self.container(container_id)?;
        if container.status() != Status::Running {
            return Err(PodError::State(format!("cannot exec in a {} container", container.status())));
        }
        let claim = container.claim(exec_id)?;
        let request = CreateExecRequest {
            container_id: container_id.into(),
            exec_id: exec_id.into(),
            process: spec,
            stdio: Some(io.wanted()).into(),
            ..Default::default()
        };
        let guest_pid = self.agent.create_exec(&request).await?;
        let process = Process::connect(&self.sandbox, &self.agent, container_id, exec_id, guest_pid, io, link).await?;
        claim.keep(&process);
        Ok(process)
    }

    /// A container by its id.
    ///
    /// # Errors
    /// There is none.
    pub fn container(&self, id: &str) -> Result<Arc<Container>, PodError> {
        self.containers().get(id).cloned().ok_or_else(|| PodError::NoContainer(id.into()))
    }

    /// A process by the id of its container and its own, which is empty for the container's first.
    ///
    /// # Errors
    /// There is none.
    pub fn process(&self, container_id: &str, exec_id: &str) -> Result<Arc<Process>, PodError> {
        self.container(container_id)?.process(exec_id)
    }

    /// Starts a process. Before a container's first the network is looked at once more: engines plug it in between
    /// making the container and starting it.
    ///
    /// # Errors
    /// Any [`PodError`].
    pub async fn start(&self, container_id: &str, exec_id: &str) -> Result<(), PodError> {
        let process = self.process(container_id, exec_id)?;
        if exec_id.is_empty() && process.phase() == Phase::Created {
            self.update_network().await?;
        }
        process.start().await
    }

    /// Sends a signal to all processes of a container.
    ///
    /// # Errors
    /// Any [`PodError`].
    pub async fn signal_all(&self, container_id: &str, signal: i32) -> Result<(), PodError> {
        let container = self.container(container_id)?;
        if matches!(container.init().phase(), Phase::Stopped(_)) {
            return Err(PodError::State("container not running".into()));
        }
        Ok(self.agent.signal_all(container_id, signal).await?)
    }

    /// Stops all processes of a container, or lets them go on.
    ///
    /// # Errors
    /// Any [`PodError`].
    pub async fn freeze(&self, container_id: &str, frozen: bool) -> Result<(), PodError> {
        let container = self.container(container_id)?;
        match (container.status(), frozen) {
            (Status::Running, true) => self.agent.pause(container_id).await?,
            (Status::Paused, false) => self.agent.resume(container_id).await?,
            (status, true) => return Err(PodError::State(format!("container not running or created: {status}"))),
            (_, false) => return Err(PodError::State("container not paused".into())),
        }
        container.note(if frozen { Status::Paused } else { Status::Running });
        Ok(())
    }

    /// The processes of a container as the guest counts them.
    ///
    /// # Errors
    /// Any [`PodError`].
    pub async fn processes(&self, container_id: &str) -> Result<Vec<GuestProcess>, PodError> {
        self.container(container_id)?;
        Ok(self.agent.list_processes(container_id).await?)
    }

    /// What a container has used.
    ///
    /// # Errors
    /// Any [`PodError`].
    pub async fn stats(&self, container_id: &str) -> Result<StatsResponse, PodError> {
        let container = self.container(container_id)?;
        let stats = self.agent.stats(container_id).await?;
        container.kills().note(stats.memory_events.get("oom_kill").copied().unwrap_or_default());
        Ok(stats)
    }

    /// Watches a container from now on.
    ///
    /// # Errors
    /// Any [`PodError`].
    pub async fn watch(self: &Arc<Self>, container_id: &str) -> Result<Watched, PodError> {
        let container = self.container(container_id)?;
        self.follow_events().await?;
        // What was before is not news.
        self.stats(container_id).await?;
        Ok(Watched::new(container, self.watchers.clone()))
    }

    /// Has the agent tell of what happens in the guest, if it does not yet.
    async fn follow_events(self: &Arc<Self>) -> Result<(), PodError> {
        if self.followed.swap(true, Ordering::Relaxed) {
            return Ok(());
        }
        let mut events = self.agent.events().await.inspect_err(|_| self.followed.store(false, Ordering::Relaxed))?;
        let pod = Arc::downgrade(self);
        tokio::spawn(async move {
            while let Some(event) = events.next().await {
                let Some(pod) = pod.upgrade() else { return };
                if let (Some(What::Oom(oom)), Ok(container)) = (event.what, pod.container(&event.container_id)) {
                    container.kills().note(oom.kills);
                }
            }
        });
        Ok(())
    }

    /// Returns when nobody watches a container any more.
    pub async fn unwatched(&self) {
        // The sender lives in this pod.
        let _ = self.watchers.subscribe().wait_for(|watchers| *watchers == 0).await;
    }

    /// Changes a container's limits, in the guest and on the host; `resources` is JSON as in the runtime specification.
    ///
    /// # Errors
    /// Any [`PodError`].
    pub async fn update(self: &Arc<Self>, container_id: &str, resources: &[u8]) -> Result<(), PodError> {
        let container = self.container(container_id)?;
        let invalid = |error: serde_json::Error| PodError::State(format!("the resources: {error}"));
        let mut resources: LinuxResources = serde_json::from_slice(resources).map_err(invalid)?;
        let limits = container.limits().map(|limits| limits.updated(&resources));
        let cpuset = Cpuset::take(&mut resources);
        let updated = async {
            container.limit_on_host(&resources).await?;
            self.cpusets.update(&container, cpuset).await?;
            limits::keep_guests(&mut resources);
            let resources = serde_json::to_vec(&resources).map_err(invalid)?;
            self.agent.update_container(container_id, resources).await?;
            container.set_limits(limits);
            Ok(())
        };
        let updated = self.with_room(container_id, limits, updated).await;
        self.take_back();
        updated
    }

    /// Removes a container that has ended.
    ///
    /// # Errors
    /// Any [`PodError`].
    pub async fn remove(&self, container_id: &str) -> Result<(), PodError> {
        let container = self.container(container_id)?;
        if !matches!(container.init().phase(), Phase::Stopped(_)) {
            let status = container.status();
            return Err(PodError::State(format!(
                "cannot delete container {container_id} that is not stopped: {status}"
            )));
        }
        // Its end may just have been heard of.
        container.release().await;
        // With the sandbox everything of it in the guest has gone.
        let goes_on = !self.sandbox.has_ended();
        if goes_on {
            self.agent.remove_container(&container.removal()).await?;
        }
        if goes_on && container.is_first() {
            container.retire();
            *self.retired.lock().unwrap_or_else(PoisonError::into_inner) = Some(container);
        } else {
            container.forget();
        }
        self.containers().remove(container_id);
        Ok(())
    }

    /// Returns when no container has a first process that has not ended.
    pub async fn deserted(&self) {
        let mut alive = self.alive.subscribe();
        // The sender lives in this pod.
        let _ = alive.wait_for(|alive| *alive == 0).await;
    }

    /// Returns when all that the processes wrote has arrived; their sandbox has ended.
    pub async fn drained(&self) {
        let containers: Vec<_> = self.containers().values().cloned().collect();
        for container in containers {
            container.drained().await;
        }
    }

    /// Ends the processes that are left in name only: the sandbox is gone, and they with it. The network namespace is
    /// what it was before.
    pub fn end_all(&self) {
        if let Some(network) = &self.network {
            network.unplug();
        }
        for container in self.containers().values() {
            container.end_all();
        }
    }

    fn containers(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Container>>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
