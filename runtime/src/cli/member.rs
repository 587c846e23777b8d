//! A container in the sandbox of a pod that is there: the sandbox process makes it.

use std::os::fd::OwnedFd;

use anyhow::Context;

use super::arguments::Front;
use super::{console, delete, pid_file};
use crate::hooks;
use crate::launch::Launch;
use crate::membership::Membership;
use crate::process::stdio::Inherited;
use crate::service::{Client, Streams};
use crate::state::{StateRoot, Status};

/// Makes the container; it waits to be started when this returns.
///
/// # Errors
/// Why it was not made; nothing is left of it then.
pub fn make(root: &StateRoot, launch: &Launch, pod: &Membership, front: &Front) -> anyhow::Result<()> {
    let console = console::open(front.console_socket.as_deref(), launch.plan.terminal)?;
    let copy = |slave: &OwnedFd| slave.try_clone().context("cannot duplicate the terminal");
    let slave = console.as_ref().map(|console| copy(&console.slave)).transpose()?;
    let mut state = root.claim(&launch.id)?;
    // After a failure it ends with its link.
    let stand_in = launch.start_stand_in(slave)?;
    let mut record = launch.recorded(stand_in.pid);
    record.sandbox_pid = pod.peer.record.sandbox_pid;
    hooks::run_before(record.hooks.as_ref(), &record.for_hooks(Status::Creating))?;
    launch.enter_cgroup_as_member(record.pid)?;
    state.write(&record)?;
    let stdio = Inherited::take().context("cannot duplicate the standard streams")?;
    let streams =
        console.as_ref().map_or_else(|| Streams::standard(&stdio), |console| Streams::terminal(&console.slave));
    let client = Client::connect(&pod.peer.path, launch.id.as_str())?;
    let handed_over = client.attach_container(&streams, &state, &stand_in.link)?;
    state.disown();
    drop(stand_in.link);
    client.create(&launch.bundle.path, launch.plan.terminal)?;
    drop(handed_over);
    let told = console.map_or(Ok(()), console::Console::send).and_then(|()| match &front.pid_file {
        Some(path) => pid_file::write(path, stand_in.pid.as_raw_nonzero().get()),
        None => Ok(()),
    });
    if let Err(error) = told {
        // Nobody knows of the container: it must not stay.
        delete::by_force(root, &launch.id)?;
        return Err(error);
    }
    Ok(())
}
