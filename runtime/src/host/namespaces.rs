//! Namespaces of this process (namespaces(7)).

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::{Mode, OFlags, open};

use super::files::identity;

/// Opens a namespace by its file.
///
/// # Errors
/// Those of open(2), and `InvalidInput` when the file is no namespace.
pub fn open_namespace(path: &Path) -> io::Result<OwnedFd> {
    let fd = open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    // NS_GET_NSTYPE, _IO(0xb7, 0x3): answers for files of nsfs only (ioctl_nsfs(2)).
    // SAFETY: the request takes no argument and the descriptor is open.
    if unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&fd), 0xb703) } < 0 {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a namespace"));
    }
    Ok(fd)
}

/// Whether a network namespace is the one that this process is in.
///
/// # Errors
/// Those of stat(2).
pub fn is_own_network(netns: &OwnedFd) -> io::Result<bool> {
    let netns = File::from(netns.try_clone()?).metadata()?;
    Ok(identity(&netns) == identity(&fs::metadata("/proc/self/ns/net")?))
}

/// Moves the calling thread, which must be the only one, into new namespaces.
///
/// # Errors
/// Those of unshare(2).
pub fn enter_new_namespaces(flags: CloneFlags) -> io::Result<()> {
    Ok(unshare(flags)?)
}

/// Moves the calling thread into an existing namespace.
///
/// # Errors
/// Those of setns(2).
pub fn join_namespace(fd: &OwnedFd) -> io::Result<()> {
    Ok(setns(fd, CloneFlags::empty())?)
}

/// Has a program start in the mount, network, ipc and uts namespaces of a process.
///
/// # Errors
/// Those of opening them.
pub fn run_in_namespaces_of(command: &mut Command, pid: u64) -> io::Result<()> {
    let open_one = |name: &str| open_namespace(Path::new(&format!("/proc/{pid}/ns/{name}")));
    // The mounts last: opening a path means something else after.
    let namespaces = [open_one("net")?, open_one("ipc")?, open_one("uts")?, open_one("mnt")?];
    // SAFETY: between fork and exec only setns(2) is called, which is safe there, on descriptors that the closure owns.
    unsafe {
        command.pre_exec(move || namespaces.iter().try_for_each(join_namespace));
    }
    Ok(())
}
