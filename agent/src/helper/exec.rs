//! A further process of a container: enters what the first one lives in, and becomes what was asked for.
//!
//! libcontainer's own way (a "tenant") starts the process at once and leaves the container's seccomp profile out, so
//! this is not by it; its parts for capabilities and seccomp serve here too.

use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use libcontainer::capabilities::{drop_privileges, reset_effective};
use libcontainer::seccomp::initialize_seccomp;
use libcontainer::syscall::syscall::{Syscall, SyscallType};
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{ForkResult, Gid, Uid, fork, pipe};
use oci_spec::runtime::{LinuxNamespaceType, Spec};

use super::report::{self, Report};
use super::{ExecTask, cwd, lookup::words, program};
use crate::error::Error;

/// Makes the process, which waits to be started; its pid.
///
/// # Errors
/// Why it could not be made.
pub fn run(directory: &Path, task: ExecTask) -> Result<i32, Error> {
    let above = directory.parent().unwrap_or(directory);
    let spec = Spec::load(above.join("config.json")).map_err(|error| Error::Internal(error.to_string()))?;
    let notify = UnixListener::bind(directory.join("notify.sock"))
        .map_err(|error| Error::io("cannot listen for the start", error))?;
    let console = task.console.as_ref().map(UnixStream::connect).transpose();
    let console = console.map_err(|error| Error::io("cannot connect the terminal", error))?;
    let failed = |what: &'static str| move |error: io::Error| Error::io(what, error);
    fs::write(task.cgroup.join("cgroup.procs"), "0").map_err(failed("cannot enter the container's cgroup"))?;
    if let Some(score) = task.process.oom_score_adj() {
        fs::write("/proc/self/oom_score_adj", score.to_string()).map_err(failed("cannot set oom_score_adj"))?;
    }
    let syscall = SyscallType::Linux.create_syscall();
    for limit in task.process.rlimits().iter().flatten() {
        syscall.set_rlimit(limit).map_err(|error| Error::Invalid(format!("cannot set {limit:?}: {error}")))?;
    }
    // The namespaces are not to be looked into through this process.
    nix::sys::prctl::set_dumpable(false).map_err(|error| Error::io("cannot be undumpable", error.into()))?;
    enter(&spec, &task)?;
    let (read, write) = pipe().map_err(|error| Error::io("pipe", error.into()))?;
    // SAFETY: this process has one thread.
    match unsafe { fork() }.map_err(|error| Error::io("cannot fork", error.into()))? {
        ForkResult::Child => {
            drop(read);
            let error = become_it(&spec, &task, &*syscall, console, &notify, &write);
            // Before the pipe ends: its reader looks for the report then.
            report::write(&Report::Failed { error });
            // SAFETY: _exit runs nothing of this process any more, as is right in a forked child.
            unsafe { libc::_exit(127) }
        }
        ForkResult::Parent { child } => {
            drop(write);
            // One byte when it is ready; end of file without it when it has failed, and reported why.
            let ready = fs::File::from(read).read(&mut [0]).map_err(failed("cannot wait for the process"))?;
            if ready == 0 {
                return Err(Error::Internal("the process ended before it was ready".into()));
            }
            Ok(child.as_raw())
        }
    }
}

/// Enters the namespaces that the container has of its own.
fn enter(spec: &Spec, task: &ExecTask) -> Result<(), Error> {
    // SAFETY: pidfd_open(2) takes no pointer.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, task.init, 0) });
    let fd = fd.map_err(|_| Error::State("the container is not running".into()))?;
    // SAFETY: pidfd_open just made this descriptor, and nothing else owns it.
    let pidfd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    // Whoever has this pid by now, its cgroup tells whether it is the container's.
    let group = fs::read_to_string(format!("/proc/{}/cgroup", task.init)).unwrap_or_default();
    let expected = spec.linux().as_ref().and_then(|linux| linux.cgroups_path().as_ref()).map(|p| p.display());
    let inside = expected.is_some_and(|path| {
        group
            .lines()
            .any(|line| line.strip_prefix("0::").is_some_and(|found| Path::new(found).starts_with(path.to_string())))
    });
    if !inside {
        return Err(Error::State("the container is not running".into()));
    }
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_deref()).unwrap_or_default();
    let flags = namespaces.iter().fold(CloneFlags::empty(), |flags, namespace| flags | flag(namespace.typ()));
    setns(&pidfd, flags).map_err(|error| Error::io("cannot enter the container's namespaces", error.into()))?;
    if flags.contains(CloneFlags::CLONE_NEWUSER) {
        // Root of the container: what follows takes its privileges.
        let root = nix::unistd::setgid(Gid::from_raw(0)).and_then(|()| nix::unistd::setuid(Uid::from_raw(0)));
        root.map_err(|error| Error::io("cannot become root of the container", error.into()))?;
    }
    Ok(())
}

fn flag(kind: LinuxNamespaceType) -> CloneFlags {
    match kind {
        LinuxNamespaceType::Mount => CloneFlags::CLONE_NEWNS,
        LinuxNamespaceType::Cgroup => CloneFlags::CLONE_NEWCGROUP,
        LinuxNamespaceType::Uts => CloneFlags::CLONE_NEWUTS,
        LinuxNamespaceType::Ipc => CloneFlags::CLONE_NEWIPC,
        LinuxNamespaceType::User => CloneFlags::CLONE_NEWUSER,
        LinuxNamespaceType::Pid => CloneFlags::CLONE_NEWPID,
        LinuxNamespaceType::Network => CloneFlags::CLONE_NEWNET,
        LinuxNamespaceType::Time => CloneFlags::from_bits_retain(libc::CLONE_NEWTIME),
    }
}

/// In the child: takes on everything that the process is to have, waits for the start and executes the program.
fn become_it(
    spec: &Spec,
    task: &ExecTask,
    syscall: &dyn Syscall,
    console: Option<UnixStream>,
    notify: &UnixListener,
    ready: &OwnedFd,
) -> Error {
    let process = &task.process;
    let prepared = || -> Result<(), Error> {
        let failed = |what: &'static str| move |errno: Errno| Error::io(what, errno.into());
        nix::unistd::setsid().map_err(failed("setsid"))?;
        if let Some(console) = console {
            terminal(&console).map_err(|error| Error::io("cannot open a terminal in the container", error))?;
        }
        if let Some(mask) = process.user().umask() {
            umask(Mode::from_bits_truncate(mask));
        }
        let directory = process.cwd();
        // Once as root of the container and, where root may not (a user's own file system), once as the user.
        let entered = nix::unistd::chdir(directory);
        let gids: Vec<Gid> = process.user().additional_gids().iter().flatten().map(|gid| Gid::from_raw(*gid)).collect();
        if !gids.is_empty() {
            nix::unistd::setgroups(&gids).map_err(failed("cannot set the additional groups"))?;
        }
        let (uid, gid) = (Uid::from_raw(process.user().uid()), Gid::from_raw(process.user().gid()));
        if process.no_new_privileges() == Some(true) {
            nix::sys::prctl::set_no_new_privs().map_err(failed("no_new_privs"))?;
        }
        // The capabilities that are to stay are chosen below.
        nix::sys::prctl::set_keepcaps(true).map_err(failed("keepcaps"))?;
        nix::unistd::setresgid(gid, gid, gid).map_err(failed("cannot become the group"))?;
        nix::unistd::setresuid(uid, uid, uid).map_err(failed("cannot become the user"))?;
        entered
            .or_else(|_| nix::unistd::chdir(directory))
            .map_err(|errno| cwd::failure(&directory.display().to_string(), &words(Some(errno as i32))))?;
        std::env::current_dir()
            .map_err(|error| Error::io("the working directory is outside of the container", error))?;
        // Loading a filter takes a privilege, unless new ones are ruled out.
        let seccomp = spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref());
        let late = process.no_new_privileges() == Some(true);
        let load = || match seccomp {
            Some(seccomp) => initialize_seccomp(seccomp).map(drop).map_err(|error| Error::Internal(error.to_string())),
            None => Ok(()),
        };
        let privileges = |error| Error::Internal(format!("cannot set the capabilities: {error}"));
        syscall.close_range(0).map_err(|error| Error::Internal(error.to_string()))?;
        reset_effective(syscall).map_err(privileges)?;
        if !late {
            load()?;
        }
        if let Some(capabilities) = process.capabilities() {
            drop_privileges(capabilities, syscall).map_err(privileges)?;
        }
        if late {
            load()?;
        }
        program::program(process).map(drop)
    };
    if let Err(error) = prepared() {
        return error;
    }
    let home = program::home(process.user().uid());
    if let Err(errno) = nix::unistd::write(ready, &[1]) {
        return Error::io("cannot say that the process is ready", errno.into());
    }
    let started = notify.accept().and_then(|(mut start, _)| start.read_to_end(&mut Vec::new()));
    if let Err(error) = started {
        return Error::io("cannot wait for the start", error);
    }
    program::execute(process, Some(home))
}

/// Makes a terminal of the container this process' own, and sends its master to the agent.
fn terminal(console: &UnixStream) -> io::Result<()> {
    use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};
    let pair = nix::pty::openpty(None, None)?;
    let fds = [pair.master.as_raw_fd()];
    let (name, rights) = ([io::IoSlice::new(b"terminal")], [ControlMessage::ScmRights(&fds)]);
    sendmsg::<UnixAddr>(console.as_raw_fd(), &name, &rights, MsgFlags::empty(), None)?;
    // SAFETY: TIOCSCTTY takes a number.
    Errno::result(unsafe { libc::ioctl(pair.slave.as_raw_fd(), libc::TIOCSCTTY, 0) })?;
    nix::unistd::dup2_stdin(pair.slave.as_fd())?;
    nix::unistd::dup2_stdout(pair.slave.as_fd())?;
    nix::unistd::dup2_stderr(pair.slave.as_fd())?;
    Ok(())
}
