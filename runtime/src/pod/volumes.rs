//! Copies in the guest of volumes that the kubelet replaces, kept as they are on the host: programs in the guest are told
//! of a change by inotify, which files that are shared by virtio-fs cannot do.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use katavm_protocol::agent::{SetVolumeRequest, VolumeEntry};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::AbortHandle;

use super::PodError;
use crate::descriptor::awaited;
use crate::host::{Place, open_shared};
use crate::sandbox::agent::Agent;
use crate::sandbox::blocking;
use crate::sandbox::plan::{REPLACED, Replaced};
use crate::sandbox::volume;

/// How often a volume that is replaced just now is read anew before that is an error.
const TRIES: usize = 20;
/// How long between: the kubelet is done within moments.
const PAUSE: Duration = Duration::from_millis(50);

/// The copies of a guest.
#[derive(Clone)]
pub(super) struct Volumes {
    agent: Agent,
    /// Held while one is made, so that it is made once.
    making: Arc<tokio::sync::Mutex<()>>,
    kept: Arc<Mutex<All>>,
}

#[derive(Default)]
struct All {
    /// How many names have been given.
    named: u64,
    by_place: HashMap<Place, Kept>,
}

/// One copy.
struct Kept {
    name: String,
    users: usize,
    follower: AbortHandle,
}

/// The copies that one container has. They are given up when this is released or dropped.
pub(super) struct Copies {
    volumes: Volumes,
    held: Vec<Held>,
}

struct Held {
    /// The source in the configuration, as it was planned.
    planned: PathBuf,
    name: String,
    place: Place,
}

impl Volumes {
    /// None yet.
    pub fn new(agent: Agent) -> Self {
        Self { agent, making: Arc::default(), kept: Arc::default() }
    }

    /// Copies those of a container that are not in the guest yet.
    pub async fn add(&self, replaced: &[Replaced]) -> Result<Copies, PodError> {
        let mut copies = Copies { volumes: self.clone(), held: Vec::with_capacity(replaced.len()) };
        for replaced in replaced {
            let failed = |error: io::Error| {
                PodError::State(format!("cannot copy {} to the guest: {error}", replaced.path.display()))
            };
            copies.held.push(self.put(replaced).await.map_err(failed)?);
        }
        Ok(copies)
    }

    async fn put(&self, replaced: &Replaced) -> io::Result<Held> {
        let _one_at_a_time = self.making.lock().await;
        let planned = Path::new(REPLACED).join(&replaced.name);
        let place = Place::of(&open_shared(&replaced.path)?.0)?;
        if let Some(kept) = self.kept().by_place.get_mut(&place) {
            kept.users += 1;
            return Ok(Held { planned, name: kept.name.clone(), place });
        }
        let name = {
            let mut kept = self.kept();
            kept.named += 1;
            format!("volume-{}", kept.named)
        };
        // Before it is read: nothing that changes afterwards is missed.
        let watch = watch(&replaced.path)?;
        let entries = read(&replaced.path).await?;
        self.set(&name, entries).await?;
        let follower = tokio::spawn(follow(self.clone(), name.clone(), replaced.path.clone(), watch)).abort_handle();
        self.kept().by_place.insert(place, Kept { name: name.clone(), users: 1, follower });
        Ok(Held { planned, name, place })
    }

    async fn set(&self, name: &str, entries: Vec<VolumeEntry>) -> io::Result<()> {
        let request = SetVolumeRequest { name: name.into(), entries, ..Default::default() };
        self.agent.set_volume(&request).await.map_err(io::Error::other)
    }

    /// Gives one up; whether nobody has it any more.
    fn take(&self, held: &Held) -> bool {
        let mut kept = self.kept();
        let Some(copy) = kept.by_place.get_mut(&held.place) else { return false };
        copy.users -= 1;
        if copy.users > 0 {
            return false;
        }
        copy.follower.abort();
        kept.by_place.remove(&held.place).is_some()
    }

    fn kept(&self) -> MutexGuard<'_, All> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Copies {
    /// Each source in the configuration as it was planned, and as it is.
    pub fn sources(&self) -> impl Iterator<Item = (PathBuf, PathBuf)> {
        self.held.iter().map(|held| (held.planned.clone(), Path::new(REPLACED).join(&held.name)))
    }

    /// Gives them up; the names of those that nobody has any more.
    pub fn release(mut self) -> Vec<String> {
        let held = std::mem::take(&mut self.held);
        held.into_iter().filter(|held| self.volumes.take(held)).map(|held| held.name).collect()
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        for held in &self.held {
            self.volumes.take(held);
        }
    }
}

/// Tells of what the kubelet does in a volume's folder: the last of it is the removal of the old files.
fn watch(folder: &Path) -> io::Result<AsyncFd<OwnedFd>> {
    let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
    let flags = WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::DELETE | WatchFlags::ONLYDIR;
    inotify::add_watch(&fd, folder, flags)?;
    awaited(fd, Interest::READABLE)
}

async fn read(folder: &Path) -> io::Result<Vec<VolumeEntry>> {
    let mut last = None;
    for _ in 0..TRIES {
        let folder = folder.to_owned();
        match blocking(move || volume::read(&folder)).await {
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::Interrupted) => {
                last = Some(error);
                tokio::time::sleep(PAUSE).await;
            }
            read => return read,
        }
    }
    Err(last.unwrap_or_else(|| io::ErrorKind::Interrupted.into()))
}

/// Copies a volume anew whenever it has changed.
async fn follow(volumes: Volumes, name: String, folder: PathBuf, watch: AsyncFd<OwnedFd>) {
    loop {
        if let Err(error) = news(&watch).await {
            return log::warn!("changes of {} will not be seen in the guest: {error}", folder.display());
        }
        let copied = async { volumes.set(&name, read(&folder).await?).await };
        match copied.await {
            Ok(()) => {}
            // The kubelet has removed it: its containers end.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => log::warn!("a change of {} is not seen in the guest: {error}", folder.display()),
        }
    }
}

/// Waits for events and takes them.
async fn news(watch: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let mut events = [0; 4096];
    loop {
        let mut ready = watch.readable().await?;
        let mut heard = false;
        loop {
            match rustix::io::read(watch.get_ref(), &mut events) {
                Ok(_) => heard = true,
                Err(rustix::io::Errno::AGAIN) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        ready.clear_ready();
        if heard {
            return Ok(());
        }
    }
}
