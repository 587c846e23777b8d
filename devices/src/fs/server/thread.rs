//! What a thread needs before it may serve requests.

use std::cell::Cell;
use std::os::fd::BorrowedFd;

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::process::{fchdir, umask};
use rustix::thread::{UnshareFlags, unshare_unsafe};

thread_local! {
    static PREPARED: Cell<bool> = const { Cell::new(false) };
}

/// Gives the calling thread, once, its own umask and working directory (`unshare(CLONE_FS)`): the guest's
/// caller decides the umask of what is created, and the system calls for extended attributes have no
/// directory argument, so that `/proc/self/fd` has to be the working directory.
///
/// # Errors
/// When a system call is refused, as by a seccomp filter.
pub fn prepare(proc_fds: BorrowedFd<'_>) -> Result<(), Errno> {
    if PREPARED.get() {
        return Ok(());
    }
    // SAFETY: unsharing file descriptors would be the unsafe part; FS affects umask, root and working directory of
    // this thread only.
    unsafe { unshare_unsafe(UnshareFlags::FS) }?;
    umask(Mode::empty());
    fchdir(proc_fds)?;
    PREPARED.set(true);
    Ok(())
}
