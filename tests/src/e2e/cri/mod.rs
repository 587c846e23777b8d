//! Kubernetes' pods: containerd's CRI plugin is asked as the kubelet asks it.
//!
//! With `KATAVM_E2E_CRI_RUNTIME=runc` the cases are tried with runc: what fails then is wrong with the case.

pub mod image;
mod killed;
mod life;
mod limits;
mod network;
mod node;
mod pod;
mod pull;
mod security;
mod streams;
mod together;
mod volumes;

use std::path::Path;

use anyhow::Result;

use super::leftovers::Traces;
use super::{Context, Table, Verdict};
pub use node::{Flavour, Node, until};
pub use pod::Pod;

/// The table.
pub const CASES: Table = (
    "cri",
    &[
        ("a_pod_from_the_first_call_to_the_last", life::whole),
        ("stopped_and_removed_in_any_order", life::any_order),
        ("init_containers_and_restarts", life::restarts),
        ("what_fails_does_so_in_words", life::failures),
        ("containers_see_each_other_on_localhost", together::localhost),
        ("a_pod_may_share_its_processes", together::pids),
        ("commands_have_their_streams", streams::exec),
        ("a_container_is_attached_to", streams::attach),
        ("logs_are_whole_and_can_be_rotated", streams::logs),
        ("a_pod_has_the_size_of_its_containers", limits::size),
        ("a_pod_without_limits_has_the_size_of_the_configuration", limits::default_size),
        ("limits_can_be_changed", limits::update),
        ("a_pod_grows_with_containers_that_join", limits::grown),
        ("what_is_used_is_told", limits::stats),
        ("volumes_of_each_kind", volumes::kinds),
        ("a_shared_volume_is_one", volumes::shared),
        ("updates_of_a_config_map_are_seen", volumes::config_map),
        ("mounts_of_the_host_reach_a_volume", volumes::propagation),
        ("security_contexts_are_honoured", security::contexts),
        ("a_pod_is_reached_by_others", network::reached),
        ("a_port_is_forwarded", network::forwarded),
        ("images_are_pulled", pull::pulled),
        ("a_killed_server_is_noticed_and_nothing_stays", killed::server),
    ],
);

/// With containerd 2, whose CRI plugin speaks the Sandbox API with the shim: a pod has no first container there.
pub const SANDBOXER: Table = (
    "cri-sandboxer",
    &[
        ("a_pod_from_the_first_call_to_the_last", |context| by_sandboxer(context, life::whole)),
        ("stopped_and_removed_in_any_order", |context| by_sandboxer(context, life::any_order)),
        ("containers_see_each_other_on_localhost", |context| by_sandboxer(context, together::localhost)),
        ("a_pod_may_share_its_processes", |context| by_sandboxer(context, together::pids)),
        ("commands_have_their_streams", |context| by_sandboxer(context, streams::exec)),
        ("a_pod_has_the_size_of_its_containers", |context| by_sandboxer(context, limits::size)),
        ("security_contexts_are_honoured", |context| by_sandboxer(context, security::contexts)),
        ("a_port_is_forwarded", |context| by_sandboxer(context, network::forwarded)),
        ("a_killed_server_is_noticed_and_nothing_stays", |context| by_sandboxer(context, killed::server)),
    ],
);

fn by_sandboxer(context: &Context, case: fn(&Context) -> Result<Verdict>) -> Result<Verdict> {
    context.group().flavour.set(Flavour::Sandboxer);
    case(context)
}

/// Where the shim has the state of the CRI's containers.
const STATE: &str = "/run/katavm-containerd/k8s.io";

/// The runtime class that is tried.
fn handler() -> String {
    std::env::var("KATAVM_E2E_CRI_RUNTIME").unwrap_or_else(|_| "katavm".into())
}

/// The release of the kernel that containers see.
fn kernel(context: &Context) -> Result<String> {
    match handler().as_str() {
        "katavm" => context.kernel_release(),
        _ => Ok(std::fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned()),
    }
}

/// Runs a case on the node that the cases of the group share; nothing of it may be left on the host. A node on which a
/// case failed is not used again.
fn on_node(context: &Context, case: impl FnOnce(&Node) -> Result<()>) -> Result<Verdict> {
    let node = context.group().node.borrow_mut().take();
    let node = match node {
        Some(node) => node,
        None => Node::start(context, context.group().flavour.get())?,
    };
    let traces = Traces::with_state(Path::new("/nonexistent"), Path::new(STATE));
    let outcome = case(&node).and_then(|()| traces.expect_nothing_new());
    context.note("containerd.log", node.log());
    outcome?;
    *context.group().node.borrow_mut() = Some(node);
    Ok(Verdict::Passed)
}
