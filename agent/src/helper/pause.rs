//! The first process of the pid namespace that a pod's containers share where none of them is the pod's first: it inherits
//! their orphans, and does nothing else.

use std::convert::Infallible;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::unistd::{ForkResult, Gid, Uid, chdir, chroot, fork, pause, setgroups, setresgid, setresuid};

use crate::error::Error;

/// What it is called by: as Kubernetes' own is.
const NAME: &str = "/pause";
/// All that it sees of the guest's files.
const ROOT: &str = "/run/katavm/empty";
/// It is nobody.
const NOBODY: u32 = 65534;

/// Whether the binary was executed by this name.
#[must_use]
pub fn is_pause(name: &Path) -> bool {
    name == Path::new(NAME)
}

/// Makes it; its pid.
///
/// # Errors
/// Why it could not be made.
pub fn make() -> Result<i32, Error> {
    let failed = |what: &'static str| move |error: nix::Error| Error::io(what, error.into());
    unshare(CloneFlags::CLONE_NEWPID).map_err(failed("cannot make a pid namespace"))?;
    let (mut read, mut write) = io::pipe().map_err(|error| Error::io("pipe", error))?;
    // SAFETY: this process has one thread.
    match unsafe { fork() }.map_err(failed("cannot fork"))? {
        ForkResult::Child => {
            // It executes anew: nothing of this process' memory is for containers, which may look into it.
            let error = Command::new("/proc/self/exe").arg0(NAME).env_clear().stdin(Stdio::null()).exec();
            let _ = write!(write, "{error}");
            // SAFETY: _exit runs nothing of this process any more, as is right in a forked child.
            unsafe { libc::_exit(127) }
        }
        ForkResult::Parent { child } => {
            drop(write);
            let mut error = String::new();
            // The pipe closes when it executes.
            read.read_to_string(&mut error).map_err(|error| Error::io("cannot wait for the first process", error))?;
            if error.is_empty() {
                Ok(child.as_raw())
            } else {
                Err(Error::Internal(format!("the first process: {error}")))
            }
        }
    }
}

/// Is it; the status to exit with.
#[must_use]
pub fn run() -> i32 {
    match wait() {
        Ok(never) => match never {},
        Err(error) => {
            crate::error!("the first process of a pod's pid namespace: {error}");
            1
        }
    }
}

fn wait() -> io::Result<Infallible> {
    let name = File::create("/proc/self/comm").and_then(|mut comm| comm.write_all(b"pause"));
    fs::create_dir_all(ROOT)?;
    chroot(ROOT)?;
    chdir("/")?;
    setgroups(&[])?;
    let (user, group) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
    setresgid(group, group, group)?;
    setresuid(user, user, user)?;
    // The kernel reaps then (wait(2), "NOTES").
    let ignore = SigAction::new(SigHandler::SigIgn, SaFlags::SA_NOCLDWAIT, SigSet::empty());
    // SAFETY: ignoring runs no code of this process.
    unsafe { sigaction(Signal::SIGCHLD, &ignore) }?;
    // A name is nice to have only.
    drop(name);
    loop {
        pause();
    }
}
