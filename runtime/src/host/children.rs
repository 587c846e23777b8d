//! The children of this process: those that it made, and orphans that come to it as a sub-reaper.
//!
//! Who has made a child waits for it. For an orphan nobody does, so all that tells the two apart is a list of what was made.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

use nix::sys::signal::SigSet;
use rustix::process::{Pid, WaitId, WaitIdOptions, WaitOptions, getpid, set_child_subreaper, waitid, waitpid};

/// What this process made and may not have waited for. `None` while it is no sub-reaper.
static MADE: Mutex<Option<BTreeSet<i32>>> = Mutex::new(None);

/// Orphans were to be reaped while a child was made: whoever made it does that then.
static OWED: AtomicBool = AtomicBool::new(false);

fn made() -> MutexGuard<'static, Option<BTreeSet<i32>>> {
    MADE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes a child, and puts it on the list before it can be taken for an orphan.
pub(super) fn note<T>(make: impl FnOnce() -> io::Result<T>, pid: impl FnOnce(&T) -> Option<Pid>) -> io::Result<T> {
    let mut list = made();
    let child = make();
    if let (Some(made), Ok(child)) = (list.as_mut(), &child) {
        made.extend(pid(child).map(Pid::as_raw_pid));
    }
    drop(list);
    if OWED.load(Ordering::SeqCst)
        && let Err(error) = reap_orphans()
    {
        log::warn!("cannot look for orphans: {error}");
    }
    child
}

/// Starts a program, with no signal blocked, whatever this process blocks for itself. The caller is to wait for it.
///
/// # Errors
/// Those of starting it.
pub fn spawn(command: &mut Command) -> io::Result<Child> {
    // SAFETY: between fork and exec only pthread_sigmask(3) is called, which is safe there (signal-safety(7)).
    unsafe { command.pre_exec(|| Ok(SigSet::empty().thread_set_mask()?)) };
    note(|| command.spawn(), |child| Some(Pid::from_child(child)))
}

/// Runs a program to its end; what it said.
///
/// # Errors
/// Those of starting it and of reading what it says.
pub fn output(command: &mut Command) -> io::Result<Output> {
    spawn(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()))?.wait_with_output()
}

/// Takes the status of a child that has ended or is about to, unless it was taken already.
pub fn reap(pid: u32) {
    let Some(pid) = Pid::from_raw(pid.cast_signed()) else { return };
    // Off the list it may be waited for as an orphan as well, which is all the same; not on it, the number is another's.
    let is_ours = made().as_mut().is_none_or(|made| made.remove(&pid.as_raw_pid()));
    if is_ours {
        // One that is no child has somebody else who does.
        let _ = waitpid(Some(pid), WaitOptions::empty());
    }
}

/// From here on processes whose parent ends are children of this process, if it is an ancestor of theirs (prctl(2),
/// `PR_SET_CHILD_SUBREAPER`). It must have no child yet.
///
/// # Errors
/// Those of prctl(2), and `NotFound` from a kernel that does not list children (`CONFIG_PROC_CHILDREN`).
pub fn adopt_orphans() -> io::Result<()> {
    fs::metadata("/proc/thread-self/children")?;
    set_child_subreaper(Some(getpid()))?;
    made().get_or_insert_default();
    Ok(())
}

/// Takes the status of orphans that have ended.
///
/// # Errors
/// Those of reading /proc.
pub fn reap_orphans() -> io::Result<()> {
    OWED.store(true, Ordering::SeqCst);
    // Making a child may take long, and this is for event loops.
    let mut made = match MADE.try_lock() {
        Ok(made) => made,
        Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        Err(TryLockError::WouldBlock) => return Ok(()),
    };
    OWED.store(false, Ordering::SeqCst);
    let Some(made) = made.as_mut() else { return Ok(()) };
    for child in children()?.into_iter().filter(|child| !made.contains(&child.as_raw_pid())) {
        // One that has not ended stays.
        let _ = waitid(WaitId::Pid(child), WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
    }
    // A list may lack a child while another ends (proc_pid_children(5)), so it does not tell who was waited for.
    made.retain(|pid| Pid::from_raw(*pid).is_some_and(is_child));
    Ok(())
}

fn children() -> io::Result<Vec<Pid>> {
    let mut children = Vec::new();
    for thread in fs::read_dir("/proc/self/task")? {
        let list = match fs::read_to_string(thread?.path().join("children")) {
            Ok(list) => list,
            // A thread that has just ended has left its children to another.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => continue,
            Err(error) => return Err(error),
        };
        children.extend(list.split_ascii_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)));
    }
    Ok(children)
}

/// Whether nobody has waited for it.
fn is_child(pid: Pid) -> bool {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    waitid(WaitId::Pid(pid), options).is_ok()
}
