//! The size of a sandbox, which follows what its containers may use.
//!
//! It grows before a container may use more, and what no container may use any more is taken back after. It is never smaller
//! than it was at its start.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use oci_spec::runtime::{LinuxMemory, LinuxResources};

use super::{Pod, PodError};
use crate::host::Cgroup;
use crate::limits::SANDBOX_OVERHEAD;
use crate::sandbox::agent::Agent;
use crate::sandbox::size::{Limits, MIB, Size};
use crate::sandbox::vm::Machine;
use crate::sandbox::{Sandbox, blocking};

/// How long a guest may take for the next piece of memory that it is given, or is to give back.
const PATIENCE: Duration = Duration::from_secs(5);

/// How large a sandbox is.
pub(super) struct Sizes {
    /// Held while it changes.
    turn: tokio::sync::Mutex<()>,
    current: Mutex<Size>,
    /// What containers that are being made or updated may use after that, by their ids.
    promised: Mutex<Vec<Arc<Promised>>>,
    /// What the sandbox is in on the host, if its memory is limited there.
    cgroup: Option<Cgroup>,
}

type Promised = (String, Option<Limits>);

impl Sizes {
    pub fn new(machine: &dyn Machine, cgroup: Option<Cgroup>) -> Self {
        let (turn, current) = (tokio::sync::Mutex::default(), Mutex::new(machine.least()));
        Self { turn, current, promised: Mutex::default(), cgroup }
    }

    fn current(&self) -> MutexGuard<'_, Size> {
        locked(&self.current)
    }

    fn promise(&self, id: &str, limits: Option<Limits>) -> Promise<'_> {
        let made = Arc::new((id.into(), limits));
        locked(&self.promised).push(Arc::clone(&made));
        Promise { all: &self.promised, made }
    }
}

/// What is not taken away from a container while this is there.
struct Promise<'a> {
    all: &'a Mutex<Vec<Arc<Promised>>>,
    made: Arc<Promised>,
}

impl Drop for Promise<'_> {
    fn drop(&mut self) {
        locked(self.all).retain(|other| !Arc::ptr_eq(other, &self.made));
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pod {
    /// Does what lets container `id`, which may not be there yet, use so much: the sandbox is large enough before, and stays
    /// so. Others need not wait for it.
    pub(super) async fn with_room<T>(
        &self,
        id: &str,
        limits: Option<Limits>,
        work: impl Future<Output = Result<T, PodError>>,
    ) -> Result<T, PodError> {
        let _promise = self.sizes.promise(id, limits);
        self.make_room().await?;
        work.await
    }

    async fn make_room(&self) -> Result<(), PodError> {
        let _turn = self.sizes.turn.lock().await;
        let current = *self.sizes.current();
        let wanted = self.wanted();
        let possible = wanted.smaller(self.sandbox.machine().most());
        if possible != wanted {
            log::warn!("the containers may use more than the guest can have: it gets {possible}, not {wanted}");
        }
        let larger = possible.larger(current);
        if larger == current { Ok(()) } else { self.resizer().grow(current, larger).await }
    }

    /// Takes back what no container may use any more, in the background: a guest may take its time.
    pub(super) fn take_back(self: &Arc<Self>) {
        let pod = Arc::clone(self);
        tokio::spawn(async move {
            let _turn = pod.sizes.turn.lock().await;
            let current = *pod.sizes.current();
            let smaller = pod.wanted().smaller(current);
            if smaller != current && !pod.sandbox.has_ended() {
                let shrunk = pod.resizer().shrink(current, smaller).await;
                // The guest's end is told elsewhere.
                if let Err(error) = shrunk.as_ref().map_err(ToString::to_string)
                    && !pod.sandbox.has_ended()
                {
                    log::warn!("the guest keeps what it has: {error}");
                }
            }
        });
    }

    /// How large the sandbox is to be for its containers, with what is promised and without.
    fn wanted(&self) -> Size {
        let (promised, containers) = (locked(&self.sizes.promised), self.containers());
        let current = *self.sizes.current();
        let now: BTreeMap<_, _> = containers.iter().map(|(id, container)| (id, container.limits())).collect();
        let mut then = now.clone();
        then.extend(promised.iter().map(|promised| (&promised.0, promised.1)));
        let for_all = |all: BTreeMap<_, Option<Limits>>| Size::for_all(all.into_values().flatten(), current);
        for_all(now).larger(for_all(then)).larger(self.sandbox.machine().least())
    }

    fn resizer(&self) -> Resizer<'_> {
        Resizer { sandbox: &self.sandbox, agent: &self.agent, sizes: &self.sizes }
    }
}

/// Changes the size while it has its turn.
struct Resizer<'a> {
    sandbox: &'a Sandbox,
    agent: &'a Agent,
    sizes: &'a Sizes,
}

impl Resizer<'_> {
    async fn grow(&self, from: Size, to: Size) -> Result<(), PodError> {
        if to.memory_mib > from.memory_mib {
            self.limit_on_host(to.memory_mib).await?;
            let got = self.memory(to.memory_mib).await;
            if !got.as_ref().is_ok_and(|got| *got >= to.memory_mib) {
                let left = self.memory(from.memory_mib).await.unwrap_or(to.memory_mib);
                self.sizes.current().memory_mib = left;
                self.limit_on_host(left).await?;
                let wanted = to.memory_mib;
                return Err(PodError::State(match got {
                    Ok(got) => format!("the guest has got {got} MiB of memory, not the {wanted} MiB that this needs"),
                    Err(error) => error.to_string(),
                }));
            }
            self.sizes.current().memory_mib = to.memory_mib;
        }
        let machine = self.sandbox.machine();
        let made = blocking(move || machine.add_vcpus(to.vcpus).map_err(std::io::Error::other)).await;
        made.map_err(|error| PodError::State(error.to_string()))?;
        self.tell(to).await?;
        self.sizes.current().vcpus = to.vcpus;
        Ok(())
    }

    /// As far as the guest goes along.
    async fn shrink(&self, from: Size, to: Size) -> Result<(), PodError> {
        self.tell(Size { vcpus: to.vcpus, ..from }).await?;
        self.sizes.current().vcpus = to.vcpus;
        if to.memory_mib == from.memory_mib {
            return Ok(());
        }
        let left = self.memory(to.memory_mib).await.map_err(|error| PodError::State(error.to_string()))?;
        log::info!("the guest has given back {} MiB of memory", from.memory_mib.saturating_sub(left));
        if left > to.memory_mib {
            log::warn!("the guest keeps {left} MiB of memory, not {} MiB: it is in use", to.memory_mib);
        }
        self.sizes.current().memory_mib = left;
        self.tell(Size { memory_mib: left, ..to }).await?;
        self.limit_on_host(left).await
    }

    /// Tells the agent how large the guest is.
    async fn tell(&self, size: Size) -> Result<(), PodError> {
        let plugged = size.memory_mib.saturating_sub(self.sandbox.machine().least().memory_mib);
        Ok(self.agent.set_size(size.vcpus, u64::from(plugged) * MIB).await?)
    }

    async fn memory(&self, mib: u32) -> std::io::Result<u32> {
        let machine = self.sandbox.machine();
        blocking(move || machine.resize_memory(mib, PATIENCE).map_err(std::io::Error::other)).await
    }

    async fn limit_on_host(&self, mib: u32) -> Result<(), PodError> {
        let Some(cgroup) = self.sizes.cgroup.clone() else { return Ok(()) };
        let mut memory = LinuxMemory::default();
        memory
            .set_limit(Some(i64::try_from(u64::from(mib) * MIB).unwrap_or(i64::MAX).saturating_add(SANDBOX_OVERHEAD)));
        let mut limits = LinuxResources::default();
        limits.set_memory(Some(memory));
        blocking(move || cgroup.limit(&limits)).await.map_err(|error| PodError::State(error.to_string()))
    }
}
