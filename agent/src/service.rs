//! The ttrpc service: each request to the part that does it.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use katavm_protocol::agent::{
    AdjustClockRequest, AttachDiskRequest, AttachDiskResponse, CheckRequest, CheckResponse, ConfigureNetworkRequest,
    ContainerRequest, CreateContainerRequest, CreateExecRequest, CreateSandboxRequest, DetachDiskRequest, Empty, Event,
    ListProcessesResponse, MountOverlayRequest, MountOverlayResponse, ProcessRequest, ProcessResponse,
    RemoveContainerRequest, ResizeRequest, ResizeTerminalRequest, SetSysctlsRequest, SetVolumeRequest, SignalRequest,
    StatsResponse, UpdateContainerRequest, WaitResponse,
};
use katavm_protocol::agent_ttrpc::Agent;
use katavm_protocol::reset::RESET_ORDERLY;
use nix::mount::{MntFlags, umount2};
use ttrpc::Result;
use ttrpc::r#async::{ServerStreamSender, TtrpcContext};

use crate::cgroup::stats;
use crate::clock;
use crate::container::{Containers, processes};
use crate::cpus;
use crate::disks;
use crate::error::Error;
use crate::names::Names;
use crate::network;
use crate::overlay;
use crate::room;
use crate::sandbox;
use crate::server::kernel_release;
use crate::volume;

/// How long first processes have between SIGTERM and SIGKILL when the sandbox ends.
const GRACE: Duration = Duration::from_secs(2);

/// The service.
pub struct Service {
    containers: Arc<Containers>,
    names: Arc<Names>,
}

impl Service {
    /// Over the guest's containers, with the name servers that the host has for it.
    pub fn new(containers: Arc<Containers>, names: Arc<Names>) -> Self {
        Self { containers, names }
    }

    async fn freeze(&self, container_id: &str, frozen: bool) -> Result<Empty> {
        let cgroup = self.containers.cgroup(container_id)?;
        let done = tokio::task::spawn_blocking(move || cgroup.freeze(frozen)).await;
        let done = done.map_err(|error| Error::Internal(error.to_string()))?;
        done.map_err(|error| Error::io("cannot change the freezer's state", error))?;
        Ok(Empty::new())
    }

    /// Does `work` for a container when none of its processes is left.
    async fn after_last(
        &self,
        container_id: String,
        work: impl FnOnce(&str) -> std::result::Result<(), Error> + Send + 'static,
    ) -> Result<Empty> {
        // One that was not made has none.
        let cgroup = self.containers.cgroup(&container_id).ok();
        let done = move || {
            if let Some(Err(error)) = cgroup.map(|cgroup| cgroup.wait_until_empty()) {
                crate::error!("{container_id} still has its disks: {error}");
            }
            work(&container_id)
        };
        to_its_end(async move { blocking(done).await? }).await?;
        Ok(Empty::new())
    }
}

/// Does what must not stop halfway: ttrpc drops the handler of a request whose deadline has passed.
async fn to_its_end<T: Send + 'static>(
    work: impl Future<Output = std::result::Result<T, Error>> + Send + 'static,
) -> std::result::Result<T, Error> {
    tokio::spawn(work).await.map_err(|error| Error::Internal(error.to_string()))?
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> std::result::Result<T, Error> {
    tokio::task::spawn_blocking(work).await.map_err(|error| Error::Internal(error.to_string()))
}

#[async_trait]
impl Agent for Service {
    async fn check(&self, _: &TtrpcContext, _: CheckRequest) -> Result<CheckResponse> {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let (kernel_release, realtime_ns) = (kernel_release(), clock::now_ns());
        Ok(CheckResponse { version, kernel_release, realtime_ns, ..Default::default() })
    }

    async fn adjust_clock(&self, _: &TtrpcContext, request: AdjustClockRequest) -> Result<Empty> {
        clock::adjust(request.offset_ns)?;
        Ok(Empty::new())
    }

    async fn create_sandbox(&self, _: &TtrpcContext, request: CreateSandboxRequest) -> Result<Empty> {
        let done = tokio::task::spawn_blocking(move || sandbox::create(&request)).await;
        done.map_err(|error| Error::Internal(error.to_string()))??;
        Ok(Empty::new())
    }

    async fn configure_network(&self, _: &TtrpcContext, mut request: ConfigureNetworkRequest) -> Result<Empty> {
        let name_servers = std::mem::take(&mut request.name_servers);
        let done = tokio::task::spawn_blocking(move || network::configure(&request)).await;
        done.map_err(|error| Error::Internal(error.to_string()))??;
        self.names.set(&name_servers).await?;
        Ok(Empty::new())
    }

    async fn attach_disk(&self, _: &TtrpcContext, request: AttachDiskRequest) -> Result<AttachDiskResponse> {
        to_its_end(async move { blocking(move || disks::attach(&request)).await? }).await.map_err(Into::into)
    }

    async fn detach_disk(&self, _: &TtrpcContext, request: DetachDiskRequest) -> Result<Empty> {
        let DetachDiskRequest { place, container_id, .. } = request;
        self.after_last(container_id, move |_| disks::detach(place)).await
    }

    async fn mount_overlay(&self, _: &TtrpcContext, request: MountOverlayRequest) -> Result<MountOverlayResponse> {
        to_its_end(async move { blocking(move || overlay::attach(&request)).await? }).await.map_err(Into::into)
    }

    async fn unmount_overlay(&self, _: &TtrpcContext, request: ContainerRequest) -> Result<Empty> {
        let detach = |container_id: &str| {
            overlay::detach(container_id);
            Ok(())
        };
        self.after_last(request.container_id, detach).await
    }

    async fn set_sysctls(&self, _: &TtrpcContext, request: SetSysctlsRequest) -> Result<Empty> {
        let mut sysctls: Vec<_> = request.sysctls.iter().collect();
        sysctls.sort_unstable();
        sysctls.into_iter().try_for_each(|(name, value)| sandbox::set_sysctl(name, value))?;
        Ok(Empty::new())
    }

    async fn destroy_sandbox(&self, _: &TtrpcContext, _: Empty) -> Result<Empty> {
        let containers = Arc::clone(&self.containers);
        tokio::spawn(async move {
            containers.end_all(GRACE).await;
            let ended = tokio::task::spawn_blocking(|| {
                disks::settle_all();
                nix::unistd::sync();
                // Not mounted, or busy still: nothing is written to it any more.
                let _ = umount2(sandbox::SHARED, MntFlags::MNT_DETACH);
                crate::end::end_vm(RESET_ORDERLY)
            });
            drop(ended.await);
        });
        Ok(Empty::new())
    }

    async fn create_container(&self, _: &TtrpcContext, request: CreateContainerRequest) -> Result<ProcessResponse> {
        let containers = Arc::clone(&self.containers);
        let pid = to_its_end(async move { containers.create(request).await }).await?;
        Ok(ProcessResponse { pid, ..Default::default() })
    }

    async fn set_volume(&self, _: &TtrpcContext, request: SetVolumeRequest) -> Result<Empty> {
        to_its_end(async move {
            let set = tokio::task::spawn_blocking(move || volume::set(&request)).await;
            set.map_err(|error| Error::Internal(error.to_string()))?
        })
        .await?;
        Ok(Empty::new())
    }

    async fn start_container(&self, _: &TtrpcContext, request: ContainerRequest) -> Result<Empty> {
        self.containers.process(&request.container_id, "")?.start()?;
        Ok(Empty::new())
    }

    async fn remove_container(&self, _: &TtrpcContext, request: RemoveContainerRequest) -> Result<Empty> {
        let containers = Arc::clone(&self.containers);
        to_its_end(async move {
            let removed = containers.remove(&request.container_id).await;
            // Whatever became of the container: nobody else will see these.
            sandbox::unmount_shared(&request.unshared);
            volume::remove(&request.volumes);
            removed
        })
        .await?;
        Ok(Empty::new())
    }

    async fn create_exec(&self, _: &TtrpcContext, request: CreateExecRequest) -> Result<ProcessResponse> {
        let containers = Arc::clone(&self.containers);
        let pid = to_its_end(async move { containers.create_exec(request).await }).await?;
        Ok(ProcessResponse { pid, ..Default::default() })
    }

    async fn start_exec(&self, _: &TtrpcContext, request: ProcessRequest) -> Result<Empty> {
        self.containers.process(&request.container_id, &request.exec_id)?.start()?;
        Ok(Empty::new())
    }

    async fn signal(&self, _: &TtrpcContext, request: SignalRequest) -> Result<Empty> {
        if request.all {
            let done = self.containers.cgroup(&request.container_id)?.signal(request.signal);
            done.map_err(|error| match error.kind() {
                std::io::ErrorKind::InvalidInput => Error::Invalid(format!("there is no signal {}", request.signal)),
                _ => Error::io("cannot signal the container", error),
            })?;
        } else {
            let process = self.containers.process(&request.container_id, &request.exec_id)?;
            process.signal(&self.containers.reaper, request.signal)?;
        }
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: ProcessRequest) -> Result<WaitResponse> {
        let exit = self.containers.process(&request.container_id, &request.exec_id)?.wait().await;
        if !request.exec_id.is_empty() {
            self.containers.forget_exec(&request.container_id, &request.exec_id);
        }
        Ok(WaitResponse { exit: Some(exit).into(), ..Default::default() })
    }

    async fn resize_terminal(&self, _: &TtrpcContext, request: ResizeTerminalRequest) -> Result<Empty> {
        let process = self.containers.process(&request.container_id, &request.exec_id)?;
        process.resize(request.rows, request.columns)?;
        Ok(Empty::new())
    }

    async fn close_stdin(&self, _: &TtrpcContext, request: ProcessRequest) -> Result<Empty> {
        self.containers.process(&request.container_id, &request.exec_id)?.ends.close_stdin();
        Ok(Empty::new())
    }

    async fn list_processes(&self, _: &TtrpcContext, request: ContainerRequest) -> Result<ListProcessesResponse> {
        let pids = self.containers.cgroup(&request.container_id)?.processes();
        let pids = pids.map_err(|error| Error::io("cannot list the processes", error))?;
        Ok(ListProcessesResponse { processes: processes::describe(&pids), ..Default::default() })
    }

    async fn stats(&self, _: &TtrpcContext, request: ContainerRequest) -> Result<StatsResponse> {
        Ok(stats::read(self.containers.cgroup(&request.container_id)?.path()))
    }

    async fn update_container(&self, _: &TtrpcContext, request: UpdateContainerRequest) -> Result<Empty> {
        self.containers.cgroup(&request.container_id)?.update(&request.resources)?;
        Ok(Empty::new())
    }

    async fn resize(&self, _: &TtrpcContext, request: ResizeRequest) -> Result<Empty> {
        let resize = move || cpus::set_online(request.cpus).and_then(|()| room::set(request.plugged));
        to_its_end(async move { blocking(resize).await? }).await?;
        Ok(Empty::new())
    }

    async fn pause(&self, _: &TtrpcContext, request: ContainerRequest) -> Result<Empty> {
        self.freeze(&request.container_id, true).await
    }

    async fn resume(&self, _: &TtrpcContext, request: ContainerRequest) -> Result<Empty> {
        self.freeze(&request.container_id, false).await
    }

    async fn events(&self, _: &TtrpcContext, _: Empty, sender: ServerStreamSender<Event>) -> Result<()> {
        let mut events = self.containers.events.subscribe();
        while let Some(event) = events.recv().await {
            sender.send(&event).await?;
        }
        Ok(())
    }
}
