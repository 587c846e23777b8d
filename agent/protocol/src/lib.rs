//! What the sandbox process and the agent say to each other: messages, the ttrpc service, ports and frames.

/// Messages of `proto/agent.proto`.
#[allow(missing_docs, non_camel_case_types, clippy::all, unused_attributes, unused_results)]
pub mod agent {
    include!(concat!(env!("OUT_DIR"), "/agent.rs"));
}

/// The ttrpc client and server of the service `katavm.agent.v1.Agent`.
#[allow(missing_docs, clippy::all, unused_attributes)]
pub mod agent_ttrpc {
    include!(concat!(env!("OUT_DIR"), "/agent_ttrpc.rs"));
}

pub mod frame;
pub mod ports;
