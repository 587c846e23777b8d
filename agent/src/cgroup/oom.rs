//! Out-of-memory kills, as they happen: the kernel marks memory.events modified for inotify(7).
//!
//! It does so up to 10 ms late, and not at all for a group that is gone by then: whoever sees the end of a process asks
//! for what was not told yet.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::Cgroup;

/// Calls `tell` with the number of processes that the kernel has killed in `cgroup` for want of memory so far, whenever
/// that may have changed, until the group is removed.
///
/// # Errors
/// Those of inotify; `NotFound` when the group or its memory controller is not there.
pub async fn watch(cgroup: Cgroup, tell: impl Fn(u64)) -> io::Result<()> {
    // SAFETY: an OwnedFd is the same open descriptor until it is dropped, and `inotify` drops it.
    let inotify = unsafe { AsyncFd::register_with_interest(open(&cgroup)?, Interest::READABLE) }?;
    let mut buffer = [0; 4096];
    loop {
        tell(cgroup.oom_kills());
        let mut guard = inotify.readable().await?;
        match guard.try_io(|fd| nix::unistd::read(fd.get_ref(), &mut buffer).map_err(io::Error::from)) {
            Ok(Ok(len)) => {
                // The first field after the watch's number is the mask of the event.
                let mask = buffer.get(4..8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_ne_bytes);
                if len == 0 || mask & libc::IN_IGNORED != 0 {
                    return Ok(());
                }
            }
            Ok(Err(error)) => return Err(error),
            Err(_would_block) => {}
        }
    }
}

fn open(cgroup: &Cgroup) -> io::Result<OwnedFd> {
    let path = CString::new(cgroup.path().join("memory.events").as_os_str().as_bytes())?;
    // SAFETY: inotify_init1(2) takes no pointer.
    let fd = Errno::result(unsafe { libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK) })?;
    // SAFETY: inotify_init1 just made this descriptor, and nothing else owns it.
    let inotify = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: `path` is a C string that lives throughout the call.
    Errno::result(unsafe { libc::inotify_add_watch(inotify.as_raw_fd(), path.as_ptr(), libc::IN_MODIFY) })?;
    Ok(inotify)
}
