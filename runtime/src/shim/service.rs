//! The Task API as containerd asks for it: a pod is made with its first container, streams are named, and events tell of
//! everything.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse, DeleteRequest,
    DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse, ProcessInfo,
    ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse,
    StatsRequest, StatsResponse, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskIO, TaskOOM, TaskPaused, TaskResumed,
    TaskStart,
};
use containerd_shim_protos::shim_async::Task;
use containerd_shim_protos::topics;
use protobuf::MessageField;
use tokio::sync::{mpsc, oneshot, watch};
use ttrpc::r#async::TtrpcContext;
use ttrpc::{Code, get_status};

use super::events::{Events, bare};
use super::io::{self, Named};
use super::rootfs;
use super::server::{First, Order};
use crate::config::Bundle;
use crate::hooks::{self, Point};
use crate::host;
use crate::launch::record_of;
use crate::pod::{Io, NewContainer, Phase, Pod, PodError, Process, Watched};
use crate::sandbox::blocking;
use crate::service::{self, Pending, TaskService, refusal, timestamp, to_its_end};
use crate::state::{Record, StateRoot, Status};
use crate::supervise::poststart;

/// The service.
#[derive(Clone)]
pub struct ShimService {
    shared: Arc<Shared>,
}

struct Shared {
    root: StateRoot,
    events: Events,
    /// To whoever makes a pod.
    orders: mpsc::Sender<Order>,
    /// Ends everything.
    end: watch::Sender<bool>,
    /// Held while a container is made: the first one makes the pod.
    pod: tokio::sync::Mutex<Option<Served>>,
    containers: Mutex<HashMap<String, Known>>,
    /// The pod begins with its sandbox and not with a container, and ends when that is told to.
    has_sandbox: AtomicBool,
}

/// A pod that is there.
#[derive(Clone)]
struct Served {
    pod: Arc<Pod>,
    tasks: Arc<TaskService>,
    /// The state directory with its sockets.
    directory: PathBuf,
}

/// What is known of a container besides what its pod knows.
struct Known {
    /// How many file systems are mounted at its root.
    mounts: usize,
    /// By exec id, which is empty for the first.
    processes: HashMap<String, Told>,
}

/// What containerd was told of a process, and what it has said.
#[derive(Default)]
struct Told {
    stdin: String,
    stdout: String,
    stderr: String,
    terminal: bool,
    /// Held from before a start to the news of it: the news of the end wait for that.
    starting: Arc<tokio::sync::Mutex<()>>,
}

fn not_found(text: String) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(Code::NOT_FOUND, text))
}

impl ShimService {
    /// For the containers of a namespace, whose state is in `root`.
    #[must_use]
    pub fn new(root: StateRoot, events: Events, orders: mpsc::Sender<Order>, end: watch::Sender<bool>) -> Self {
        let (pod, containers) = (tokio::sync::Mutex::default(), Mutex::default());
        let has_sandbox = AtomicBool::new(false);
        Self { shared: Arc::new(Shared { root, events, orders, end, pod, containers, has_sandbox }) }
    }

    /// From now on the pod is made by [`Self::start_sandbox`].
    ///
    /// # Errors
    /// That a container has made it.
    pub fn expect_sandbox(&self) -> Result<(), String> {
        if !self.shared.containers().is_empty() {
            return Err("this server has a pod already, which its first container has made".into());
        }
        self.shared.has_sandbox.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Makes the pod without a container; the pid of what stands for it on the host.
    ///
    /// # Errors
    /// Any [`PodError`].
    pub async fn start_sandbox(&self, id: &str, first: First, stop: watch::Receiver<bool>) -> Result<u32, PodError> {
        let mut served = self.shared.pod.lock().await;
        if served.is_some() {
            return Err(PodError::Exists(format!("sandbox {id}")));
        }
        self.shared.make(&mut served, id, first, stop).await?;
        let id = id.parse().map_err(|error| PodError::State(format!("{error}")))?;
        let found = self.shared.root.find(&id).map_err(|error| PodError::State(error.to_string()))?;
        Ok(found.record.pid)
    }

    /// What each container uses, as far as it says so.
    pub async fn stats_of_all(&self) -> Vec<Metrics> {
        let ids: Vec<_> = self.shared.containers().keys().cloned().collect();
        let served = self.shared.pod.lock().await.clone();
        let mut all = Vec::new();
        for id in ids {
            let Some(served) = &served else { break };
            if let Ok(stats) = served.tasks.metrics(&id).await {
                all.push(stats);
            }
        }
        all
    }

    /// Ends the server.
    pub fn end(&self) {
        self.shared.end.send_replace(true);
    }

    /// The pod, which is there once its first container was made.
    async fn served(&self, id: &str) -> ttrpc::Result<Served> {
        let served = self.shared.pod.lock().await.clone();
        served.ok_or_else(|| refusal(PodError::NoContainer(id.into())))
    }
}

impl Shared {
    fn containers(&self) -> MutexGuard<'_, HashMap<String, Known>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a container; the pid of what stands for it on the host.
    async fn create(self: &Arc<Self>, request: CreateTaskRequest) -> Result<u32, PodError> {
        let mut served = self.pod.lock().await;
        let id = request.id.clone();
        if self.containers().contains_key(&id) {
            return Err(PodError::Exists(format!("container {id}")));
        }
        let bundle = PathBuf::from(&request.bundle);
        rootfs::mount(&bundle, &request.rootfs).map_err(PodError::State)?;
        let (made, told) = match self.create_on(&mut served, &request).await {
            Ok(made) => made,
            Err(error) => {
                rootfs::unmount(&bundle, request.rootfs.len());
                return Err(error);
            }
        };
        let pid = made.container(&id)?.record().pid;
        self.events.publish(
            topics::TASK_CREATE_EVENT_TOPIC,
            &TaskCreate {
                container_id: id.clone(),
                bundle: request.bundle.clone(),
                rootfs: request.rootfs.clone(),
                io: MessageField::some(TaskIO {
                    stdin: told.stdin.clone(),
                    stdout: told.stdout.clone(),
                    stderr: told.stderr.clone(),
                    terminal: told.terminal,
                    ..Default::default()
                }),
                pid,
                ..Default::default()
            },
        );
        let process = made.process(&id, "")?;
        let watched = made.watch(&id).await;
        let watched = watched
            .inspect_err(|error| log::warn!("out-of-memory kills in container {id} will not be told of: {error}"));
        self.follow(&id, "", pid, process, &told, watched.ok());
        let processes = HashMap::from([(String::new(), told)]);
        self.containers().insert(id, Known { mounts: request.rootfs.len(), processes });
        Ok(pid)
    }

    async fn create_on(
        &self,
        served: &mut Option<Served>,
        request: &CreateTaskRequest,
    ) -> Result<(Arc<Pod>, Told), PodError> {
        let told = Told {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
            ..Told::default()
        };
        let (io, told) = told.open()?;
        if let Some(served) = served {
            self.create_member(served, request, io).await?;
            return Ok((Arc::clone(&served.pod), told));
        }
        if self.has_sandbox.load(Ordering::Relaxed) {
            return Err(PodError::State("the sandbox is not started".into()));
        }
        let first = First::Container { request: Box::new(request.clone()), io };
        let pod = self.make(served, &request.id, first, self.end.subscribe()).await?;
        Ok((pod, told))
    }

    /// Has the pod made, whose state is that of `id`.
    async fn make(
        &self,
        served: &mut Option<Served>,
        id: &str,
        first: First,
        stop: watch::Receiver<bool>,
    ) -> Result<Arc<Pod>, PodError> {
        let (made, answer) = oneshot::channel();
        let over = || PodError::State("the server ends".into());
        self.orders.send(Order { first, made, stop }).await.map_err(|_| over())?;
        let pod = answer.await.map_err(|_| over())?.map_err(PodError::State)?;
        let directory = self.root.path().join(id);
        let tasks = Arc::new(TaskService::new(Arc::clone(&pod), Pending::default(), directory.clone()));
        *served = Some(Served { pod: Arc::clone(&pod), tasks, directory });
        Ok(pod)
    }

    /// Makes a further container, for which the sandbox process itself stands on the host.
    async fn create_member(&self, served: &Served, request: &CreateTaskRequest, io: Io) -> Result<(), PodError> {
        let (root, directory, request) = (self.root.clone(), served.directory.clone(), request.clone());
        let plan = move || plan_member(&root, &directory, &request, io).map_err(std::io::Error::other);
        let new = blocking(plan).await.map_err(|error| PodError::State(error.to_string()))?;
        served.pod.create(new).await.map(drop)
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
        let (shared, starting) = (Arc::clone(self), Arc::clone(&told.starting));
        let (container_id, exec_id) = (id.to_owned(), exec_id.to_owned());
        tokio::spawn(async move {
            if let Some(watched) = watched {
                shared.tell_of_kills(&container_id, watched).await;
            }
            let exit = process.wait().await;
            let _told_of_the_start = starting.lock().await;
            let id = if exec_id.is_empty() { container_id.clone() } else { exec_id };
            let (exit_status, exited_at) = (exit.status, timestamp(exit.at_ns));
            let event = TaskExit { container_id, id, pid, exit_status, exited_at, ..Default::default() };
            shared.events.publish(topics::TASK_EXIT_EVENT_TOPIC, &event);
        });
    }

    async fn start(self: &Arc<Self>, served: &Served, id: &str, exec_id: &str) -> Result<u32, PodError> {
        let process = served.pod.process(id, exec_id)?;
        let record = served.pod.container(id)?.record();
        let starting = {
            let containers = self.containers();
            let told = containers.get(id).and_then(|known| known.processes.get(exec_id));
            told.map(|told| Arc::clone(&told.starting))
        };
        let starting = starting.ok_or_else(|| PodError::NoContainer(id.into()))?;
        let _until_told = starting.lock().await;
        served.pod.start(id, exec_id).await?;
        let pid = record.pid;
        if exec_id.is_empty() {
            let event = TaskStart { container_id: id.into(), pid, ..Default::default() };
            self.events.publish(topics::TASK_START_EVENT_TOPIC, &event);
            if let Err(error) = poststart(record).await {
                log::warn!("{error}");
                drop(process.signal(libc::SIGKILL).await);
            }
        } else {
            let event = TaskExecStarted { container_id: id.into(), exec_id: exec_id.into(), pid, ..Default::default() };
            self.events.publish(topics::TASK_EXEC_STARTED_EVENT_TOPIC, &event);
        }
        Ok(pid)
    }

    async fn exec(self: &Arc<Self>, served: &Served, request: ExecProcessRequest) -> Result<(), PodError> {
        let ExecProcessRequest { id, exec_id, terminal, stdin, stdout, stderr, spec, .. } = request;
        let told = Told { stdin, stdout, stderr, terminal, ..Told::default() };
        let (io, told) = told.open()?;
        let spec = spec.into_option().unwrap_or_default().value;
        let process = served.pod.create_exec(&id, &exec_id, spec, io, None).await?;
        let pid = served.pod.container(&id)?.record().pid;
        let event = TaskExecAdded { container_id: id.clone(), exec_id: exec_id.clone(), ..Default::default() };
        self.events.publish(topics::TASK_EXEC_ADDED_EVENT_TOPIC, &event);
        self.follow(&id, &exec_id, pid, process, &told, None);
        if let Some(known) = self.containers().get_mut(&id) {
            known.processes.insert(exec_id, told);
        }
        Ok(())
    }

    /// What follows the removal of a container.
    async fn removed(&self, id: &str, record: Record) {
        let known = self.containers().remove(id);
        let work = move || {
            if let Some(known) = known {
                rootfs::unmount(&record.bundle, known.mounts);
            }
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

impl Told {
    fn open(self) -> Result<(Io, Self), PodError> {
        let named = Named { stdin: &self.stdin, stdout: &self.stdout, stderr: &self.stderr, terminal: self.terminal };
        let io = io::open(named).map_err(PodError::State)?;
        Ok((io, self))
    }
}

/// Claims the state of a further container, for which this process stands on the host.
fn plan_member(
    root: &StateRoot,
    directory: &Path,
    request: &CreateTaskRequest,
    io: Io,
) -> anyhow::Result<NewContainer> {
    let id = request.id.parse()?;
    let bundle = Bundle::load(Path::new(&request.bundle))?;
    for field in &bundle.unhonoured {
        log::warn!("{field}");
    }
    let state = root.claim(&id)?;
    let record = record_of(&id, &bundle);
    service::member(directory, &bundle, state, record, io, None)
}

#[async_trait]
impl Task for ShimService {
    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> ttrpc::Result<CreateTaskResponse> {
        let shared = Arc::clone(&self.shared);
        let pid = to_its_end(async move { shared.create(request).await }).await?;
        Ok(CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let (shared, served) = (Arc::clone(&self.shared), self.served(&request.id).await?);
        let pid = to_its_end(async move { shared.start(&served, &request.id, &request.exec_id).await }).await?;
        Ok(StartResponse { pid, ..Default::default() })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let (shared, served) = (Arc::clone(&self.shared), self.served(&request.id).await?);
        to_its_end(async move { shared.exec(&served, request).await }).await?;
        Ok(Empty::new())
    }

    async fn delete(&self, context: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let served = self.served(&request.id).await?;
        let (id, exec_id) = (request.id.clone(), request.exec_id.clone());
        let record = served.pod.container(&id).map_err(refusal)?.record();
        let deleted = served.tasks.delete(context, request).await?;
        if !exec_id.is_empty() {
            if let Some(known) = self.shared.containers().get_mut(&id) {
                known.processes.remove(&exec_id);
            }
            return Ok(deleted);
        }
        self.shared.removed(&id, record).await;
        let event = TaskDelete {
            container_id: id,
            pid: deleted.pid,
            exit_status: deleted.exit_status,
            exited_at: deleted.exited_at.clone(),
            ..Default::default()
        };
        self.shared.events.publish(topics::TASK_DELETE_EVENT_TOPIC, &event);
        Ok(deleted)
    }

    async fn state(&self, context: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let served = self.served(&request.id).await?;
        let mut state = served.tasks.state(context, request.clone()).await?;
        if let Some(told) = self.shared.containers().get(&request.id).and_then(|c| c.processes.get(&request.exec_id)) {
            state.stdin.clone_from(&told.stdin);
            state.stdout.clone_from(&told.stdout);
            state.stderr.clone_from(&told.stderr);
            state.terminal = told.terminal;
        }
        Ok(state)
    }

    async fn pids(&self, context: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let served = self.served(&request.id).await?;
        let pid = served.pod.container(&request.id).map_err(refusal)?.record().pid;
        let mut pids = served.tasks.pids(context, request).await.unwrap_or_default();
        for process in &mut pids.processes {
            // Of a type that containerd's clients do not know.
            process.info = MessageField::none();
        }
        if pids.processes.is_empty() {
            // containerd takes a container without processes for one that is lost.
            pids.processes.push(ProcessInfo { pid, ..Default::default() });
        }
        Ok(pids)
    }

    async fn kill(&self, context: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let served = self.served(&request.id).await?;
        let process = served.pod.process(&request.id, &request.exec_id).map_err(refusal)?;
        if matches!(process.phase(), Phase::Stopped(_)) {
            return Err(not_found("process already finished".into()));
        }
        served.tasks.kill(context, request).await
    }

    async fn pause(&self, context: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        let container_id = request.id.clone();
        let done = self.served(&request.id).await?.tasks.pause(context, request).await?;
        let event = TaskPaused { container_id, ..Default::default() };
        self.shared.events.publish(topics::TASK_PAUSED_EVENT_TOPIC, &event);
        Ok(done)
    }

    async fn resume(&self, context: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        let container_id = request.id.clone();
        let done = self.served(&request.id).await?.tasks.resume(context, request).await?;
        let event = TaskResumed { container_id, ..Default::default() };
        self.shared.events.publish(topics::TASK_RESUMED_EVENT_TOPIC, &event);
        Ok(done)
    }

    async fn resize_pty(&self, context: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        self.served(&request.id).await?.tasks.resize_pty(context, request).await
    }

    async fn close_io(&self, context: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        self.served(&request.id).await?.tasks.close_io(context, request).await
    }

    async fn update(&self, context: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        self.served(&request.id).await?.tasks.update(context, request).await
    }

    async fn wait(&self, context: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        self.served(&request.id).await?.tasks.wait(context, request).await
    }

    async fn stats(&self, context: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let mut stats = self.served(&request.id).await?.tasks.stats(context, request).await?;
        if let Some(stats) = stats.stats.as_mut() {
            bare(stats);
        }
        Ok(stats)
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        let pod = self.shared.pod.lock().await.as_ref().map(|served| Arc::clone(&served.pod));
        let record = pod.and_then(|pod| pod.container(&request.id).ok()).map(|container| container.record());
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: record.map(|record| record.pid).unwrap_or_default(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        // A sandbox is told by its own API.
        if self.shared.containers().is_empty() && !self.shared.has_sandbox.load(Ordering::Relaxed) {
            self.shared.end.send_replace(true);
        }
        Ok(Empty::new())
    }
}
