//! A further container in a sandbox that is there.

use super::{ShortPath, share};
use crate::config::Bundle;
use crate::cpuset::Cpuset;
use crate::link::Link;
use crate::membership::shared_namespaces;
use crate::pod::{Io, NewContainer};
use crate::sandbox::plan::Plan;
use crate::sandbox::size::SizeOptions;
use crate::state::{Journal, Record, StateDir};

/// What a pod needs to make it, from its bundle and the state that was claimed for it. It is reached by the sockets in
/// `directory`, which are the pod's.
///
/// # Errors
/// What cannot be had of it, or of whose namespaces it is to share.
pub fn member(
    directory: &ShortPath,
    bundle: &Bundle,
    state: StateDir,
    mut record: Record,
    io: Io,
    link: Option<Link>,
) -> anyhow::Result<NewContainer> {
    record.sandbox_pid = std::process::id();
    let shared = shared_namespaces(state.root(), &record.id, &bundle.spec, Some(record.sandbox_pid))?;
    let plan = Plan::new(&record.id, bundle, SizeOptions::default(), &shared)?;
    share(directory, state.path())?;
    let resources = bundle.spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    let cpuset = resources.map(Cpuset::of).unwrap_or_default();
    Ok(NewContainer {
        id: record.id.to_string(),
        spec: plan.guest_spec,
        exports: plan.exports,
        tmpfs: plan.tmpfs,
        replaced: plan.replaced,
        disks: plan.disks,
        overlay: plan.overlay,
        io,
        link,
        journal: Journal::new(state, record),
        cgroup: None,
        limits: Some(plan.limits),
        cpuset,
        is_first: false,
    })
}
