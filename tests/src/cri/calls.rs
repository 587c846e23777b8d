//! The calls of the interface that the tests make. Configurations of pods and containers are given as JSON, in
//! protobuf's own mapping of it.

use std::path::Path;

use anyhow::{Context as _, Result};
use protobuf::{Message, MessageField, MessageFull};
use serde_json::Value;

use super::grpc::{CallError, Channel};
use super::messages::{
    AttachRequest, Container, ContainerConfig, ContainerRequest, ContainerStats, ContainerStatsResponse,
    ContainerStatus, ContainerStatusResponse, CreateContainerRequest, CreateContainerResponse, Empty, ExecRequest,
    ExecSyncRequest, ExecSyncResponse, Image, ImageRequest, ImageSpec, ImageStatusResponse, ListContainersResponse,
    ListPodSandboxResponse, PodSandbox, PodSandboxConfig, PodSandboxRequest, PodSandboxStats, PodSandboxStatsResponse,
    PodSandboxStatus, PodSandboxStatusResponse, PortForwardRequest, PullImageResponse, RunPodSandboxRequest,
    RunPodSandboxResponse, StatusResponse, StopContainerRequest, StreamResponse, UpdateContainerResourcesRequest,
};

const RUNTIME: &str = "runtime.v1.RuntimeService";
const IMAGES: &str = "runtime.v1.ImageService";

/// The interface at a socket.
#[derive(Clone, Debug)]
pub struct Cri {
    channel: Channel,
}

/// A message from JSON.
///
/// # Errors
/// Which field is wrong.
pub fn message<M: MessageFull>(json: &Value) -> Result<M> {
    protobuf_json_mapping::parse_from_str(&json.to_string()).with_context(|| format!("{json}"))
}

impl Cri {
    /// Asks whoever listens at `socket`.
    #[must_use]
    pub fn at(socket: &Path) -> Self {
        Self { channel: Channel::to(socket) }
    }

    fn runtime<R: Message>(&self, method: &str, request: &impl Message) -> Result<R, CallError> {
        self.channel.call(RUNTIME, method, request)
    }

    fn pod<R: Message>(&self, method: &str, id: &str) -> Result<R, CallError> {
        self.runtime(method, &PodSandboxRequest { pod_sandbox_id: id.into(), ..Default::default() })
    }

    fn container<R: Message>(&self, method: &str, id: &str) -> Result<R, CallError> {
        self.runtime(method, &ContainerRequest { container_id: id.into(), ..Default::default() })
    }

    fn image<R: Message>(&self, method: &str, name: &str) -> Result<R, CallError> {
        let image = MessageField::some(ImageSpec { image: name.into(), ..Default::default() });
        self.channel.call(IMAGES, method, &ImageRequest { image, ..Default::default() })
    }

    /// Whether runtime and network are ready.
    ///
    /// # Errors
    /// Any [`CallError`].
    pub fn is_ready(&self) -> Result<bool, CallError> {
        let status: StatusResponse = self.runtime("Status", &Empty::new())?;
        let conditions = status.status.unwrap_or_default().conditions;
        // The others are containerd's own, as that its configuration has names of yesterday.
        let holds = |kind: &str| conditions.iter().any(|condition| condition.type_ == kind && condition.status);
        Ok(holds("RuntimeReady") && holds("NetworkReady"))
    }

    /// Runs a pod; its id.
    ///
    /// # Errors
    /// A wrong configuration, or any [`CallError`].
    pub fn run_pod(&self, config: &Value, handler: &str) -> Result<String> {
        let config = MessageField::some(message::<PodSandboxConfig>(config)?);
        let request = RunPodSandboxRequest { config, runtime_handler: handler.into(), ..Default::default() };
        let response: RunPodSandboxResponse = self.runtime("RunPodSandbox", &request)?;
        Ok(response.pod_sandbox_id)
    }

    /// Stops a pod with all that is in it.
    ///
    /// # Errors
    /// Any [`CallError`].
    pub fn stop_pod(&self, id: &str) -> Result<(), CallError> {
        self.pod::<Empty>("StopPodSandbox", id).map(drop)
    }

    /// Removes a pod with all that is in it.
    ///
    /// # Errors
    /// Any [`CallError`].
    pub fn remove_pod(&self, id: &str) -> Result<(), CallError> {
        self.pod::<Empty>("RemovePodSandbox", id).map(drop)
    }

    /// What a pod's state is.
    ///
    /// # Errors
    /// Any [`CallError`].
    pub fn pod_status(&self, id: &str) -> Result<PodSandboxStatus, CallError> {
        self.pod::<PodSandboxStatusResponse>("PodSandboxStatus", id).map(|answer| answer.status.unwrap_or_default())
    }

    /// What a pod has used.
    ///
    /// # Errors
    /// Any [`CallError`].
    pub fn pod_stats(&self, id: &str) -> Result<PodSandboxStats, CallError> {
        self.pod::<PodSandboxStatsResponse>("PodSandboxStats", id).map(|answer| answer.stats.unwrap_or_default())
    }

    /// All pods.
    ///
    /// # Errors
    /// Any [`CallError`].
    pub fn pods(&self) -> Result<Vec<PodSandbox>, CallError> {
        self.runtime::<ListPodSandboxResponse>("ListPodSandbox", &Empty::new()).map(|answer| answer.items)
    }

    /// Makes a container in a pod; its id.
    ///
    /// # Errors
    /// A wrong configuration, or any [`CallError`].
    pub fn create_container(&self, pod: &str, pod_config: &Value, config: &Value) -> Result<String> {
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.into(),
            config: MessageField::some(message::<ContainerConfig>(config)?),
            sandbox_config: MessageField::some(message(pod_config)?),
            ..Default::default()
        };
        let response: CreateContainerResponse = self.runtime("CreateContainer", &request)?;
        Ok(response.container_id)
    }

    /// Starts a container.
    ///
    /// # Errors
    /// Any [`CallError`].
    pub fn start_container(&self, id: &str) -> Result<(), CallError> {
        self.container::<Empty>("StartContainer", id).map(drop)
    }

    /// Stops a container, by force after `timeout` seconds.
    ///
    /// # Errors
    /// Any [`CallError`].
    pub fn stop_container(&self, id: &str, timeout: i64) -> Result<(), CallError> {
        let request = StopContainerRequest { container_id: id.into(), timeout, ..Default::default() };
        self.runtime::<Empty>("StopContainer", &request).map(drop)
    }

    /// Removes a container.
    ///
    /// # Errors
    /// Any [`CallError`].
    pub fn remove_container(&self, id: &str) -> Result<(), CallError> {
        self.container::<Empty>("RemoveContainer", id).map(drop)
    }

    /// What a container's state is.
    ///
    /// # Errors
    /// Any [`CallError`].
    pub fn container_status(&self, id: &str) -> Result<ContainerStatus, CallError> {
        self.container::<ContainerStatusResponse>("ContainerStatus", id).map(|answer| answer.status.unwrap_or_default())
    }

    /// What a container has used.
    ///
    /// # Errors
    /// Any [`CallError`].
    pub fn container_stats(&self, id: &str) -> Result<ContainerStats, CallError> {
        self.container::<ContainerStatsResponse>("ContainerStats", id).map(|answer| answer.stats.unwrap_or_default())
    }

    /// All containers.
    ///
    /// # Errors
    /// Any [`CallError`].
    pub fn containers(&self) -> Result<Vec<Container>, CallError> {
        self.runtime::<ListContainersResponse>("ListContainers", &Empty::new()).map(|answer| answer.containers)
    }

    /// Changes a container's limits.
    ///
    /// # Errors
    /// Wrong limits, or any [`CallError`].
    pub fn update_container(&self, id: &str, resources: &Value) -> Result<()> {
        let linux = MessageField::some(message(resources)?);
        let request = UpdateContainerResourcesRequest { container_id: id.into(), linux, ..Default::default() };
        Ok(self.runtime::<Empty>("UpdateContainerResources", &request).map(drop)?)
    }

    /// Begins a container's log anew, after its file was moved away.
    ///
    /// # Errors
    /// Any [`CallError`].
    pub fn reopen_log(&self, id: &str) -> Result<(), CallError> {
        self.container::<Empty>("ReopenContainerLog", id).map(drop)
    }

    /// Runs a command in a container to its end, or for `timeout` seconds; 0 is no limit.
    ///
    /// # Errors
    /// Any [`CallError`].
    pub fn exec_sync(&self, id: &str, command: &[&str], timeout: i64) -> Result<ExecSyncResponse, CallError> {
        let cmd = command.iter().map(ToString::to_string).collect();
        self.runtime("ExecSync", &ExecSyncRequest { container_id: id.into(), cmd, timeout, ..Default::default() })
    }

    /// Where the streams of a command can be had; it starts when somebody asks for them.
    ///
    /// # Errors
    /// Any [`CallError`].
    pub fn exec(&self, request: &ExecRequest) -> Result<String, CallError> {
        self.runtime::<StreamResponse>("Exec", request).map(|answer| answer.url)
    }

    /// Where the streams of a container's first process can be had.
    ///
    /// # Errors
    /// Any [`CallError`].
    pub fn attach(&self, request: &AttachRequest) -> Result<String, CallError> {
        self.runtime::<StreamResponse>("Attach", request).map(|answer| answer.url)
    }

    /// Where a port of a pod can be reached.
    ///
    /// # Errors
    /// Any [`CallError`].
    pub fn port_forward(&self, id: &str, port: i32) -> Result<String, CallError> {
        let request = PortForwardRequest { pod_sandbox_id: id.into(), port: vec![port], ..Default::default() };
        self.runtime::<StreamResponse>("PortForward", &request).map(|answer| answer.url)
    }

    /// An image that is there.
    ///
    /// # Errors
    /// Any [`CallError`].
    pub fn image_status(&self, name: &str) -> Result<Option<Image>, CallError> {
        self.image::<ImageStatusResponse>("ImageStatus", name).map(|answer| answer.image.into_option())
    }

    /// Pulls an image; its reference.
    ///
    /// # Errors
    /// Any [`CallError`].
    pub fn pull_image(&self, name: &str) -> Result<String, CallError> {
        self.image::<PullImageResponse>("PullImage", name).map(|answer| answer.image_ref)
    }

    /// Removes an image.
    ///
    /// # Errors
    /// Any [`CallError`].
    pub fn remove_image(&self, name: &str) -> Result<(), CallError> {
        self.image::<Empty>("RemoveImage", name).map(drop)
    }
}
