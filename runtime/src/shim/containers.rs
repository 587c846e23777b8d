//! The containers of a server: how they are made, started, ended and removed, with the events that tell of that.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use containerd_shim_protos::api::{CreateTaskRequest, DeleteRequest, DeleteResponse, ExecProcessRequest};
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskIO, TaskOOM, TaskStart,
};
use containerd_shim_protos::topics;
use protobuf::MessageField;
use tokio::sync::{mpsc, oneshot, watch};

use super::events::Events;
use super::io::{self, Named};
use super::logger::Logger;
use super::rootfs::Rootfs;
use super::sandbox::SharedFiles;
use super::server::{First, Order};
use crate::config::Bundle;
use crate::hooks::{self, Point};
use crate::host;
use crate::launch::record_of;
use crate::pod::{Io, NewContainer, Phase, Pod, PodError, Process, Watched};
use crate::sandbox::blocking;
use crate::service::{self, Pending, ShortPath, TaskService, timestamp};
use crate::state::{Record, StateRoot, Status};
use crate::supervise::poststart;

/// How long the removal of a process waits for what it wrote, counted from when something was read last.
const LAST_OUTPUT: Duration = Duration::from_secs(2);
/// The file in a bundle that names what stands for the container on the host, as other shims have it.
pub const PID_FILE: &str = "init.pid";

/// All containers of a server.
pub struct Containers {
    root: StateRoot,
    events: Events,
    /// To whoever makes a pod.
    orders: mpsc::Sender<Order>,
    /// Ends everything.
    end: watch::Sender<bool>,
    /// Held while the pod is made.
    making: tokio::sync::Mutex<()>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    served: Option<Served>,
    /// Nothing more is made.
    closed: bool,
    /// The pod begins with its sandbox and not with a container, and ends when that is told to. Containers get this of it.
    sandbox: Option<SharedFiles>,
    /// By id.
    known: HashMap<String, Known>,
}

/// A pod that is there.
#[derive(Clone)]
pub struct Served {
    /// The pod.
    pub pod: Arc<Pod>,
    /// What serves it.
    pub tasks: Arc<TaskService>,
    /// The state directory with its sockets.
    directory: ShortPath,
}

/// What is known of a container besides what its pod knows.
enum Known {
    /// It is being made.
    Coming,
    /// It was made.
    Made {
        record: Box<Record>,
        /// Where its root file system is.
        rootfs: Rootfs,
        /// By exec id, which is empty for the first.
        processes: HashMap<String, Told>,
        /// Held while it is removed.
        removing: Arc<tokio::sync::Mutex<()>>,
    },
}

/// What containerd was told of a process, and what it has said.
#[derive(Clone)]
pub struct Told {
    /// Its standard input, as containerd names it.
    pub stdin: String,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
    /// Whether it has a terminal.
    pub terminal: bool,
    /// Held from before a start to the news of it: the news of the end wait for that.
    starting: Arc<tokio::sync::Mutex<()>>,
    /// Becomes true with the news of its end.
    ended: watch::Sender<bool>,
    /// What takes its output.
    logger: Arc<Mutex<Option<Logger>>>,
}

impl Containers {
    /// None yet; their state is in `root`.
    #[must_use]
    pub fn new(root: StateRoot, events: Events, orders: mpsc::Sender<Order>, end: watch::Sender<bool>) -> Arc<Self> {
        let (making, state) = (tokio::sync::Mutex::default(), Mutex::default());
        Arc::new(Self { root, events, orders, end, making, state })
    }

    /// Where events are put.
    #[must_use]
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// The pod, which is there once its first container was made.
    #[must_use]
    pub fn served(&self) -> Option<Served> {
        self.state().served.clone()
    }

    /// What was told of a process.
    #[must_use]
    pub fn told(&self, id: &str, exec_id: &str) -> Option<Told> {
        self.state().known.get(id).and_then(|known| known.processes()?.get(exec_id).cloned())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends everything, if there is no container; `first` is done when nothing more can be made. A container that is to
    /// be the pod's first and is being made still does not count: who asked for it has given up.
    pub fn shut_down(&self, first: impl FnOnce()) {
        let state = self.state();
        let in_use = state.known.values().any(|known| state.served.is_some() || matches!(known, Known::Made { .. }));
        // A sandbox is told by its own API.
        let goes_on = in_use || state.sandbox.is_some();
        drop(state);
        if !goes_on {
            self.end(first);
        }
    }

    /// Ends everything; `first` is done when nothing more can be made.
    pub fn end(&self, first: impl FnOnce()) {
        self.state().closed = true;
        first();
        self.end.send_replace(true);
    }

    /// From now on the pod is made by [`Self::start_sandbox`], and `files` are what its containers get of it.
    ///
    /// # Errors
    /// That a container has made it.
    pub fn expect_sandbox(&self, files: SharedFiles) -> Result<(), String> {
        let mut state = self.state();
        if !state.known.is_empty() {
            return Err("this server has a pod already, which its first container has made".into());
        }
        state.sandbox = Some(files);
        Ok(())
    }

    /// Makes the pod without a container; the pid of what stands for it on the host.
    ///
    /// # Errors
    /// Any [`PodError`].
    pub async fn start_sandbox(&self, id: &str, first: First, stop: watch::Receiver<bool>) -> Result<u32, PodError> {
        let _making = self.making.lock().await;
        if self.served().is_some() {
            return Err(PodError::Exists(format!("sandbox {id}")));
        }
        self.make(id, first, stop).await?;
        let id = id.parse().map_err(|error| PodError::State(format!("{error}")))?;
        let found = self.root.find(&id).map_err(|error| PodError::State(error.to_string()))?;
        Ok(found.record.pid)
    }

    /// What each container uses, as far as it says so.
    pub async fn stats_of_all(&self) -> Vec<Metrics> {
        let (served, ids) = {
            let state = self.state();
            (state.served.clone(), state.known.keys().cloned().collect::<Vec<_>>())
        };
        let mut all = Vec::new();
        for id in ids {
            let Some(served) = &served else { break };
            if let Ok(stats) = served.tasks.metrics(&id).await {
                all.push(stats);
            }
        }
        all
    }

    /// Makes a container; the pid of what stands for it on the host.
    ///
    /// # Errors
    /// Any [`PodError`]; nothing is left of it then.
    pub async fn create(self: &Arc<Self>, request: CreateTaskRequest) -> Result<u32, PodError> {
        let id = request.id.clone();
        {
            let mut state = self.state();
            if state.closed {
                return Err(PodError::State("the server ends: containerd has shut it down".into()));
            }
            if state.known.contains_key(&id) {
                return Err(PodError::Exists(format!("container {id}")));
            }
            state.known.insert(id.clone(), Known::Coming);
        }
        let created = self.create_rooted(&request).await;
        if created.is_err() {
            self.state().known.remove(&id);
        }
        created
    }

    /// Makes one with its streams and its root file system.
    async fn create_rooted(self: &Arc<Self>, request: &CreateTaskRequest) -> Result<u32, PodError> {
        let told = Told::new(&request.stdin, &request.stdout, &request.stderr, request.terminal);
        let io = self.open(&told, &request.id).await?;
        let (bundle, mounts) = (PathBuf::from(&request.bundle), request.rootfs.clone());
        let rootfs = self.beside_requests(move || Rootfs::make(&bundle, &mounts)).await?;
        // Kept open: whoever reads a stream must not find its end between two attempts.
        let duplicate = rootfs.in_guest().map(|_| io.duplicate()).transpose();
        let second = duplicate.map_err(|error| PodError::State(format!("the streams: {error}")))?;
        match (self.create_on(request, rootfs, &told, io).await, second) {
            (Err(error), Some(io)) if error.is_of_disks() => {
                let id = &request.id;
                log::warn!("the root file system of {id} is mounted here and shared: {error}");
                let (bundle, mounts) = (PathBuf::from(&request.bundle), request.rootfs.clone());
                let rootfs = self.beside_requests(move || Rootfs::mount(&bundle, &mounts)).await?;
                self.create_on(request, rootfs, &told, io).await
            }
            (created, _) => created,
        }
    }

    /// Makes one on its root file system, which is unmounted if that fails.
    async fn create_on(
        self: &Arc<Self>,
        request: &CreateTaskRequest,
        rootfs: Rootfs,
        told: &Told,
        io: Io,
    ) -> Result<u32, PodError> {
        let created = self.create_followed(request, &rootfs, told, io).await;
        if created.is_err() {
            rootfs.unmount(Path::new(&request.bundle));
        }
        created
    }

    /// Does what may take a while. Others are served meanwhile once there is a pod; before, this process must keep to its
    /// one thread, as it is about to fork.
    async fn beside_requests<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, String> + Send + 'static,
    ) -> Result<T, PodError> {
        if self.served().is_none() {
            return work().map_err(PodError::State);
        }
        let done = blocking(move || work().map_err(std::io::Error::other)).await;
        done.map_err(|error| PodError::State(error.to_string()))
    }

    /// Opens the streams of a process of container `id`.
    async fn open(&self, told: &Told, id: &str) -> Result<Io, PodError> {
        let (named, namespace, id) = (told.clone(), self.events.namespace().to_owned(), id.to_owned());
        let opened = self.beside_requests(move || {
            let Told { stdin, stdout, stderr, terminal, .. } = &named;
            io::open(Named { stdin, stdout, stderr, terminal: *terminal }, &namespace, &id)
        });
        let (io, logger) = opened.await?;
        *told.logger() = logger;
        Ok(io)
    }

    async fn create_followed(
        self: &Arc<Self>,
        request: &CreateTaskRequest,
        rootfs: &Rootfs,
        told: &Told,
        io: Io,
    ) -> Result<u32, PodError> {
        let pod = self.create_in_pod(request, rootfs, io).await?;
        let id = &request.id;
        let (container, process) = (pod.container(id)?, pod.process(id, "")?);
        // Nothing of it goes before containerd says so: after the death of a server it says so of each container, but for
        // those of a sandbox.
        if self.state().sandbox.is_none() {
            container.keep();
        }
        let record = container.record();
        let pid = record.pid;
        if let Err(error) = std::fs::write(record.bundle.join(PID_FILE), pid.to_string()) {
            log::warn!("cannot write {PID_FILE} to the bundle: {error}");
        }
        let watched = pod.watch(id).await;
        let watched = watched
            .inspect_err(|error| log::warn!("out-of-memory kills in container {id} will not be told of: {error}"));
        self.tell_of_creation(request, pid);
        self.follow(id, "", pid, process, told, watched.ok());
        let made = Known::Made {
            record: Box::new(record),
            rootfs: rootfs.clone(),
            processes: HashMap::from([(String::new(), told.clone())]),
            removing: Arc::default(),
        };
        self.state().known.insert(id.clone(), made);
        Ok(pid)
    }

    async fn create_in_pod(&self, request: &CreateTaskRequest, rootfs: &Rootfs, io: Io) -> Result<Arc<Pod>, PodError> {
        let making = self.making.lock().await;
        if let Some(served) = self.served() {
            drop(making);
            self.create_member(&served, request, rootfs, io).await?;
            return Ok(served.pod);
        }
        if self.state().sandbox.is_some() {
            return Err(PodError::State("the sandbox is not started".into()));
        }
        let first = First::Container { request: Box::new(request.clone()), rootfs: rootfs.clone(), io };
        self.make(&request.id, first, self.end.subscribe()).await
    }

    /// Has the pod made, whose state is that of `id`. Only one at a time.
    async fn make(&self, id: &str, first: First, stop: watch::Receiver<bool>) -> Result<Arc<Pod>, PodError> {
        let over = || PodError::State("the server ends".into());
        let (made, answer) = oneshot::channel();
        self.orders.send(Order { first, made, stop }).await.map_err(|_| over())?;
        let pod = answer.await.map_err(|_| over())?.map_err(PodError::State)?;
        let failed = |error: std::io::Error| PodError::State(format!("the state directory: {error}"));
        let directory = ShortPath::of(&self.root.path().join(id)).map_err(failed)?;
        let tasks = Arc::new(TaskService::new(Arc::clone(&pod), Pending::default(), directory.clone()));
        self.state().served = Some(Served { pod: Arc::clone(&pod), tasks, directory });
        Ok(pod)
    }

    /// Makes a further container, for which the sandbox process itself stands on the host.
    async fn create_member(
        &self,
        served: &Served,
        request: &CreateTaskRequest,
        rootfs: &Rootfs,
        io: Io,
    ) -> Result<(), PodError> {
        let (root, directory) = (self.root.clone(), served.directory.clone());
        let (request, rootfs) = (request.clone(), rootfs.clone());
        let files = self.state().sandbox.clone();
        let plan = move || {
            plan_member(&root, &directory, &request, &rootfs, files.as_ref(), io).map_err(std::io::Error::other)
        };
        let new = blocking(plan).await.map_err(|error| PodError::State(error.to_string()))?;
        served.pod.create(new).await.map(drop)
    }

    fn tell_of_creation(&self, request: &CreateTaskRequest, pid: u32) {
        let io = TaskIO {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
            ..Default::default()
        };
        let event = TaskCreate {
            container_id: request.id.clone(),
            bundle: request.bundle.clone(),
            rootfs: request.rootfs.clone(),
            io: MessageField::some(io),
            pid,
            ..Default::default()
        };
        self.events.publish(topics::TASK_CREATE_EVENT_TOPIC, &event);
    }

    /// Tells of processes that are killed for want of memory, until the container has ended.
    async fn tell_of_kills(&self, container_id: &str, mut watched: Watched) {
        loop {
            let news = watched.next().await;
            for _ in 0..news.kills {
                let event = TaskOOM { container_id: container_id.into(), ..Default::default() };
                self.events.publish(topics::TASK_OOM_EVENT_TOPIC, &event);
            }
            if news.ended {
                return;
            }
        }
    }

    /// Tells of the end of a process when that comes.
    fn follow(
        self: &Arc<Self>,
        id: &str,
        exec_id: &str,
        pid: u32,
        process: Arc<Process>,
        told: &Told,
        watched: Option<Watched>,
    ) {
        let (containers, starting, ended) = (Arc::clone(self), Arc::clone(&told.starting), told.ended.clone());
        let (container_id, exec_id) = (id.to_owned(), exec_id.to_owned());
        tokio::spawn(async move {
            if let Some(watched) = watched {
                containers.tell_of_kills(&container_id, watched).await;
            }
            let exit = process.wait().await;
            let _told_of_the_start = starting.lock().await;
            let id = if exec_id.is_empty() { container_id.clone() } else { exec_id };
            let (exit_status, exited_at) = (exit.status, timestamp(exit.at_ns));
            let event = TaskExit { container_id, id, pid, exit_status, exited_at, ..Default::default() };
            containers.events.publish(topics::TASK_EXIT_EVENT_TOPIC, &event);
            ended.send_replace(true);
        });
    }

    /// Starts a process; the pid of what stands for it on the host.
    ///
    /// # Errors
    /// Any [`PodError`].
    pub async fn start(&self, served: &Served, id: &str, exec_id: &str) -> Result<u32, PodError> {
        let process = served.pod.process(id, exec_id)?;
        let record = served.pod.container(id)?.record();
        let told = self.told(id, exec_id).ok_or_else(|| PodError::NoContainer(id.into()))?;
        let pid = record.pid;
        {
            let _until_told = told.starting.lock().await;
            served.pod.start(id, exec_id).await?;
            let container_id = id.to_owned();
            if exec_id.is_empty() {
                let event = TaskStart { container_id, pid, ..Default::default() };
                self.events.publish(topics::TASK_START_EVENT_TOPIC, &event);
            } else {
                let event = TaskExecStarted { container_id, exec_id: exec_id.into(), pid, ..Default::default() };
                self.events.publish(topics::TASK_EXEC_STARTED_EVENT_TOPIC, &event);
            }
        }
        if exec_id.is_empty()
            && let Err(error) = poststart(record).await
        {
            log::warn!("{error}");
            drop(process.signal(libc::SIGKILL).await);
        }
        Ok(pid)
    }

    /// Makes a further process.
    ///
    /// # Errors
    /// Any [`PodError`].
    pub async fn exec(self: &Arc<Self>, served: &Served, request: ExecProcessRequest) -> Result<(), PodError> {
        let ExecProcessRequest { id, exec_id, terminal, stdin, stdout, stderr, spec, .. } = request;
        let told = Told::new(&stdin, &stdout, &stderr, terminal);
        let io = self.open(&told, &id).await?;
        let spec = spec.into_option().unwrap_or_default().value;
        let process = served.pod.create_exec(&id, &exec_id, spec, io, None).await?;
        let pid = served.pod.container(&id)?.record().pid;
        let event = TaskExecAdded { container_id: id.clone(), exec_id: exec_id.clone(), ..Default::default() };
        self.events.publish(topics::TASK_EXEC_ADDED_EVENT_TOPIC, &event);
        self.follow(&id, &exec_id, pid, process, &told, None);
        if let Some(Known::Made { processes, .. }) = self.state().known.get_mut(&id) {
            processes.insert(exec_id, told);
        }
        Ok(())
    }

    /// Removes a process that has ended; with its first the container.
    ///
    /// # Errors
    /// Any [`PodError`].
    pub async fn delete(&self, served: &Served, request: &DeleteRequest) -> Result<DeleteResponse, PodError> {
        let (id, exec_id) = (&request.id, &request.exec_id);
        let nothing = || PodError::NoContainer(id.clone());
        let removing = match self.state().known.get(id) {
            Some(Known::Made { removing, .. }) => Arc::clone(removing),
            Some(Known::Coming) | None => return Err(nothing()),
        };
        let _alone = removing.lock().await;
        let told = self.told(id, exec_id).ok_or_else(|| match exec_id.as_str() {
            "" => nothing(),
            process => PodError::NoProcess { container: id.clone(), process: process.into() },
        })?;
        let container = served.pod.container(id)?;
        let process = container.process(exec_id)?;
        let Phase::Stopped(exit) = process.phase() else {
            let status = container.status();
            return Err(PodError::State(format!("cannot delete container {id} that is not stopped: {status}")));
        };
        let pid = container.record().pid;
        // The news of the end go first, and what nobody has read by now nobody will.
        let _ = told.ended.subscribe().wait_for(|ended| *ended).await;
        process.close_output(LAST_OUTPUT).await;
        told.end_logger().await;
        let (exit_status, exited_at) = (exit.status, timestamp(exit.at_ns));
        if exec_id.is_empty() {
            served.pod.remove(id).await?;
            self.removed(id).await;
            let event = TaskDelete {
                container_id: id.clone(),
                pid,
                exit_status,
                exited_at: exited_at.clone(),
                ..Default::default()
            };
            self.events.publish(topics::TASK_DELETE_EVENT_TOPIC, &event);
        } else {
            container.remove_exec(exec_id);
            if let Some(Known::Made { processes, .. }) = self.state().known.get_mut(id) {
                processes.remove(exec_id);
            }
        }
        Ok(DeleteResponse { pid, exit_status, exited_at, ..Default::default() })
    }

    /// What follows the removal of a container.
    async fn removed(&self, id: &str) {
        let Some(Known::Made { record, rootfs, .. }) = self.state().known.remove(id) else { return };
        let work = move || {
            rootfs.unmount(&record.bundle);
            hooks::run_all(record.hooks.as_ref(), Point::Poststop, &record.for_hooks(Status::Stopped));
            if record.pid != std::process::id() {
                // The stand-in is a child of this process, and ends with its container.
                host::reap(record.pid);
            }
            Ok(())
        };
        if let Err(error) = blocking(work).await {
            log::warn!("{error}");
        }
    }
}

impl Known {
    fn processes(&self) -> Option<&HashMap<String, Told>> {
        match self {
            Self::Coming => None,
            Self::Made { processes, .. } => Some(processes),
        }
    }
}

impl Told {
    fn new(stdin: &str, stdout: &str, stderr: &str, terminal: bool) -> Self {
        Self {
            stdin: stdin.into(),
            stdout: stdout.into(),
            stderr: stderr.into(),
            terminal,
            starting: Arc::default(),
            ended: watch::Sender::new(false),
            logger: Arc::default(),
        }
    }

    fn logger(&self) -> MutexGuard<'_, Option<Logger>> {
        self.logger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the end of what takes its output.
    async fn end_logger(&self) {
        let Some(logger) = self.logger().take() else { return };
        // A thread that panics has said so.
        let _ = tokio::task::spawn_blocking(move || logger.end()).await;
    }
}

/// Claims the state of a further container, for which this process stands on the host.
fn plan_member(
    root: &StateRoot,
    directory: &ShortPath,
    request: &CreateTaskRequest,
    rootfs: &Rootfs,
    files: Option<&SharedFiles>,
    io: Io,
) -> anyhow::Result<NewContainer> {
    let id = request.id.parse()?;
    let mut bundle = Bundle { in_guest: rootfs.in_guest().cloned(), ..Bundle::load(Path::new(&request.bundle))? };
    if let Some(files) = files {
        files.give(&mut bundle.spec);
    }
    for field in &bundle.unhonoured {
        log::warn!("{field}");
    }
    let state = root.claim(&id)?;
    let record = record_of(&id, &bundle);
    service::member(directory, &bundle, state, record, io, None)
}
