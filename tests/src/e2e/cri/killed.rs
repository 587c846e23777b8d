//! A pod whose virtual machine goes without a word.

use std::process::Command;

use anyhow::{Result, ensure};
use protobuf::Enum as _;

use super::image::run;
use super::node::until;
use super::{Context, Pod, Verdict, on_node};
use crate::cri::messages::PodSandboxState;

/// What the CRI says of it becomes right, it can be removed, and another one runs.
pub fn server(context: &Context) -> Result<Verdict> {
    on_node(context, |node| {
        let pod = Pod::run(node, "killed", |_| ())?;
        let ids = [pod.idle("one")?, pod.idle("other")?];
        run(Command::new("pkill").args(["-KILL", "-x", "katavm-sandbox"]))?;
        for id in &ids {
            let ended = pod.ended(id)?;
            // The plugin's code for an end that nobody has told it.
            ensure!(ended.exit_code == 255, "{ended:?}");
        }
        until("the pod is still ready", || {
            Ok(node.cri.pod_status(&pod.id)?.state.value() == PodSandboxState::SANDBOX_NOTREADY.value())
        })?;
        pod.remove()?;
        let pod = Pod::run(node, "killed", |_| ())?;
        let id = pod.idle("one")?;
        ensure!(pod.sh(&id, "echo well")? == "well", "another pod is not well");
        pod.remove()
    })
}
