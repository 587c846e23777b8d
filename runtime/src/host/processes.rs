//! Processes and signals.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Output};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, signal};
use nix::unistd::ForkResult;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, WaitOptions, getpid, pidfd_open, pidfd_send_signal, waitpid};

use super::children;

/// On which side of a fork this is.
pub enum Fork {
    /// The caller, with its child.
    Parent(Pid),
    /// The child.
    Child,
}

/// Forks this process, which must have one thread only.
///
/// # Errors
/// Those of fork(2), and `Other` when the process has more than one thread.
pub fn fork() -> io::Result<Fork> {
    expect_one_thread()?;
    // SAFETY: there is no other thread whose locks the child could find taken.
    noted(|| match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => {
            let pid = Pid::from_raw(child.as_raw()).ok_or_else(|| io::Error::other("fork(2) gave the pid 0"))?;
            Ok(Fork::Parent(pid))
        }
        ForkResult::Child => Ok(Fork::Child),
    })
}

fn noted(fork: impl FnOnce() -> io::Result<Fork>) -> io::Result<Fork> {
    children::note(fork, |side| match side {
        Fork::Parent(child) => Some(*child),
        Fork::Child => None,
    })
}

/// Forks like [`fork`], the child being the first process of a pid namespace of its own (`CLONE_NEWPID`).
///
/// By clone(2) and not by unshare(2), the way back from which takes a right in the pid namespace that this process is
/// in: root of a user namespace has none.
///
/// # Errors
/// Those of clone(2), `EPERM` without CAP_SYS_ADMIN; `Other` when the process has more than one thread.
pub fn fork_into_pid_namespace() -> io::Result<Fork> {
    expect_one_thread()?;
    let flags = libc::CLONE_NEWPID | libc::SIGCHLD;
    noted(|| {
        // SAFETY: without CLONE_VM and a stack it is fork(2), with zeroes for the ids that are not asked for; there is no
        // other thread whose locks the child could find taken, and nothing here has registered what is to run at a fork.
        let pid = Errno::result(unsafe { libc::syscall(libc::SYS_clone, libc::c_long::from(flags), 0, 0, 0, 0) })?;
        Ok(match i32::try_from(pid).ok().and_then(Pid::from_raw) {
            Some(child) => Fork::Parent(child),
            None => Fork::Child,
        })
    })
}

fn expect_one_thread() -> io::Result<()> {
    match std::fs::read_dir("/proc/self/task")?.count() {
        1 => Ok(()),
        _ => Err(io::Error::other("a process with several threads must not fork")),
    }
}

/// A descriptor of this process that is readable when it has ended (pidfd_open(2)).
///
/// # Errors
/// Those of pidfd_open(2).
pub fn pidfd_of_self() -> io::Result<OwnedFd> {
    Ok(pidfd_open(getpid(), PidfdFlags::empty())?)
}

/// Forks like [`fork`]; the child ignores every signal that can be ignored, from its first moment.
///
/// # Errors
/// Those of sigprocmask(2) and of [`fork`].
pub fn fork_ignoring_signals() -> io::Result<Fork> {
    // What comes to the child before it ignores signals waits, and is dropped when it does.
    let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
    let forked = fork();
    if matches!(forked, Ok(Fork::Child)) {
        for number in Signal::iterator() {
            // SAFETY: ignoring runs no code of ours. SIGKILL and SIGSTOP give an error, as they must.
            let _ = unsafe { signal(number, SigHandler::SigIgn) };
        }
    }
    before.thread_set_mask()?;
    forked
}

/// Lets go of everything that belongs to the user of the process that forked this one: session, directory, standard
/// streams, and all descriptors but these.
pub fn detach(kept: &[BorrowedFd<'_>]) {
    // It leads no group yet, so this cannot fail; staying in the session would only mean more signals to ignore.
    let _ = rustix::process::setsid();
    let _ = rustix::process::chdir("/");
    // Without /dev/null the streams stay as they are: nothing reads or writes them.
    let _ = let_go_of_streams();
    let mut kept: Vec<_> = kept.iter().map(AsRawFd::as_raw_fd).collect();
    kept.sort_unstable();
    let mut first = 3;
    for fd in kept {
        close_range(first, fd - 1);
        first = fd + 1;
    }
    close_range(first, i32::MAX);
}

/// Makes the standard streams lead nowhere.
///
/// # Errors
/// When /dev/null cannot be opened.
pub fn let_go_of_streams() -> io::Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    Ok(())
}

/// The descriptors above the standard streams that this process was started with.
static INHERITED: std::sync::OnceLock<Vec<i32>> = std::sync::OnceLock::new();

/// Notes which descriptors this process was started with: call it first of all.
pub fn note_inherited() {
    let list = std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let numbers: Vec<_> = list.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok()).collect();
    // The directory's own descriptor is in its list, and closed by now.
    let open = numbers.into_iter().filter(|fd| *fd > 2 && rustix::io::fcntl_getfd(borrow(*fd)).is_ok()).collect();
    // Noted once only.
    let _ = INHERITED.set(open);
}

fn borrow<'a>(fd: i32) -> BorrowedFd<'a> {
    // SAFETY: it is only asked whether it is open, which no number can upset.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

/// Closes the descriptors that this process was started with, standard streams apart: a process that stays must
/// not hold somebody's pipe open.
pub fn close_inherited() {
    for fd in INHERITED.get().into_iter().flatten() {
        close_range(*fd, *fd);
    }
}

fn close_range(first: i32, last: i32) {
    if let (Ok(first), Ok(last)) = (libc::c_uint::try_from(first), libc::c_uint::try_from(last))
        && first <= last
    {
        // SAFETY: no descriptor of the range is used again: a forked child that detaches uses those that it keeps
        // and ends by `exit_now`, and nothing in this process owns what it was started with. close_range(2) takes
        // no pointer; where it is missing they stay open.
        unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    }
}

/// Ends a forked child (_exit(2)): nothing that its stack inherited is dropped, as it all belongs to the parent.
pub fn exit_now(code: u8) -> ! {
    // SAFETY: it ends the process and touches no memory.
    unsafe { libc::_exit(code.into()) }
}

/// Names the calling thread (prctl(2), `PR_SET_NAME`): at most 15 bytes.
pub fn set_process_name(name: &std::ffi::CStr) {
    // A name is for people only; nothing depends on it.
    let _ = rustix::thread::set_name(name);
}

/// Waits for the end of a process that may be nobody's child here, for at most `patience`; whether it has ended.
///
/// # Errors
/// Those of pidfd_open(2) and poll(2).
pub fn wait_for_end(pid: u32, patience: Duration) -> io::Result<bool> {
    let Some(pidfd) = pidfd_of(pid)? else { return Ok(true) };
    ends_within(&pidfd, patience)
}

/// Kills a process (SIGKILL); that there is none is no error.
///
/// # Errors
/// Those of pidfd_open(2) and pidfd_send_signal(2).
pub fn kill(pid: u32) -> io::Result<()> {
    match pidfd_of(pid)?.map(|pidfd| pidfd_send_signal(&pidfd, rustix::process::Signal::KILL)) {
        None | Some(Ok(()) | Err(rustix::io::Errno::SRCH)) => Ok(()),
        Some(Err(error)) => Err(error.into()),
    }
}

/// Kills a process (SIGKILL) if it runs a program whose name begins so; that there is none is no error.
///
/// # Errors
/// As [`kill`].
pub fn kill_program(pid: u32, name: &str) -> io::Result<()> {
    match std::fs::read_to_string(format!("/proc/{pid}/comm")) {
        Ok(comm) if comm.starts_with(name) => kill(pid),
        _ => Ok(()),
    }
}

/// Runs a program to its end, which finds a descriptor by the number that `option` tells it; what it said.
///
/// # Errors
/// Those of starting it and of reading what it says.
pub fn run_with_descriptor(command: &mut Command, option: &str, fd: OwnedFd) -> io::Result<Output> {
    let number = fd.as_raw_fd();
    command.arg(option).arg(number.to_string());
    // SAFETY: between fork and exec only fcntl(2) is called, which is safe there, on a descriptor that is open until
    // this function returns.
    unsafe {
        command.pre_exec(move || Ok(rustix::io::fcntl_setfd(borrow(number), rustix::io::FdFlags::empty())?));
    }
    let output = children::output(command);
    drop(fd);
    output
}

fn pidfd_of(pid: u32) -> io::Result<Option<OwnedFd>> {
    let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
    match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => Ok(Some(pidfd)),
        Err(rustix::io::Errno::SRCH) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn ends_within(pidfd: &OwnedFd, patience: Duration) -> io::Result<bool> {
    let timeout = Timespec { tv_sec: patience.as_secs().cast_signed(), tv_nsec: patience.subsec_nanos().into() };
    let mut fds = [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
    Ok(poll(&mut fds, Some(&timeout))? > 0)
}

/// Waits for a child for at most `patience`, kills it then, and takes its exit status away.
///
/// # Errors
/// Those of pidfd_open(2), poll(2) and waitpid(2).
pub fn kill_and_reap(pid: Pid, patience: Duration) -> io::Result<()> {
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    if !ends_within(&pidfd, patience).unwrap_or(false) {
        // One that ended just now needs no signal.
        let _ = pidfd_send_signal(&pidfd, rustix::process::Signal::KILL);
    }
    waitpid(Some(pid), WaitOptions::empty())?;
    Ok(())
}

/// When this process was made, in nanoseconds of CLOCK_BOOTTIME; exact to a hundredth of a second, as
/// /proc/self/stat counts in clock ticks. `None` when /proc does not tell.
#[must_use]
pub fn start_time_ns() -> Option<u64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The name in parentheses may hold anything; field 22 is the 20th after it (proc_pid_stat(5)).
    let ticks: u64 = stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()?;
    let per_second = rustix::param::clock_ticks_per_second();
    ticks.checked_mul(1_000_000_000)?.checked_div(per_second)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_lies_in_the_near_past() {
        let now = katavm_vmm::now();
        let start = start_time_ns().unwrap();
        assert!(start <= now && now - start < 3_600_000_000_000, "{start} {now}");
    }

    #[test]
    fn a_threaded_process_does_not_fork() {
        // The test harness has more threads than one.
        let other = std::thread::spawn(|| fork().err().map(|error| error.to_string()));
        let error = other.join().unwrap().unwrap();
        assert!(error.contains("several threads"), "{error}");
    }
}
