//! A client of Kubernetes' Container Runtime Interface, as the kubelet is one: containerd's CRI plugin is asked over
//! its unix socket.

mod calls;
mod grpc;
pub mod stream;

/// The messages, generated from `proto/cri.proto`.
pub mod messages {
    #![allow(missing_docs)]
    include!(concat!(env!("OUT_DIR"), "/cri/mod.rs"));
    pub use cri::*;
}

pub use calls::Cri;
pub use grpc::{CallError, Channel};
