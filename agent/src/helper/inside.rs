//! Opening directories inside a root, which no link leads out of.

use std::ffi::{CString, OsStr};
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::errno::Errno;

/// The root itself.
pub fn open_directory(root: &Path) -> io::Result<OwnedFd> {
    let flags = libc::O_PATH | libc::O_DIRECTORY;
    Ok(OpenOptions::new().read(true).custom_flags(flags).open(root)?.into())
}

/// openat2(2) with RESOLVE_IN_ROOT: links are followed as if `root` were "/".
pub fn open_in_root(root: &OwnedFd, path: &OsStr) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_bytes())?;
    // SAFETY: open_how is plain data; all zeroes is a value of it.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = (libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC) as u64;
    how.resolve = libc::RESOLVE_IN_ROOT | libc::RESOLVE_NO_MAGICLINKS;
    let (fd, size) = (root.as_raw_fd(), size_of::<libc::open_how>());
    // SAFETY: `path` and `how` live throughout the call, and `size` is that of `how`.
    let opened = unsafe { libc::syscall(libc::SYS_openat2, fd, path.as_ptr(), &raw const how, size) };
    let opened = Errno::result(opened)?;
    // SAFETY: openat2 just made this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(opened as i32) })
}
