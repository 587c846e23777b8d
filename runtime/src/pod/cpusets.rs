//! The host's CPUs and memory nodes that a sandbox is held to: what any of its containers names. One that names none is
//! held to those of the others; when none names any more the sandbox keeps what it has.

use std::collections::BTreeMap;

use tokio::sync::Mutex;

use super::PodError;
use crate::cpuset::Cpuset;
use crate::host::Cgroup;
use crate::sandbox::blocking;

/// What a sandbox is held to.
pub(super) struct Cpusets {
    /// The sandbox' control group on the host.
    cgroup: Option<Cgroup>,
    /// By the ids of containers. Held while the group is changed.
    named: Mutex<BTreeMap<String, Cpuset>>,
}

impl Cpusets {
    pub fn new(cgroup: Option<Cgroup>) -> Self {
        Self { cgroup, named: Mutex::default() }
    }

    /// Notes what the sandbox was held to for its first container before there was a virtual machine.
    pub async fn begin(&self, id: &str, cpuset: Cpuset) {
        self.named.lock().await.insert(id.into(), cpuset);
    }

    /// Has the sandbox held to what container `id`, which is to join, names as well.
    ///
    /// # Errors
    /// When the control group refuses.
    pub async fn join(&self, id: &str, cpuset: Cpuset) -> Result<(), PodError> {
        if self.cgroup.is_none() && !cpuset.is_empty() {
            log::warn!("container {id}: linux.resources.cpu.cpus and mems are not honoured: {NO_GROUP}");
        }
        self.change(id, cpuset).await
    }

    /// Changes what container `id` names.
    ///
    /// # Errors
    /// When there is no control group, or when it refuses.
    pub async fn update(&self, id: &str, change: Cpuset) -> Result<(), PodError> {
        if change.is_empty() {
            return Ok(());
        }
        if self.cgroup.is_none() {
            let reason = format!("linux.resources.cpu.cpus and mems of container {id} cannot be changed: {NO_GROUP}");
            return Err(PodError::State(reason));
        }
        let before = self.named.lock().await.get(id).cloned().unwrap_or_default();
        self.change(id, before.updated(change)).await
    }

    /// Container `id` has ended.
    pub async fn leave(&self, id: &str) {
        if let Err(error) = self.change(id, Cpuset::default()).await {
            log::warn!("the sandbox keeps the CPUs of container {id}, which has ended: {error}");
        }
    }

    async fn change(&self, id: &str, cpuset: Cpuset) -> Result<(), PodError> {
        let mut named = self.named.lock().await;
        let mut changed = named.clone();
        changed.insert(id.into(), cpuset);
        changed.retain(|_, cpuset| !cpuset.is_empty());
        let union = |all: &BTreeMap<_, Cpuset>| Cpuset::union(all.values().cloned());
        let wanted = union(&changed);
        if let Some(cgroup) = self.cgroup.clone()
            && !wanted.is_empty()
            && wanted != union(&named)
        {
            let limited = blocking(move || cgroup.limit(&wanted.resources())).await;
            limited.map_err(|error| PodError::State(error.to_string()))?;
        }
        *named = changed;
        Ok(())
    }
}

/// Why nothing can be named.
const NO_GROUP: &str = "they are of the virtual machine, which no control group holds";
