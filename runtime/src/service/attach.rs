//! What the Task API has no words for. Descriptors for a process that is about to be made: whoever asks for it connects
//! here first, says which process it means, and passes the standard streams; the connection stays as the process' link.
//! And what happens to a container, for those who watch it.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen as listen_on,
    socket_with,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;

use super::watch;
use crate::descriptor::awaited;
use crate::link::{Greeting, Hello, Link, ToStandIn};
use crate::pod::{Io, Pod};
use crate::process::stdio::Inherited;
use crate::process::terminal::WindowSize;
use crate::state::StateDir;

/// Streams and link of a process that is to be made.
pub struct Attached {
    /// Its streams.
    pub io: Io,
    /// To whoever asked for it, or to what stands for it.
    pub link: Link,
    /// The state directory of a container that is to be made.
    pub state: Option<StateDir>,
}

/// Those that wait for their process, by container id and exec id.
#[derive(Clone, Default)]
pub struct Pending(Arc<Mutex<HashMap<(String, String), Attached>>>);

impl Pending {
    /// Takes what was passed for a process.
    pub fn take(&self, container_id: &str, exec_id: &str) -> Option<Attached> {
        self.lock().remove(&(container_id.to_owned(), exec_id.to_owned()))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<(String, String), Attached>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Connections are taken until this is dropped.
pub struct Attaching {
    pending: Pending,
    task: JoinHandle<()>,
}

impl Attaching {
    /// What was passed.
    pub fn pending(&self) -> Pending {
        self.pending.clone()
    }
}

impl Drop for Attaching {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn socket() -> io::Result<OwnedFd> {
    Ok(socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// Connects to the socket at `path`.
pub fn dial(path: &Path) -> io::Result<OwnedFd> {
    let socket = socket()?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// Takes connections at `path`.
pub fn listen(path: &Path, pod: &Arc<Pod>) -> io::Result<Attaching> {
    let listener = socket()?;
    bind(&listener, &SocketAddrUnix::new(path)?)?;
    listen_on(&listener, 64)?;
    rustix::io::ioctl_fionbio(&listener, true)?;
    let listener = awaited(listener, Interest::READABLE)?;
    let pending = Pending::default();
    let task = tokio::spawn(accept(listener, pending.clone(), Arc::clone(pod)));
    Ok(Attaching { pending, task })
}

async fn accept(listener: AsyncFd<OwnedFd>, pending: Pending, pod: Arc<Pod>) {
    loop {
        let Ok(mut guard) = listener.readable().await else { return };
        let accepted = guard.try_io(|fd| Ok(accept_with(fd.get_ref(), SocketFlags::CLOEXEC)?));
        match accepted {
            Ok(Ok(socket)) => {
                let (pending, pod) = (pending.clone(), Arc::clone(&pod));
                tokio::spawn(async move {
                    if let Err(error) = greet(socket, &pending, &pod).await {
                        log::warn!("a client cannot be served: {error}");
                    }
                });
            }
            Ok(Err(error)) => {
                log::warn!("a client cannot be heard: {error}");
                // Without descriptors the next attempt fails as well, until one is closed.
                tokio::task::yield_now().await;
            }
            Err(_would_block) => {}
        }
    }
}

async fn greet(socket: OwnedFd, pending: &Pending, pod: &Arc<Pod>) -> io::Result<()> {
    let asker = Link::new(socket)?;
    let (hello, descriptors) = match asker.receive::<Greeting>().await? {
        None => return Ok(()),
        Some((Greeting::Watch(id), _)) => return watch::tell(pod, &id, &asker).await,
        Some((Greeting::Process(hello), descriptors)) => (hello, descriptors),
    };
    let mut descriptors = descriptors.into_iter();
    let io = streams(&hello, &mut descriptors)?;
    let key = (hello.container_id, hello.exec_id);
    let Some(path) = hello.state else {
        asker.send(&ToStandIn::Heard).await?;
        pending.lock().insert(key, Attached { io, link: asker, state: None });
        return Ok(());
    };
    let mut next = || descriptors.next().ok_or_else(|| io::Error::other("a descriptor is missing"));
    let state = StateDir::adopt(path, next()?.into());
    let link = Link::new(next()?)?;
    pending.lock().insert(key.clone(), Attached { io, link, state: Some(state) });
    asker.send(&ToStandIn::Heard).await?;
    // Nothing more is said. Who goes away without asking for the container leaves nothing of it.
    let gone = asker.receive::<Hello>().await;
    drop(pending.lock().remove(&key));
    gone.map(drop)
}

fn streams(hello: &Hello, descriptors: &mut impl Iterator<Item = OwnedFd>) -> io::Result<Io> {
    if hello.terminal {
        let slave = descriptors.next().ok_or_else(|| io::Error::other("no terminal was passed"))?;
        return Io::over_terminal(slave, WindowSize::default()).map_err(io::Error::other);
    }
    let mut next = |given: bool| given.then(|| descriptors.next()).flatten();
    let [stdin, stdout, stderr] = hello.streams.map(&mut next);
    Ok(Io::plain(Inherited { stdin, stdout, stderr }))
}
