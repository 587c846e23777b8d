//! The server: the sandbox process of a pod, which containerd asks over the Task API.

use std::os::fd::{FromRawFd as _, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use containerd_shim_protos::api::CreateTaskRequest;
use containerd_shim_protos::sandbox_async::create_sandbox;
use nix::sched::CloneFlags;
use tokio::sync::{mpsc, oneshot, watch};

use super::address::OwnSocket;
use super::arguments::Arguments;
use super::containers::Containers;
use super::events::Events;
use super::logging;
use super::options::config_path;
use super::orphans::Orphans;
use super::rootfs::Rootfs;
use super::sandbox::{SandboxConfig, SandboxService};
use super::service::ShimService;
use super::start::{LISTENER, TTRPC_ADDRESS};
use crate::config::Bundle;
use crate::hooks;
use crate::host;
use crate::launch::{self, Launch};
use crate::pod::{Io, Pod};
use crate::process::signals::Signals;
use crate::sandbox::probe;
use crate::service::serve_task;
use crate::settings::Settings;
use crate::state::{Journal, StateRoot, Status};
use crate::supervise::{self, Mode, Outside, Served};
use crate::timings::Timings;
use crate::watcher;

/// How often a server without a container looks whether its bundle is still there.
const BUNDLE_LOOKS: Duration = Duration::from_secs(1);
/// How long the last events are kept for a containerd that is away.
const LAST_WORDS: Duration = Duration::from_secs(10);

/// Where the state of a namespace's containers is. `katavm --root` with it shows them.
#[must_use]
pub fn state_root(namespace: &str) -> PathBuf {
    Path::new("/run/katavm-containerd").join(namespace)
}

/// The order for a pod.
pub struct Order {
    /// What it begins with.
    pub first: First,
    /// How it went.
    pub made: oneshot::Sender<Result<Arc<Pod>, String>>,
    /// Becomes true when the pod is to end.
    pub stop: watch::Receiver<bool>,
}

/// What a pod begins with.
pub enum First {
    /// A container.
    Container {
        /// As containerd said.
        request: Box<CreateTaskRequest>,
        /// Where its root file system is.
        rootfs: Rootfs,
        /// Its streams.
        io: Io,
    },
    /// Nothing but the sandbox.
    Sandbox {
        /// Its id.
        id: String,
        /// Its bundle.
        bundle: PathBuf,
        /// What it is to be.
        config: Arc<SandboxConfig>,
        /// Told of its end.
        ended: watch::Sender<Option<Ended>>,
    },
}

/// How a sandbox has ended.
#[derive(Clone, Copy, Debug)]
pub struct Ended {
    /// 0: it was told to.
    pub status: u32,
    /// When, in nanoseconds since the epoch.
    pub at_ns: u64,
}

/// Serves until the pod is shut down.
///
/// # Errors
/// That it cannot begin.
pub fn serve(arguments: &Arguments) -> anyhow::Result<()> {
    let listener = listener()?;
    let bundle = std::env::current_dir().context("cannot tell the current folder, which is the bundle")?;
    // Without a log it goes on in silence.
    let _ = logging::start(&bundle, arguments.debug);
    let served = prepare(arguments).and_then(|(root, signals, orphans)| {
        let watcher = watcher::start(&root)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let served = runtime.block_on(async {
            orphans.map(|orphans| tokio::spawn(orphans.reap()));
            run(arguments, &bundle, &root, listener, signals).await
        });
        // Threads that wait for a guest that is gone need not be waited for.
        runtime.shutdown_background();
        drop(watcher);
        served
    });
    served.inspect_err(|error| log::error!("{error:#}"))
}

/// The socket that `start` has made.
fn listener() -> anyhow::Result<UnixListener> {
    let (mut listens, mut size) = (0_i32, libc::socklen_t::try_from(size_of::<i32>())?);
    // SAFETY: the option is an int, `listens` has its size, and a descriptor that is closed is only an error.
    let asked = unsafe {
        let (option, size) = ((&raw mut listens).cast(), &raw mut size);
        libc::getsockopt(LISTENER, libc::SOL_SOCKET, libc::SO_ACCEPTCONN, option, size)
    };
    if asked < 0 || listens == 0 {
        bail!("descriptor {LISTENER} is no listening socket: this program is run by containerd, with the action start");
    }
    // SAFETY: it is open, as was just seen, and `start` has put it there for this one owner: nothing that this process has
    // opened since can have the number of one that was open before.
    let fd = unsafe { OwnedFd::from_raw_fd(LISTENER) };
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
    let listener = UnixListener::from(fd);
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn prepare(arguments: &Arguments) -> anyhow::Result<(StateRoot, Signals, Option<Orphans>)> {
    host::set_process_name(c"katavm-sandbox");
    // What it mounts goes with it.
    host::enter_new_namespaces(CloneFlags::CLONE_NEWNS).context("cannot make a mount namespace")?;
    host::receive_mounts_only().context("cannot make a mount namespace")?;
    rustix::process::chdir("/").context("cannot change to /")?;
    if let Err(error) = host::raise_open_files() {
        log::warn!("cannot raise the limit of open files: {error}");
    }
    let root = StateRoot::open(state_root(&arguments.namespace))?;
    root.sweep().context("cannot sweep up after dead containers")?;
    let orphans = Orphans::adopt();
    if let Err(error) = &orphans {
        log::warn!("what hooks and loggers leave running goes to the host's init: {error}");
    }
    Ok((root, Signals::block()?, orphans.ok()))
}

async fn run(
    arguments: &Arguments,
    bundle: &Path,
    root: &StateRoot,
    listener: UnixListener,
    signals: Signals,
) -> anyhow::Result<()> {
    let events = Events::to(std::env::var(TTRPC_ADDRESS).ok(), &arguments.namespace);
    let (orders, mut ordered) = mpsc::channel(1);
    let (end, mut ended) = watch::channel(false);
    let socket = Arc::new(OwnSocket::of(&listener).context("cannot find the socket")?);
    let containers = Containers::new(root.clone(), events.clone(), orders, end);
    let service = ShimService::new(containers, Arc::clone(&socket));
    let sandboxes = create_sandbox(Arc::new(SandboxService::new(service.clone())));
    let listener = tokio::net::UnixListener::from_std(listener).context("cannot use the socket")?;
    let server = serve_task(Arc::new(service), sandboxes, listener).await.context("cannot serve")?;
    let mut signals = Some(signals);
    loop {
        let order = tokio::select! {
            biased;
            _ = ended.wait_for(|end| *end) => break,
            order = ordered.recv() => order,
            // A client that went away while `start` ran: containerd knows nothing of this server.
            () = gone(bundle), if signals.is_some() => break,
        };
        let Some(Order { first: wanted, made, stop }) = order else { break };
        let signals = match signals.take() {
            Some(signals) => signals,
            None => Signals::block()?,
        };
        let over = match &wanted {
            First::Sandbox { ended, .. } => Some(ended.clone()),
            First::Container { .. } => None,
        };
        let planned = match wanted {
            First::Container { request, rootfs, io } => first(arguments, root, &request, &rootfs, io, signals),
            First::Sandbox { id, bundle, config, .. } => empty(arguments, root, &id, &bundle, &config, signals),
        };
        match planned {
            Ok((launch, outside)) => {
                let stand_in = outside.stand_in.pid.as_raw_nonzero().get().unsigned_abs();
                let served = Served { made, end: stop.clone() };
                let outcome = supervise::attend(&launch, outside, Mode::Served(served), &mut Timings::start()).await;
                let told = *stop.borrow();
                if let Err(error) = &outcome
                    && !told
                {
                    log::error!("{error:#}");
                }
                // It ends with its link, when the last who holds it lets go.
                let reaped = tokio::task::spawn_blocking(move || host::reap(stand_in));
                if let Some(over) = over {
                    // A thread that panics has said so.
                    let _ = reaped.await;
                    let status = if told { 0 } else { 128 + libc::SIGKILL.unsigned_abs() };
                    over.send_replace(Some(Ended { status, at_ns: host::now_ns() }));
                }
            }
            // Whoever asked may have gone away.
            Err(error) => drop(made.send(Err(format!("{error:#}")))),
        }
    }
    if tokio::time::timeout(LAST_WORDS, events.flushed()).await.is_err() {
        log::warn!("containerd does not take the last events");
    }
    drop(server);
    socket.remove();
    Ok(())
}

/// Returns when containerd has taken the bundle away.
async fn gone(bundle: &Path) {
    while bundle.exists() {
        tokio::time::sleep(BUNDLE_LOOKS).await;
    }
}

/// The same for a sandbox that is to be there before its first container.
fn empty(
    arguments: &Arguments,
    root: &StateRoot,
    id: &str,
    bundle: &Path,
    config: &SandboxConfig,
    signals: Signals,
) -> anyhow::Result<(Launch, Outside)> {
    let options = options(arguments.config.as_deref(), Some(config.systemd_cgroup))?;
    let launch = Launch::empty(id.parse()?, bundle, config.spec.clone(), options)?;
    let outside = settle(root, &launch, None, signals)?;
    Ok((launch, outside))
}

/// Everything of a pod's first container that is settled before there is a virtual machine, while this process has one
/// thread.
fn first(
    arguments: &Arguments,
    root: &StateRoot,
    request: &CreateTaskRequest,
    rootfs: &Rootfs,
    io: Io,
    signals: Signals,
) -> anyhow::Result<(Launch, Outside)> {
    let configuration = config_path(request.options.as_ref()).or_else(|| arguments.config.clone());
    let options = options(configuration.as_deref(), None)?;
    let bundle = Bundle { in_guest: rootfs.in_guest().cloned(), ..Bundle::load(Path::new(&request.bundle))? };
    let launch = Launch::plan(root, request.id.parse()?, bundle, options)?;
    if let Some(pod) = &launch.pod {
        bail!("container {} cannot join the sandbox of {}: containerd made them apart", launch.id, pod.peer.record.id);
    }
    let io = Io { fallback_size: launch.console_size(), ..io };
    let outside = settle(root, &launch, Some(io), signals)?;
    Ok((launch, outside))
}

/// What holds for a pod by the configuration.
fn options(configuration: Option<&Path>, systemd_cgroup: Option<bool>) -> anyhow::Result<launch::Options> {
    let settings = Settings::load(configuration)?;
    if settings.debug() {
        log::set_max_level(log::LevelFilter::Debug);
    }
    Ok(launch::Options { systemd_cgroup, settings, ..Default::default() })
}

/// Makes everything on the host that is there before a virtual machine: nothing is left of it after a failure.
fn settle(root: &StateRoot, launch: &Launch, io: Option<Io>, signals: Signals) -> anyhow::Result<Outside> {
    let state = root.claim(&launch.id)?;
    let directory = state.path().to_owned();
    let stand_in = launch.start_stand_in(None)?;
    let mut record = launch.recorded(stand_in.pid);
    record.is_sandbox = io.is_none();
    // Before anything is made that it names.
    let journal = Journal::new(state, record);
    let record = journal.record();
    let entered = || -> anyhow::Result<()> {
        hooks::run_before(record.hooks.as_ref(), &record.for_hooks(Status::Creating))?;
        launch.enter_cgroup(record.pid)?;
        Ok(probe::ensure(root)?)
    };
    if let Err(error) = entered() {
        let pid = record.pid;
        // The stand-in ends with its link.
        drop(stand_in);
        host::reap(pid);
        return Err(error);
    }
    Ok(Outside { io, stand_in, signals, journal, directory })
}
