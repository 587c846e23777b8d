//! containerd's Task API (`containerd.task.v2.Task`, `containerd.task.v3.Task`) over a pod.

use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse, DeleteRequest,
    DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse, ProcessInfo,
    ResizePtyRequest, ResumeRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
    StatsResponse, Status as TaskStatus, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::shim_async::Task;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{EnumOrUnknown, MessageField};
use ttrpc::r#async::TtrpcContext;
use ttrpc::{Code, get_status};

use super::ShortPath;
use super::attach::Pending;
use crate::pod::{Io, Phase, Pod, PodError};
use crate::process::stdio::Inherited;
use crate::process::terminal::WindowSize;
use crate::sandbox::SandboxError;
use crate::sandbox::agent::AgentError;
use crate::state::Status;

mod create;
pub mod metrics;
pub(super) mod processes;

/// The service.
pub struct TaskService {
    pod: Arc<Pod>,
    pending: Pending,
    /// Where its sockets are.
    directory: ShortPath,
}

impl TaskService {
    /// Over a pod; descriptors for processes come by `pending`. Served by sockets in `directory`.
    pub fn new(pod: Arc<Pod>, pending: Pending, directory: ShortPath) -> Self {
        Self { pod, pending, directory }
    }

    /// What a container uses.
    ///
    /// # Errors
    /// Any [`PodError`].
    pub async fn metrics(&self, id: &str) -> Result<Metrics, PodError> {
        Ok(metrics::v2(&self.pod.stats(id).await?))
    }
}

/// The answer for what was not done.
#[must_use]
pub fn refusal(error: PodError) -> ttrpc::Error {
    let code = match &error {
        // The guest may say anything; what containerd acts upon is one of these.
        PodError::Sandbox(SandboxError::Agent(AgentError::Refused { code, .. }))
            if matches!(
                code,
                Code::NOT_FOUND
                    | Code::ALREADY_EXISTS
                    | Code::INVALID_ARGUMENT
                    | Code::PERMISSION_DENIED
                    | Code::FAILED_PRECONDITION
            ) =>
        {
            *code
        }
        PodError::NoContainer(_) | PodError::NoProcess { .. } => Code::NOT_FOUND,
        PodError::Exists(_) => Code::ALREADY_EXISTS,
        PodError::State(_) => Code::FAILED_PRECONDITION,
        _ => Code::INTERNAL,
    };
    ttrpc::Error::RpcStatus(get_status(code, error.to_string()))
}

/// Nanoseconds since the epoch, as containerd has them.
#[must_use]
pub fn timestamp(ns: u64) -> MessageField<Timestamp> {
    const SECOND: u64 = 1_000_000_000;
    let seconds = (ns / SECOND).cast_signed();
    let nanos = i32::try_from(ns % SECOND).unwrap_or_default();
    MessageField::some(Timestamp { seconds, nanos, ..Default::default() })
}

/// Runs to its end even if whoever asked goes away: ttrpc drops the handler then.
///
/// # Errors
/// Those of `work`.
pub async fn to_its_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, PodError>> + Send + 'static,
) -> ttrpc::Result<T> {
    let done = tokio::spawn(work).await;
    done.unwrap_or_else(|error| Err(PodError::State(error.to_string()))).map_err(refusal)
}

#[async_trait]
impl Task for TaskService {
    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> ttrpc::Result<CreateTaskResponse> {
        let nothing = || PodError::State(format!("nothing was passed for container {}", request.id));
        let attached = self.pending.take(&request.id, "").ok_or_else(nothing).map_err(refusal)?;
        let (pod, directory) = (Arc::clone(&self.pod), self.directory.clone());
        let pid = to_its_end(async move { create::create(&pod, &directory, attached, request).await }).await?;
        Ok(CreateTaskResponse { pid, ..Default::default() })
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let container = self.pod.container(&request.id).map_err(refusal)?;
        let process = container.process(&request.exec_id).map_err(refusal)?;
        let record = container.record();
        let mut response = StateResponse {
            id: request.id,
            bundle: record.bundle.display().to_string(),
            pid: record.pid,
            exec_id: request.exec_id,
            ..Default::default()
        };
        response.status = EnumOrUnknown::new(match process.phase() {
            Phase::Created => TaskStatus::CREATED,
            Phase::Running if record.status == Status::Paused => TaskStatus::PAUSED,
            Phase::Running => TaskStatus::RUNNING,
            Phase::Stopped(exit) => {
                response.exit_status = exit.status;
                response.exited_at = timestamp(exit.at_ns);
                TaskStatus::STOPPED
            }
        });
        Ok(response)
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let container = self.pod.container(&request.id).map_err(refusal)?;
        let pod = Arc::clone(&self.pod);
        to_its_end(async move { pod.start(&request.id, &request.exec_id).await }).await?;
        Ok(StartResponse { pid: container.record().pid, ..Default::default() })
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let container = self.pod.container(&request.id).map_err(refusal)?;
        let process = container.process(&request.exec_id).map_err(refusal)?;
        let Phase::Stopped(exit) = process.phase() else {
            return Err(refusal(PodError::State(format!(
                "cannot delete container {} that is not stopped: {}",
                request.id,
                container.status()
            ))));
        };
        let pid = container.record().pid;
        if request.exec_id.is_empty() {
            let pod = Arc::clone(&self.pod);
            to_its_end(async move { pod.remove(&request.id).await }).await?;
        } else {
            container.remove_exec(&request.exec_id);
        }
        let exited_at = timestamp(exit.at_ns);
        Ok(DeleteResponse { pid, exit_status: exit.status, exited_at, ..Default::default() })
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let mut response = PidsResponse::new();
        for process in self.pod.processes(&request.id).await.map_err(refusal)? {
            let mut info = ProcessInfo { pid: process.pid, ..Default::default() };
            info.info = MessageField::some(processes::pack(&process).map_err(|e| ttrpc::Error::Others(e.to_string()))?);
            response.processes.push(info);
        }
        Ok(response)
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        let pod = Arc::clone(&self.pod);
        to_its_end(async move { pod.freeze(&request.id, true).await }).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        let pod = Arc::clone(&self.pod);
        to_its_end(async move { pod.freeze(&request.id, false).await }).await?;
        Ok(Empty::new())
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let signal = i32::try_from(request.signal).unwrap_or(i32::MAX);
        if request.all {
            self.pod.signal_all(&request.id, signal).await.map_err(refusal)?;
        } else {
            let process = self.pod.process(&request.id, &request.exec_id).map_err(refusal)?;
            process.signal(signal).await.map_err(refusal)?;
        }
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let attached = self.pending.take(&request.id, &request.exec_id);
        let spec = request.spec.into_option().unwrap_or_default().value;
        let (io, link) = match attached {
            Some(attached) => (attached.io, Some(attached.link)),
            None => (Io::plain(Inherited { stdin: None, stdout: None, stderr: None }), None),
        };
        let pod = Arc::clone(&self.pod);
        to_its_end(async move { pod.create_exec(&request.id, &request.exec_id, spec, io, link).await }).await?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        let process = self.pod.process(&request.id, &request.exec_id).map_err(refusal)?;
        let size = WindowSize { rows: request.height, columns: request.width };
        process.resize(size).await.map_err(refusal)?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        if request.stdin {
            self.pod.process(&request.id, &request.exec_id).map_err(refusal)?.close_stdin();
        }
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let resources = request.resources.into_option().unwrap_or_default().value;
        let pod = Arc::clone(&self.pod);
        to_its_end(async move { pod.update(&request.id, &resources).await }).await?;
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let process = self.pod.process(&request.id, &request.exec_id).map_err(refusal)?;
        let exit = process.wait().await;
        let exited_at = timestamp(exit.at_ns);
        Ok(WaitResponse { exit_status: exit.status, exited_at, ..Default::default() })
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let stats = self.metrics(&request.id).await.map_err(refusal)?;
        let packed = Any::pack(&stats).map_err(|error| ttrpc::Error::Others(error.to_string()))?;
        Ok(StatsResponse { stats: MessageField::some(packed), ..Default::default() })
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        let record = self.pod.container(&request.id).map_err(refusal)?.record();
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Ok(ConnectResponse { shim_pid: std::process::id(), task_pid: record.pid, version, ..Default::default() })
    }
}
