//! Processes and signals.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::sys::signal::{SigHandler, Signal, signal};
use nix::unistd::ForkResult;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, WaitOptions, getpid, pidfd_open, pidfd_send_signal, waitpid};

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
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::other("a process with several threads must not fork"));
    }
    // SAFETY: there is no other thread whose locks the child could find taken.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => {
            let pid = Pid::from_raw(child.as_raw()).ok_or_else(|| io::Error::other("fork(2) gave the pid 0"))?;
            Ok(Fork::Parent(pid))
        }
        ForkResult::Child => Ok(Fork::Child),
    }
}

/// A descriptor of this process that is readable when it has ended (pidfd_open(2)).
///
/// # Errors
/// Those of pidfd_open(2).
pub fn pidfd_of_self() -> io::Result<OwnedFd> {
    Ok(pidfd_open(getpid(), PidfdFlags::empty())?)
}

/// Ignores every signal that can be ignored.
pub fn ignore_all_signals() {
    for number in Signal::iterator() {
        // SAFETY: ignoring runs no code of ours. SIGKILL and SIGSTOP give an error, as they must.
        let _ = unsafe { signal(number, SigHandler::SigIgn) };
    }
}

/// Names the calling thread (prctl(2), `PR_SET_NAME`): at most 15 bytes.
pub fn set_process_name(name: &std::ffi::CStr) {
    // A name is for people only; nothing depends on it.
    let _ = rustix::thread::set_name(name);
}

/// Waits for a child for at most `patience`, kills it then, and takes its exit status away.
///
/// # Errors
/// Those of pidfd_open(2), poll(2) and waitpid(2).
pub fn kill_and_reap(pid: Pid, patience: Duration) -> io::Result<()> {
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    let timeout = Timespec { tv_sec: patience.as_secs().cast_signed(), tv_nsec: patience.subsec_nanos().into() };
    let mut fds = [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
    if poll(&mut fds, Some(&timeout)).unwrap_or(0) == 0 {
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
