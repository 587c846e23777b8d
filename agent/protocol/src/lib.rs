//! What the sandbox process and the agent say to each other: messages, the ttrpc service, ports and frames.

/// Messages of `proto/agent.proto`.
#[allow(warnings, clippy::all)]
pub mod agent {
    include!(concat!(env!("OUT_DIR"), "/agent.rs"));
}

/// The ttrpc client and server of the service `katavm.agent.v1.Agent`.
#[allow(warnings, clippy::all)]
pub mod agent_ttrpc {
    include!(concat!(env!("OUT_DIR"), "/agent_ttrpc.rs"));
}

/// What the path of a namespace in a container's specification begins with when it is that of another container of
/// the sandbox, whose id follows; with no id a pid namespace is the pod's.
pub const CONTAINER: &str = "container:";

pub mod frame;
pub mod names;
pub mod ports;
pub mod relay;
pub mod reset;
