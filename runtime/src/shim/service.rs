//! The Task API as containerd asks for it: a pod is made with its first container, streams are named, and events tell of
//! everything.

use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse,
    DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse,
    ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest,
    StateResponse, StatsRequest, StatsResponse, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::events::task::{TaskPaused, TaskResumed};
use containerd_shim_protos::shim::oci::ProcessDetails;
use containerd_shim_protos::shim_async::Task;
use containerd_shim_protos::topics;
use protobuf::MessageField;
use ttrpc::r#async::TtrpcContext;
use ttrpc::{Code, get_status};

use super::address::OwnSocket;
use super::containers::{Containers, Served};
use super::events::packed;
use crate::host;
use crate::pod::{Phase, PodError};
use crate::service::{metrics, refusal, to_its_end};

/// The service.
#[derive(Clone)]
pub struct ShimService {
    containers: Arc<Containers>,
    socket: Arc<OwnSocket>,
}

fn not_found(text: String) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(Code::NOT_FOUND, text))
}

impl ShimService {
    /// Over the containers of the server that `socket` leads to.
    #[must_use]
    pub fn new(containers: Arc<Containers>, socket: Arc<OwnSocket>) -> Self {
        Self { containers, socket }
    }

    /// The containers.
    #[must_use]
    pub fn containers(&self) -> &Containers {
        &self.containers
    }

    /// Ends the server.
    pub fn end(&self) {
        // Before the end, which may take a while: a new server may be made for the same pod meanwhile.
        self.containers.end(|| self.socket.remove());
    }

    /// The pod, which is there once its first container was made.
    fn served(&self, id: &str) -> ttrpc::Result<Served> {
        self.containers.served().ok_or_else(|| refusal(PodError::NoContainer(id.into())))
    }
}

#[async_trait]
impl Task for ShimService {
    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> ttrpc::Result<CreateTaskResponse> {
        let containers = Arc::clone(&self.containers);
        let pid = to_its_end(async move { containers.create(request).await }).await?;
        Ok(CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let (containers, served) = (Arc::clone(&self.containers), self.served(&request.id)?);
        let pid = to_its_end(async move { containers.start(&served, &request.id, &request.exec_id).await }).await?;
        Ok(StartResponse { pid, ..Default::default() })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let (containers, served) = (Arc::clone(&self.containers), self.served(&request.id)?);
        to_its_end(async move { containers.exec(&served, request).await }).await?;
        Ok(Empty::new())
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let (containers, served) = (Arc::clone(&self.containers), self.served(&request.id)?);
        to_its_end(async move { containers.delete(&served, &request).await }).await
    }

    async fn state(&self, context: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let served = self.served(&request.id)?;
        let mut state = served.tasks.state(context, request.clone()).await?;
        if let Some(told) = self.containers.told(&request.id, &request.exec_id) {
            (state.stdin, state.stdout, state.stderr) = (told.stdin, told.stdout, told.stderr);
            state.terminal = told.terminal;
        }
        Ok(state)
    }

    async fn pids(&self, context: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let served = self.served(&request.id)?;
        let container = served.pod.container(&request.id).map_err(refusal)?;
        let mut pids = served.tasks.pids(context, request).await.unwrap_or_default();
        for process in &mut pids.processes {
            // Ours is of a type that containerd's clients do not know. runc's shim tells which of them are execs.
            let details =
                container.exec_id(process.pid).map(|exec_id| ProcessDetails { exec_id, ..Default::default() });
            let info = details.map(|details| packed(&details)).transpose();
            process.info = info.map_err(|error| ttrpc::Error::Others(error.to_string()))?.into();
        }
        if pids.processes.is_empty() {
            // containerd takes a container without processes for one that is lost.
            pids.processes.push(ProcessInfo { pid: container.record().pid, ..Default::default() });
        }
        Ok(pids)
    }

    async fn kill(&self, context: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let served = self.served(&request.id)?;
        let process = served.pod.process(&request.id, &request.exec_id).map_err(refusal)?;
        let over = || process.has_exited() || matches!(process.phase(), Phase::Stopped(_));
        if over() {
            return Err(not_found("process already finished".into()));
        }
        let killed = served.tasks.kill(context, request).await;
        // It may have ended by itself meanwhile.
        killed.map_err(|error| if over() { not_found("process already finished".into()) } else { error })
    }

    async fn pause(&self, context: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        let container_id = request.id.clone();
        let done = self.served(&request.id)?.tasks.pause(context, request).await?;
        let event = TaskPaused { container_id, ..Default::default() };
        self.containers.events().publish(topics::TASK_PAUSED_EVENT_TOPIC, &event);
        Ok(done)
    }

    async fn resume(&self, context: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        let container_id = request.id.clone();
        let done = self.served(&request.id)?.tasks.resume(context, request).await?;
        let event = TaskResumed { container_id, ..Default::default() };
        self.containers.events().publish(topics::TASK_RESUMED_EVENT_TOPIC, &event);
        Ok(done)
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        let reason = "checkpoints of containers are not implemented".to_owned();
        Err(ttrpc::Error::RpcStatus(get_status(Code::UNIMPLEMENTED, reason)))
    }

    async fn resize_pty(&self, context: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        self.served(&request.id)?.tasks.resize_pty(context, request).await
    }

    async fn close_io(&self, context: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        self.served(&request.id)?.tasks.close_io(context, request).await
    }

    async fn update(&self, context: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        self.served(&request.id)?.tasks.update(context, request).await
    }

    async fn wait(&self, context: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        self.served(&request.id)?.tasks.wait(context, request).await
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let stats = self.served(&request.id)?.pod.stats(&request.id).await.map_err(refusal)?;
        // containerd's clients take the form that the host has.
        let packed = if host::has_cgroup_v2() { packed(&metrics::v2(&stats)) } else { packed(&metrics::v1(&stats)) };
        let packed = packed.map_err(|error| ttrpc::Error::Others(error.to_string()))?;
        Ok(StatsResponse { stats: MessageField::some(packed), ..Default::default() })
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        let container = self.containers.served().and_then(|served| served.pod.container(&request.id).ok());
        let record = container.map(|container| container.record());
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: record.map(|record| record.pid).unwrap_or_default(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        // Before the end, which may take a while: a new server may be made for the same pod meanwhile.
        self.containers.shut_down(|| self.socket.remove());
        Ok(Empty::new())
    }
}
