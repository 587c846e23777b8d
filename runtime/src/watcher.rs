//! The watcher: a small second process that cleans up after the sandbox process, however that dies.
//!
//! It is forked before the sandbox process has threads, a virtual machine, or anything in the state directory: it
//! shares nothing with it, and there is no moment at which something of it exists without a watcher.
//! It waits on a pidfd of the sandbox process; a byte on a pipe tells it that nothing is left to do.
//! If it is killed itself, the sandbox process cleans up as always; if both are, the next `katavm` command does.

use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::Pid;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};

use crate::host;
use crate::state::StateRoot;

/// How long an orderly end waits for the watcher, which has nothing left to do but end.
const PATIENCE: Duration = Duration::from_secs(1);

/// Why there is no watcher.
#[derive(Debug, thiserror::Error)]
#[error("cannot start the watcher process: {0}")]
pub struct WatcherError(#[from] io::Error);

/// The sandbox process' end. Dropping it ends the watcher.
pub struct Watcher {
    pid: Pid,
    pipe: PipeWriter,
}

/// Forks the watcher, which ends when the sandbox process has ended. Returns in the sandbox process only. An id is to be
/// claimed from `root` only after.
///
/// # Errors
/// Those of pidfd_open(2), pipe2(2) and fork(2).
pub fn start(root: &StateRoot) -> Result<Watcher, WatcherError> {
    let sandbox = host::pidfd_of_self()?;
    let (reader, writer) = io::pipe()?;
    let terminal = Terminal::of_stdin();
    match host::fork_ignoring_signals()? {
        host::Fork::Parent(pid) => Ok(Watcher { pid, pipe: writer }),
        host::Fork::Child => {
            drop(writer);
            host::set_process_name(c"katavm-watcher");
            // The log's descriptor is closed below, and its number may be given to another file.
            log::set_max_level(log::LevelFilter::Off);
            let mut kept = vec![sandbox.as_fd(), reader.as_fd()];
            kept.extend(terminal.as_ref().map(|terminal| terminal.fd.as_fd()));
            host::detach(&kept);
            // Waiting takes next to none of it.
            let _ = host::let_go_of_code();
            if watch(&sandbox, reader) == End::Unannounced {
                if let Some(terminal) = terminal {
                    terminal.restore();
                }
                // Whatever has no living owner any more is the sandbox process'. There is nobody to tell of a
                // failure; the next command tries again.
                let _ = root.sweep();
            }
            host::exit_now(0)
        }
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        // One that was killed cannot be told; it needs not.
        let _ = self.pipe.write_all(b"e");
        if let Err(error) = host::kill_and_reap(self.pid, PATIENCE) {
            log::debug!("the watcher: {error}");
        }
    }
}

#[derive(PartialEq, Eq)]
enum End {
    Announced,
    Unannounced,
}

fn watch(sandbox: &OwnedFd, mut pipe: PipeReader) -> End {
    let mut open = true;
    loop {
        let mut fds = vec![PollFd::new(sandbox, PollFlags::IN)];
        if open {
            fds.push(PollFd::new(&pipe, PollFlags::IN));
        }
        if poll(&mut fds, None).is_err() {
            continue;
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        // The announcement first: it was sent before the end.
        if ready.get(1) == Some(&true) {
            match pipe.read(&mut [0]) {
                Ok(1) => return End::Announced,
                _ => open = false,
            }
        } else if ready.first() == Some(&true) {
            return End::Unannounced;
        }
    }
}

/// The terminal as it was before the sandbox process changed its mode.
struct Terminal {
    fd: OwnedFd,
    mode: Termios,
}

impl Terminal {
    fn of_stdin() -> Option<Self> {
        let stdin = io::stdin();
        if !isatty(&stdin) {
            return None;
        }
        let mode = tcgetattr(&stdin).ok()?;
        // Above the standard streams, which become /dev/null.
        let fd = rustix::io::fcntl_dupfd_cloexec(&stdin, 3).ok()?;
        Some(Self { fd, mode })
    }

    fn restore(self) {
        // The terminal may be gone as well.
        let _ = tcsetattr(&self.fd, OptionalActions::Now, &self.mode);
    }
}
