//! The Sandbox API (`containerd.runtime.sandbox.v1.Sandbox`): a pod's sandbox that is there before its first container.
//!
//! containerd 2 asks by it with `sandboxer = "shim"`. The virtual machine boots at StartSandbox; containers are made in it
//! by the Task API on the same socket.

mod config;
mod shared;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest, PlatformResponse,
    SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest, SandboxStatusResponse, ShutdownSandboxRequest,
    ShutdownSandboxResponse, StartSandboxRequest, StartSandboxResponse, StopSandboxRequest, StopSandboxResponse,
    WaitSandboxRequest, WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_async::Sandbox;
use protobuf::MessageField;
use tokio::sync::watch;
use ttrpc::r#async::TtrpcContext;
use ttrpc::{Code, get_status};

use super::events::packed;
use super::server::{Ended, First};
use super::service::ShimService;
use crate::host;
use crate::service::{timestamp, to_its_end};
pub use config::SandboxConfig;
pub use shared::SharedFiles;

/// How the CRI plugin names what a sandbox can be in.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";
/// How long the server stays after it was told to end.
const TIME_TO_ANSWER: Duration = Duration::from_millis(100);

/// The service.
#[derive(Clone)]
pub struct SandboxService {
    tasks: ShimService,
    known: Arc<Mutex<Option<Known>>>,
}

/// A sandbox that was asked for.
struct Known {
    id: String,
    bundle: PathBuf,
    config: Arc<SandboxConfig>,
    created_ns: u64,
    /// The stand-in, once it is started.
    pid: u32,
    /// Becomes true when it is to end.
    stop: watch::Sender<bool>,
    /// How it has ended.
    ended: watch::Sender<Option<Ended>>,
}

/// What is needed to start one.
struct Order {
    first: First,
    stop: watch::Receiver<bool>,
}

fn error(code: Code, text: impl Into<String>) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(code, text.into()))
}

impl SandboxService {
    /// Beside the Task API.
    #[must_use]
    pub fn new(tasks: ShimService) -> Self {
        Self { tasks, known: Arc::default() }
    }

    /// Looks at the sandbox.
    fn with<T>(&self, id: &str, look: impl FnOnce(&mut Known) -> T) -> ttrpc::Result<T> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        match known.as_mut().filter(|known| known.id == id) {
            Some(known) => Ok(look(known)),
            None => Err(error(Code::NOT_FOUND, format!("sandbox {id} does not exist"))),
        }
    }

    /// Returns when it has ended.
    async fn ended(&self, id: &str) -> ttrpc::Result<Ended> {
        let mut ended = self.with(id, |known| known.ended.subscribe())?;
        let ended = ended.wait_for(Option::is_some).await.map(|ended| *ended).ok().flatten();
        ended.ok_or_else(|| error(Code::UNAVAILABLE, "the server ends"))
    }
}

#[async_trait]
impl Sandbox for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        let config = config::read(&request).map_err(|e| error(Code::INVALID_ARGUMENT, e.to_string()))?;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = known.as_ref() {
            return Err(error(Code::ALREADY_EXISTS, format!("this server has the sandbox {} already", known.id)));
        }
        let bundle = PathBuf::from(request.bundle_path);
        if !bundle.is_absolute() {
            return Err(error(Code::INVALID_ARGUMENT, format!("the bundle {bundle:?} is no absolute path")));
        }
        let shared = config.shared.make(&bundle);
        let shared =
            shared.map_err(|e| error(Code::UNKNOWN, format!("cannot make what the pod's containers share: {e}")))?;
        self.tasks.containers().expect_sandbox(shared).map_err(|e| error(Code::FAILED_PRECONDITION, e))?;
        *known = Some(Known {
            id: request.sandbox_id,
            bundle,
            config: Arc::new(config),
            created_ns: host::now_ns(),
            pid: 0,
            stop: watch::Sender::new(false),
            ended: watch::Sender::new(None),
        });
        Ok(CreateSandboxResponse::new())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        let id = request.sandbox_id;
        let Order { first, stop } = self.with(&id, |known| Order {
            first: First::Sandbox {
                id: known.id.clone(),
                bundle: known.bundle.clone(),
                config: Arc::clone(&known.config),
                ended: known.ended.clone(),
            },
            stop: known.stop.subscribe(),
        })?;
        let (tasks, sandbox_id) = (self.tasks.clone(), id.clone());
        let pid = to_its_end(async move { tasks.containers().start_sandbox(&sandbox_id, first, stop).await }).await?;
        let created_ns = self.with(&id, |known| {
            known.pid = pid;
            known.created_ns
        })?;
        Ok(StartSandboxResponse { pid, created_at: timestamp(created_ns), ..Default::default() })
    }

    async fn platform(&self, _: &TtrpcContext, request: PlatformRequest) -> ttrpc::Result<PlatformResponse> {
        self.with(&request.sandbox_id, |_| ())?;
        let mut response = PlatformResponse::new();
        let platform = response.platform.mut_or_insert_default();
        platform.os = "linux".into();
        platform.architecture = "amd64".into();
        Ok(response)
    }

    async fn stop_sandbox(&self, _: &TtrpcContext, request: StopSandboxRequest) -> ttrpc::Result<StopSandboxResponse> {
        let id = request.sandbox_id;
        let has_started = self.with(&id, |known| {
            known.stop.send_replace(true);
            known.pid != 0
        })?;
        if has_started {
            self.ended(&id).await?;
        } else {
            let now = Ended { status: 0, at_ns: host::now_ns() };
            self.with(&id, |known| known.ended.send_if_modified(|ended| ended.replace(now).is_none()))?;
        }
        Ok(StopSandboxResponse::new())
    }

    async fn wait_sandbox(&self, _: &TtrpcContext, request: WaitSandboxRequest) -> ttrpc::Result<WaitSandboxResponse> {
        let Ended { status, at_ns } = self.ended(&request.sandbox_id).await?;
        Ok(WaitSandboxResponse { exit_status: status, exited_at: timestamp(at_ns), ..Default::default() })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> ttrpc::Result<SandboxStatusResponse> {
        self.with(&request.sandbox_id, |known| {
            let ended = *known.ended.borrow();
            let state = if known.pid != 0 && ended.is_none() { READY } else { NOT_READY };
            SandboxStatusResponse {
                sandbox_id: known.id.clone(),
                pid: known.pid,
                state: state.into(),
                created_at: timestamp(known.created_ns),
                exited_at: ended.map_or_else(MessageField::none, |ended| timestamp(ended.at_ns)),
                ..Default::default()
            }
        })
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, request: PingRequest) -> ttrpc::Result<PingResponse> {
        let runs = self.with(&request.sandbox_id, |known| known.pid != 0 && known.ended.borrow().is_none())?;
        match runs {
            true => Ok(PingResponse::new()),
            false => Err(error(Code::FAILED_PRECONDITION, format!("sandbox {} does not run", request.sandbox_id))),
        }
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        // A sandbox that was never made leaves a server that is to end all the same.
        let _ = self.with(&request.sandbox_id, |known| known.stop.send_replace(true));
        // The answer goes first: with the server its connections go, which containerd would take for a failure.
        let tasks = self.tasks.clone();
        tokio::spawn(async move {
            tokio::time::sleep(TIME_TO_ANSWER).await;
            tasks.end();
        });
        Ok(ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        self.with(&request.sandbox_id, |_| ())?;
        let mut total = Metrics::new();
        for stats in self.tasks.containers().stats_of_all().await {
            add(&mut total, &stats);
        }
        let packed = packed(&total).map_err(|e| ttrpc::Error::Others(e.to_string()))?;
        let mut response = SandboxMetricsResponse::new();
        let metric = response.metrics.mut_or_insert_default();
        metric.id = request.sandbox_id;
        metric.timestamp = timestamp(host::now_ns());
        metric.data = MessageField::some(packed);
        Ok(response)
    }
}

/// What the containers of a pod use together.
fn add(total: &mut Metrics, stats: &Metrics) {
    let (cpu, more) = (total.cpu.mut_or_insert_default(), stats.cpu.get_or_default());
    cpu.usage_usec += more.usage_usec;
    cpu.user_usec += more.user_usec;
    cpu.system_usec += more.system_usec;
    let (memory, more) = (total.memory.mut_or_insert_default(), stats.memory.get_or_default());
    memory.usage += more.usage;
    memory.anon += more.anon;
    memory.file += more.file;
    memory.inactive_file += more.inactive_file;
    memory.active_file += more.active_file;
    memory.pgfault += more.pgfault;
    memory.pgmajfault += more.pgmajfault;
    total.pids.mut_or_insert_default().current += stats.pids.get_or_default().current;
}
