//! A container with a sandbox process that goes on by itself: `create` and `run --detach`.

use std::os::fd::OwnedFd;

use anyhow::{Context, bail};
use rustix::process::{WaitOptions, waitpid};

use super::arguments::{Front, Global};
use super::{console, member, pid_file, state_root};
use crate::hooks;
use crate::host::{self, Fork};
use crate::launch::{Launch, StandIn};
use crate::pod::Io;
use crate::process::signals::Signals;
use crate::process::stdio::Inherited;
use crate::sandbox::probe;
use crate::state::{Journal, Record, StateDir, StateRoot, Status};
use crate::supervise::{self, Mode, Outside, Report};
use crate::timings::Timings;
use crate::watcher;

/// Makes the container; it waits to be started when this returns.
///
/// # Errors
/// Why it was not made; nothing is left of it then.
pub fn make(global: &Global, launch: &Launch, front: &Front) -> anyhow::Result<()> {
    if front.preserve_fds > 0 {
        bail!("--preserve-fds: descriptors of the host mean nothing in a guest with a kernel of its own");
    }
    let root = state_root(global)?;
    if let Some(pod) = &launch.pod {
        return member::make(&root, launch, pod, front);
    }
    let console = console::open(front.console_socket.as_deref(), launch.plan.terminal)?;
    let copy = |slave: &OwnedFd| slave.try_clone().context("cannot duplicate the terminal");
    let slave = console.as_ref().map(|console| copy(&console.slave)).transpose()?;
    let state = root.claim(&launch.id)?;
    let stand_in = launch.start_stand_in(slave.as_ref().map(copy).transpose()?)?;
    let pid = stand_in.pid;
    let record = launch.recorded(pid);
    let hooks = record.hooks.as_ref();
    let told = record.for_hooks(Status::Creating);
    // After a failure the stand-in ends with its link.
    hooks::run_before(hooks, &told)?;
    let (report, reported) = supervise::report().context("cannot make a pipe")?;
    match host::fork().context("cannot make the sandbox process")? {
        Fork::Child => {
            drop((console, reported));
            host::exit_now(sandbox(&root, launch, Made { state, record, stand_in, slave, report }));
        }
        Fork::Parent(sandbox) => {
            // Its share of the lock is the sandbox process' alone from here on.
            state.disown();
            drop((stand_in, report, slave));
            if let Err(reason) = reported.wait() {
                // It ends by itself; the stand-in with it.
                for child in [sandbox, pid] {
                    waitpid(Some(child), WaitOptions::empty()).context("cannot wait for the sandbox process")?;
                }
                bail!(reason);
            }
            let told = console.map_or(Ok(()), console::Console::send).and_then(|()| match &front.pid_file {
                Some(path) => pid_file::write(path, pid.as_raw_nonzero().get()),
                None => Ok(()),
            });
            if let Err(error) = told {
                // Nobody knows of the container: it must not stay.
                super::delete::by_force(&root, &launch.id)?;
                return Err(error);
            }
            Ok(())
        }
    }
}

struct Made {
    state: StateDir,
    record: Record,
    stand_in: StandIn,
    slave: Option<OwnedFd>,
    report: Report,
}

/// The sandbox process; its exit code, which nobody reads.
fn sandbox(root: &StateRoot, launch: &Launch, front: Made) -> u8 {
    host::set_process_name(c"katavm-sandbox");
    match run(root, launch, front) {
        Ok(()) => 0,
        Err(error) => {
            log::error!("{error:#}");
            1
        }
    }
}

fn run(root: &StateRoot, launch: &Launch, front: Made) -> anyhow::Result<()> {
    let Made { state, mut record, stand_in, slave, report } = front;
    let prepared = move || -> anyhow::Result<_> {
        let io = match slave {
            Some(slave) => Io::over_terminal(slave, launch.console_size())?,
            None => Io::plain(Inherited::take().context("cannot duplicate the standard streams")?),
        };
        host::let_go_of_streams().context("cannot open /dev/null")?;
        host::close_inherited();
        // A session of its own: no terminal's signals, and no share in the engine's process group.
        rustix::process::setsid().context("cannot make a session")?;
        rustix::process::chdir("/").context("cannot change to /")?;
        let signals = Signals::block()?;
        let watcher = watcher::start(root)?;
        let directory = state.path().to_owned();
        record.sandbox_pid = std::process::id();
        let pid = record.pid;
        let journal = Journal::new(state, record);
        launch.enter_cgroup(pid)?;
        probe::ensure(root)?;
        Ok((Outside { io: Some(io), stand_in, signals, journal, directory }, watcher))
    };
    let mut timings = Timings::start();
    match prepared() {
        Ok((outside, _watcher)) => {
            supervise::supervise(launch, outside, Mode::Background(report), &mut timings)?;
            Ok(())
        }
        Err(error) => {
            report.tell(Err(format!("{error:#}")));
            Err(error)
        }
    }
}
