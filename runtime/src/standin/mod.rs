//! The stand-in: the process on the host that an engine takes for a container's process.
//!
//! Its pid is in the pid file, the engine waits for it, looks at its namespaces in /proc, and signals it. It
//! runs nothing of the container: it passes signals on to the sandbox process and ends with the container's status.
//! It is forked before the process that makes it has threads.

mod root;

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::sched::CloneFlags;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, WaitOptions, wait};

use crate::host::{self, Fork};
use crate::link::{self, FromStandIn, ToStandIn};
use crate::process::signals::{Received, Signals};
pub use root::{View, Volume};

/// What a stand-in ends with when the sandbox process has died: the container has been killed with it.
const KILLED: u8 = 128 + 9;

/// Namespaces of a stand-in.
#[derive(Debug)]
pub struct Namespaces {
    /// Made for it.
    pub new: CloneFlags,
    /// Joined.
    pub joined: Vec<OwnedFd>,
    /// It is the first process of a pid namespace of its own.
    pub pid: bool,
}

impl Default for Namespaces {
    /// Those of the process that makes it.
    fn default() -> Self {
        Self { new: CloneFlags::empty(), joined: Vec::new(), pid: false }
    }
}

/// How a stand-in is made.
#[derive(Debug, Default)]
pub struct Plan {
    /// Its namespaces.
    pub namespaces: Namespaces,
    /// What it sees of the container's files; nothing for a further process of a container.
    pub view: Option<View>,
    /// The view's [id maps](View::id_maps).
    pub id_maps: Vec<OwnedFd>,
    /// The terminal that it watches the size of: it becomes the leader of the terminal's session.
    pub terminal: Option<OwnedFd>,
}

/// Forks a stand-in that speaks over `link`, and ends when the container's process has ended. Returns in the caller's
/// process only.
///
/// # Errors
/// Those of fork(2), unshare(2) and setns(2).
pub fn start(plan: Plan, link: OwnedFd) -> io::Result<Pid> {
    let forked = if plan.namespaces.pid { host::fork_into_pid_namespace()? } else { host::fork()? };
    match forked {
        Fork::Parent(pid) => Ok(pid),
        Fork::Child => {
            host::set_process_name(c"katavm-standin");
            // The log's descriptor is closed below, and its number may be given to another file.
            log::set_max_level(log::LevelFilter::Off);
            let mut kept = vec![link.as_fd()];
            kept.extend(plan.terminal.as_ref().map(AsFd::as_fd));
            kept.extend(plan.id_maps.iter().map(AsFd::as_fd));
            kept.extend(plan.namespaces.joined.iter().map(AsFd::as_fd));
            host::detach(&kept);
            host::exit_now(stand(plan, &link))
        }
    }
}

/// Waits until the stand-in at the other end of a link is in its namespaces.
///
/// # Errors
/// Why it could not enter them, or that it has died.
pub fn await_entry(link: &OwnedFd) -> io::Result<()> {
    match link::receive(link)? {
        Some((FromStandIn::Entered(entered), _)) => entered.map_err(io::Error::other),
        _ => Err(io::Error::other("it has died")),
    }
}

fn stand(plan: Plan, link: &OwnedFd) -> u8 {
    let prepared = prepare(plan.namespaces, plan.terminal.as_ref());
    let entered = prepared.as_ref().map(drop).map_err(ToString::to_string);
    match (link::send(link, &FromStandIn::Entered(entered), &[]), prepared) {
        (Ok(()), Ok(signals)) => serve(plan.view, &plan.id_maps, link, &signals).unwrap_or(KILLED),
        _ => KILLED,
    }
}

fn prepare(namespaces: Namespaces, terminal: Option<&OwnedFd>) -> io::Result<Signals> {
    for joined in &namespaces.joined {
        host::join_namespace(joined)?;
    }
    if !namespaces.new.is_empty() {
        host::enter_new_namespaces(namespaces.new)?;
        if namespaces.new.contains(CloneFlags::CLONE_NEWNS) {
            host::receive_mounts_only()?;
        }
    }
    if let Some(terminal) = terminal {
        // It leads the session since it was detached; SIGWINCH goes to the terminal's foreground group.
        rustix::process::ioctl_tiocsctty(terminal)?;
    }
    Signals::block().map_err(io::Error::other)
}

/// Passes signals on until the container's process has ended; its status.
fn serve(mut view: Option<View>, id_maps: &[OwnedFd], link: &OwnedFd, signals: &Signals) -> io::Result<u8> {
    loop {
        let mut fds = [PollFd::new(link, PollFlags::IN), PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let [heard, signalled] = fds.map(|fd| !fd.revents().is_empty());
        if signalled {
            pass_on(link, signals)?;
        }
        if heard {
            match link::receive(link)? {
                Some((ToStandIn::Made, _)) => {
                    let settled =
                        view.take().map_or(Ok(()), |view| view.take_up(id_maps)).map_err(|error| error.to_string());
                    link::send(link, &FromStandIn::Settled(settled), &[])?;
                    // Waiting takes next to none of it.
                    let _ = host::let_go_of_code();
                }
                Some((ToStandIn::Heard, _)) => {}
                Some((ToStandIn::Exited(status), _)) => return Ok(u8::try_from(status).unwrap_or(u8::MAX)),
                None => return Ok(KILLED),
            }
        }
    }
}

fn pass_on(link: &OwnedFd, signals: &Signals) -> io::Result<()> {
    while let Some(received) = signals.take()? {
        let message = match received {
            Received::Resized => FromStandIn::Resized,
            Received::Forward(signal) => FromStandIn::Signal(signal),
        };
        link::send(link, &message, &[])?;
    }
    // Whoever joins its pid namespace leaves orphans to its first process.
    while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
    Ok(())
}
