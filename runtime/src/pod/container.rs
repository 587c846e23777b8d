//! A container of a pod: its processes, and what is written down about it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use katavm_protocol::agent::{Exit, RemoveContainerRequest};
use oci_spec::runtime::LinuxResources;

use super::disks::Disks;
use super::volumes::Copies;
use super::watch::Kills;
use super::{Phase, PodError, Process};
use crate::host::{self, Cgroup};
use crate::limits;
use crate::sandbox::blocking;
use crate::sandbox::share::Exports;
use crate::sandbox::size::Limits;
use crate::state::{Journal, Record, Status};

/// What of the host a container sees.
pub(super) struct Seen {
    /// What is shared.
    pub exports: Exports,
    /// What was copied.
    pub copies: Copies,
    /// What it has by itself.
    pub disks: Disks,
}

impl Seen {
    /// Gives it up, its disks detached; how the agent removes the container with it.
    pub fn release(self, id: &str) -> RemoveContainerRequest {
        let (unshared, volumes) = (self.exports.release(), self.copies.release());
        RemoveContainerRequest { container_id: id.into(), unshared, volumes, ..Default::default() }
    }
}

/// What a container is held to.
pub(super) struct Held {
    /// The group on the host that its limits hold for as well.
    pub cgroup: Option<Cgroup>,
    /// What the sandbox' size depends on; nothing if it only holds a pod together.
    pub limits: Option<Limits>,
}

/// A container that was made.
pub struct Container {
    id: String,
    init: Arc<Process>,
    /// What of the host it sees while it lives. Held while that is given up.
    seen: tokio::sync::Mutex<Option<Seen>>,
    /// How the agent removes it.
    removal: Mutex<RemoveContainerRequest>,
    /// By exec id; nothing while it is being made.
    execs: Mutex<HashMap<String, Option<Arc<Process>>>>,
    journal: Mutex<Journal>,
    held: Mutex<Held>,
    /// Out-of-memory kills.
    kills: Kills,
    /// What is written down about it holds for the sandbox, too.
    is_first: bool,
}

impl Container {
    pub(super) fn new(
        id: String,
        init: Arc<Process>,
        seen: Seen,
        journal: Journal,
        held: Held,
        is_first: bool,
    ) -> Self {
        let container = Self {
            id,
            init,
            seen: tokio::sync::Mutex::new(Some(seen)),
            removal: Mutex::default(),
            execs: Mutex::default(),
            journal: Mutex::new(journal),
            held: Mutex::new(held),
            kills: Kills::new(),
            is_first,
        };
        container.note(Status::Created);
        container
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its first process.
    #[must_use]
    pub fn init(&self) -> &Arc<Process> {
        &self.init
    }

    /// Its out-of-memory kills.
    pub(super) fn kills(&self) -> &Kills {
        &self.kills
    }

    /// What is known about it.
    #[must_use]
    pub fn record(&self) -> Record {
        self.journal().record().clone()
    }

    /// How far it is.
    #[must_use]
    pub fn status(&self) -> Status {
        self.journal().record().status
    }

    /// A process by its exec id, which is empty for the first.
    ///
    /// # Errors
    /// There is none.
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>, PodError> {
        if exec_id.is_empty() {
            return Ok(Arc::clone(&self.init));
        }
        let none = || PodError::NoProcess { container: self.id.clone(), process: exec_id.into() };
        self.execs().get(exec_id).cloned().flatten().ok_or_else(none)
    }

    /// The exec id of the further process with this pid in the guest.
    #[must_use]
    pub fn exec_id(&self, guest_pid: u32) -> Option<String> {
        let execs = self.execs();
        // The pids of those that have ended may be others' by now.
        let is_it = |process: &Process| process.guest_pid() == guest_pid && !process.has_exited();
        execs
            .iter()
            .find(|(_, process)| process.as_ref().is_some_and(|process| is_it(process)))
            .map(|(id, _)| id.clone())
    }

    /// Takes an exec id for a process that is to be made.
    pub(super) fn claim(self: &Arc<Self>, exec_id: &str) -> Result<Claim, PodError> {
        match self.execs().entry(exec_id.into()) {
            std::collections::hash_map::Entry::Occupied(_) => {
                Err(PodError::Exists(format!("process {exec_id} of container {}", self.id)))
            }
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(None);
                Ok(Claim { container: Arc::clone(self), exec_id: exec_id.into() })
            }
        }
    }

    /// Changes the limits that hold on the host.
    pub(super) async fn limit_on_host(&self, resources: &LinuxResources) -> Result<(), PodError> {
        let cgroup = self.held().cgroup.clone();
        match (cgroup, limits::only_on_host(resources).first()) {
            (Some(cgroup), _) => {
                let limits = limits::of_host(resources);
                let limited = blocking(move || cgroup.limit(&limits)).await;
                limited.map_err(|error| PodError::State(error.to_string()))
            }
            (None, None) => Ok(()),
            (None, Some(field)) => Err(PodError::State(format!(
                "linux.resources.{field} cannot be changed: it is a limit of the virtual machine, which no control \
                 group of container {} holds",
                self.id
            ))),
        }
    }

    /// What the sandbox' size depends on, as long as it has not ended.
    pub(super) fn limits(&self) -> Option<Limits> {
        self.held().limits.filter(|_| self.status() != Status::Stopped)
    }

    /// Notes what was changed.
    pub(super) fn set_limits(&self, limits: Option<Limits>) {
        self.held().limits = limits;
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets a further process that has ended.
    pub fn remove_exec(&self, exec_id: &str) {
        self.execs().remove(exec_id);
    }

    /// Writes down how far it is.
    pub(super) fn note(&self, status: Status) {
        self.journal().set_status(status);
    }

    /// Keeps its state in step with its first process, to the end of that.
    pub(super) async fn follow(&self) {
        let started = async {
            self.init.started().await;
            if self.init.phase() == Phase::Running {
                self.note(Status::Running);
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            // Before anybody hears of the end: engines unmount these at once, and copy what is on the disks.
            () = self.init.follow(self.release()) => {}
            () = started => {}
        }
        // It may have been ended from outside.
        self.release().await;
        self.note(Status::Stopped);
        self.init.dismiss_stand_in().await;
    }

    /// Gives up what of the host it sees; it has ended. That has been done when this returns, whoever does it.
    pub(super) async fn release(&self) {
        let mut held = self.seen.lock().await;
        let Some(mut seen) = held.take() else { return };
        // As long as the upper layer of an overlay of disks is shared.
        seen.disks.detach().await;
        let id = self.id.clone();
        if let Ok(removal) = tokio::task::spawn_blocking(move || seen.release(&id)).await {
            *self.removal.lock().unwrap_or_else(PoisonError::into_inner) = removal;
        }
    }

    /// Whether the sandbox was made for it.
    pub(super) fn is_first(&self) -> bool {
        self.is_first
    }

    /// How the agent removes it, and with it what nobody in the guest sees any more since it has ended.
    pub(super) fn removal(&self) -> RemoveContainerRequest {
        let removal = self.removal.lock().unwrap_or_else(PoisonError::into_inner).clone();
        RemoveContainerRequest { container_id: self.id.clone(), ..removal }
    }

    /// Removes what was written down about it.
    pub(super) fn forget(&self) {
        self.journal().forget();
    }

    /// Keeps that for the sandbox alone, until this is dropped.
    pub(super) fn retire(&self) {
        self.journal().retire();
    }

    /// It stays until it is deleted, whatever happens to its sandbox process.
    pub fn keep(&self) {
        self.journal().keep();
    }

    /// Returns when all that its processes wrote has arrived.
    pub(super) async fn drained(&self) {
        let execs: Vec<_> = self.execs().values().flatten().cloned().collect();
        for process in execs.iter().chain([&self.init]) {
            process.drain().await;
        }
    }

    /// Its sandbox has ended.
    pub(super) fn end_all(&self) {
        let (status, at_ns) = (128 + libc::SIGKILL.unsigned_abs(), host::now_ns());
        let killed = Exit { status, at_ns, ..Default::default() };
        for process in self.execs().values().flatten() {
            process.end(killed.clone());
        }
        self.init.end(killed);
    }

    fn execs(&self) -> MutexGuard<'_, HashMap<String, Option<Arc<Process>>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn journal(&self) -> MutexGuard<'_, Journal> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An exec id that is taken; free again when this is dropped, unless its process was made.
pub(super) struct Claim {
    container: Arc<Container>,
    exec_id: String,
}

impl Claim {
    /// The process was made: it is followed to its end.
    pub fn keep(self, process: &Arc<Process>) {
        self.container.execs().insert(self.exec_id.clone(), Some(Arc::clone(process)));
        let (process, container, exec_id) = (Arc::clone(process), Arc::clone(&self.container), self.exec_id.clone());
        tokio::spawn(async move {
            process.follow(std::future::ready(())).await;
            process.dismiss_stand_in().await;
            if process.has_stand_in() {
                // That was all who wanted to know; its terminal must not stay open here.
                container.remove_exec(&exec_id);
            }
        });
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut execs = self.container.execs();
        if execs.get(&self.exec_id).is_some_and(Option::is_none) {
            execs.remove(&self.exec_id);
        }
    }
}
