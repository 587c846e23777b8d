//! The service of a sandbox process: containerd's Task API on a unix socket in the state directory of the sandbox'
//! first container, and beside it a socket for what that has no words for: open descriptors, and events.

mod attach;
mod client;
mod member;
mod task;
mod watch;

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use containerd_shim_protos::shim_async::{Task, create_task};
use rustix::fs::{Mode, OFlags, open};
use tokio::net::UnixListener;
use ttrpc::r#async::Server;
use ttrpc::r#async::transport::Listener;

use crate::pod::{Pod, PodError};
pub use attach::Pending;
pub use client::{Client, ClientError, Streams, Watch};
pub use member::member;
pub use task::{TaskService, metrics, refusal, timestamp, to_its_end};

/// The Task API's socket.
const TASK: &str = "task.sock";
/// The socket for descriptors.
const ATTACH: &str = "attach.sock";

/// A running service; it ends when this is dropped.
pub struct Service {
    _server: Server,
    _attach: attach::Attaching,
}

/// Serves a pod in `directory`.
///
/// # Errors
/// That a socket cannot be made.
pub async fn serve(pod: &Arc<Pod>, directory: &Path) -> Result<Service, PodError> {
    let failed = |error: io::Error| PodError::State(format!("cannot serve in {}: {error}", directory.display()));
    let short = ShortPath::of(directory).map_err(failed)?;
    let attach = attach::listen(&short.join(ATTACH), pod).map_err(failed)?;
    let listener = UnixListener::bind(short.join(TASK)).map_err(failed)?;
    let service = Arc::new(TaskService::new(Arc::clone(pod), attach.pending(), short));
    let server = serve_task(service, HashMap::new(), listener).await.map_err(failed)?;
    Ok(Service { _server: server, _attach: attach })
}

/// Serves the Task API, and `more` beside it, to who connects, until the server is dropped.
///
/// # Errors
/// That it cannot be started.
pub async fn serve_task<T: Task + Send + Sync + 'static>(
    service: Arc<T>,
    more: HashMap<String, ttrpc::r#async::Service>,
    listener: UnixListener,
) -> io::Result<Server> {
    let stream = futures::stream::unfold(listener, |listener| async move {
        let accepted = listener.accept().await.map(|(stream, _)| stream);
        Some((accepted, listener))
    });
    // Versions 2 and 3 of the service have the same messages.
    let mut methods = create_task(service.clone());
    methods.extend(create_task(service).into_iter().map(|(name, service)| (name.replace(".v3.", ".v2."), service)));
    methods.extend(more);
    let mut server = Server::new().add_listener(Listener::new(stream)).register_service(methods);
    server.start().await.map_err(io::Error::other)?;
    Ok(server)
}

/// Makes the service that is reached by `directory` reachable by another one, too: connecting takes no more than a name
/// of the socket.
///
/// # Errors
/// Those of link(2).
fn share(directory: &ShortPath, with: &Path) -> io::Result<()> {
    [TASK, ATTACH].iter().try_for_each(|name| std::fs::hard_link(directory.join(name), with.join(name)))
}

/// A directory by its descriptor: the paths of sockets in it are shorter than the 107 bytes that they may have, and stay
/// right when it is renamed.
#[derive(Clone, Debug)]
pub struct ShortPath {
    fd: Arc<OwnedFd>,
}

impl ShortPath {
    /// Opens it.
    ///
    /// # Errors
    /// Those of open(2).
    pub fn of(directory: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self { fd: Arc::new(open(directory, flags, Mode::empty())?) })
    }

    fn join(&self, name: &str) -> PathBuf {
        format!("/proc/self/fd/{}/{name}", self.fd.as_raw_fd()).into()
    }
}
