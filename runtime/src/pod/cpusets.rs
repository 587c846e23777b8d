//! The host's CPUs and memory nodes that a sandbox is held to: what any of its containers names. One that names none is
//! held to those of the others; when none names any, the sandbox is held to none.

use std::collections::BTreeMap;
use std::io;

use tokio::sync::Mutex;

use super::{Container, PodError};
use crate::cpuset::Cpuset;
use crate::host::{self, Cgroup};
use crate::sandbox::blocking;
use crate::state::Status;

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
    /// When the control group refuses, unless it is an ordinary user's, who may have got a group but not each controller.
    pub async fn join(&self, id: &str, cpuset: Cpuset) -> Result<(), PodError> {
        if self.cgroup.is_none() && !cpuset.is_empty() {
            log::warn!("container {id}: linux.resources.cpu.cpus and mems are not honoured: {NO_GROUP}");
        }
        match self.change(&mut *self.named.lock().await, id, cpuset).await {
            Err(error) if !host::is_root_of_host() => {
                log::warn!("{error}");
                Ok(())
            }
            joined => joined,
        }
    }

    /// Changes what a container names, unless it has ended.
    ///
    /// # Errors
    /// When there is no control group, or when it refuses.
    pub async fn update(&self, container: &Container, change: Cpuset) -> Result<(), PodError> {
        let id = container.id();
        if change.is_empty() {
            return Ok(());
        }
        if self.cgroup.is_none() {
            let reason = format!("linux.resources.cpu.cpus and mems of container {id} cannot be changed: {NO_GROUP}");
            return Err(PodError::State(reason));
        }
        let mut named = self.named.lock().await;
        if container.status() == Status::Stopped {
            return Ok(());
        }
        let before = named.get(id).cloned().unwrap_or_default();
        self.change(&mut named, id, before.updated(change)).await
    }

    /// Container `id` has ended, or could not be made.
    pub async fn leave(&self, id: &str) {
        let left = self.change(&mut *self.named.lock().await, id, Cpuset::default()).await;
        if let Err(error) = left {
            // The group may go with its last container.
            log::info!("the sandbox keeps the CPUs of container {id}: {error}");
        }
    }

    async fn change(&self, named: &mut BTreeMap<String, Cpuset>, id: &str, cpuset: Cpuset) -> Result<(), PodError> {
        let mut changed = named.clone();
        changed.insert(id.into(), cpuset);
        let union = |all: &BTreeMap<_, Cpuset>| Cpuset::union(all.values().cloned());
        let (before, wanted) = (union(named), union(&changed));
        if wanted != before
            && let Err(error) = self.limit(&before, &wanted).await
        {
            // One list may have been taken and the other not.
            let _ = self.limit(&wanted, &before).await;
            return Err(PodError::State(error.to_string()));
        }
        changed.retain(|_, cpuset| !cpuset.is_empty());
        *named = changed;
        Ok(())
    }

    async fn limit(&self, from: &Cpuset, to: &Cpuset) -> io::Result<()> {
        let Some(cgroup) = self.cgroup.clone() else { return Ok(()) };
        let (from, to) = (from.clone(), to.clone());
        blocking(move || cgroup.limit(&to.instead_of(&from, &Cpuset::of_host()?))).await
    }
}

/// Why nothing can be named.
const NO_GROUP: &str = "they are of the virtual machine, which no control group holds";
