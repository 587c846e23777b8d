//! Reaping: PID 1 collects every process that ends, and tells whoever waits for one of them.
//!
//! A pid is free to be used again once it is reaped, so signals are sent under the lock that reaping takes: a recycled
//! pid is never signalled.

use std::collections::HashMap;
use std::sync::Mutex;

use nix::errno::Errno;
use nix::sys::signal::{SigHandler, Signal};

use crate::clock;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// WEXITSTATUS, or 128 + the number of the signal.
    pub status: u32,
    /// CLOCK_REALTIME, nanoseconds since the epoch.
    pub at_ns: u64,
}

type OnEnd = Box<dyn FnOnce(Ended) + Send>;

#[derive(Default)]
struct Table {
    awaited: HashMap<i32, OnEnd>,
    /// Ended before anybody said that they wait; kept while somebody may still say so.
    unclaimed: HashMap<i32, Ended>,
    births: usize,
}

/// The table of awaited processes.
#[derive(Default)]
pub struct Reaper {
    table: Mutex<Table>,
}

/// Somebody is making processes: while it lives, the end of an unknown process is kept for [`Reaper::await_end`].
pub struct Birth<'a>(&'a Reaper);

impl Drop for Birth<'_> {
    fn drop(&mut self) {
        let mut table = crate::lock(&self.0.table);
        table.births -= 1;
        if table.births == 0 {
            table.unclaimed.clear();
        }
    }
}

impl Reaper {
    /// To be held from before a process is made until [`Reaper::await_end`] was called for it.
    pub fn birth(&self) -> Birth<'_> {
        crate::lock(&self.table).births += 1;
        Birth(self)
    }

    /// Calls `on_end` once, when `pid` has ended: at once if it already has. Calls are made in the order of reaping.
    pub fn await_end(&self, _birth: &Birth<'_>, pid: i32, on_end: impl FnOnce(Ended) + Send + 'static) {
        let mut table = crate::lock(&self.table);
        if let Some(ended) = table.unclaimed.remove(&pid) {
            drop(table);
            on_end(ended);
        } else {
            table.awaited.insert(pid, Box::new(on_end));
        }
    }

    /// Sends a signal to an awaited process. Real-time signals as well, so the number is raw.
    ///
    /// # Errors
    /// `ESRCH` when the process has ended, `EINVAL` when there is no such signal.
    pub fn signal(&self, pid: i32, signal: i32) -> Result<(), Errno> {
        let table = crate::lock(&self.table);
        if !table.awaited.contains_key(&pid) {
            return Err(Errno::ESRCH);
        }
        // SAFETY: kill(2) takes no pointer; the lock keeps the pid from being reaped and thus from being recycled.
        Errno::result(unsafe { libc::kill(pid, signal) }).map(drop)
    }

    /// Reaps everything that has ended so far. To be called after each SIGCHLD, by one caller only.
    pub fn reap(&self) {
        while let Some(pid) = next_ended() {
            let mut table = crate::lock(&self.table);
            let Some(ended) = collect(pid) else { continue };
            match table.awaited.remove(&pid) {
                Some(on_end) => {
                    drop(table);
                    on_end(ended);
                }
                None if table.births > 0 => drop(table.unclaimed.insert(pid, ended)),
                None => {}
            }
        }
    }
}

/// A child that has ended and is not reaped yet.
fn next_ended() -> Option<i32> {
    // SAFETY: siginfo_t is plain data; all zeroes is a value of it.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: `info` lives throughout the call.
    let result = unsafe { libc::waitid(libc::P_ALL, 0, &mut info, libc::WEXITED | libc::WNOHANG | libc::WNOWAIT) };
    // SAFETY: waitid either filled in a SIGCHLD siginfo or left the zeroes.
    let pid = unsafe { info.si_pid() };
    (result == 0 && pid > 0).then_some(pid)
}

fn collect(pid: i32) -> Option<Ended> {
    let mut status = 0;
    // SAFETY: `status` lives throughout the call.
    let reaped = unsafe { libc::waitpid(pid, &mut status, libc::WNOHANG | libc::__WALL) };
    if reaped != pid {
        return None;
    }
    let status = if libc::WIFSIGNALED(status) { 128 + libc::WTERMSIG(status) } else { libc::WEXITSTATUS(status) };
    Some(Ended { status: status.unsigned_abs(), at_ns: clock::now_ns() })
}

/// Writing to a closed connection is an error of that write, not the end of PID 1.
pub fn ignore_sigpipe() {
    // SAFETY: SIG_IGN runs no handler.
    let _ = unsafe { nix::sys::signal::signal(Signal::SIGPIPE, SigHandler::SigIgn) };
}
