//! The agent's own mounts. Containers get theirs from their specification.
//!
//! /run and /tmp are directories of the root, which is a RAM file system already; /dev/pts, /dev/shm and /dev/mqueue
//! are for containers only, and each has its own.

use std::ffi::CStr;
use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};

use crate::error::Error;

/// Puts a bind mount of the initramfs over the initramfs and moves into it.
///
/// pivot_root(2) fails with EINVAL while the root is the initramfs, which has no parent mount; the copy has one.
/// The agent stays where it was, so `/proc/self/exe` can be executed again.
pub fn give_real_root() -> Result<(), Error> {
    let copied = || -> io::Result<()> {
        let tree = open_tree(c"/")?;
        move_mount(&tree, c"/")?;
        nix::unistd::fchdir(&tree)?;
        nix::unistd::chroot(".")?;
        // Containers' mounts must not come back here.
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
        Ok(())
    };
    copied().map_err(|error| Error::io("cannot make a root that pivot_root accepts", error))
}

/// open_tree(2): a detached copy of the mount at `path`.
fn open_tree(path: &CStr) -> Result<OwnedFd, Errno> {
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    // SAFETY: `path` is a C string that lives throughout the call.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    let fd = Errno::result(fd)?;
    // SAFETY: open_tree just made this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// move_mount(2): attaches what open_tree copied.
fn move_mount(tree: &OwnedFd, to: &CStr) -> Result<(), Errno> {
    let from = tree.as_raw_fd();
    let flags = libc::MOVE_MOUNT_F_EMPTY_PATH;
    // SAFETY: both paths are C strings that live throughout the call.
    let moved = unsafe { libc::syscall(libc::SYS_move_mount, from, c"".as_ptr(), libc::AT_FDCWD, to.as_ptr(), flags) };
    Errno::result(moved).map(drop)
}

/// What is mounted, where, and the kernel option without which it is not there.
const MOUNTS: [(&str, &str, &str); 4] = [
    ("devtmpfs", "/dev", "CONFIG_DEVTMPFS"),
    ("proc", "/proc", "CONFIG_PROC_FS"),
    ("sysfs", "/sys", "CONFIG_SYSFS"),
    ("cgroup2", crate::cgroup::ROOT, "CONFIG_CGROUPS"),
];

/// Mounts what the agent itself needs.
///
/// # Errors
/// Which mount failed, and the kernel option that it takes.
pub fn mount_all() -> Result<(), Error> {
    for (kind, at, option) in MOUNTS {
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
        let flags = if kind == "devtmpfs" { MsFlags::MS_NOSUID } else { flags | MsFlags::MS_NODEV };
        let made = match fs::create_dir(at) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other,
        };
        made.and_then(|()| mount(Some(kind), at, Some(kind), flags, None::<&str>).map_err(io::Error::from)).map_err(
            |error| match error.raw_os_error() {
                Some(libc::ENODEV) => Error::Internal(format!("the kernel lacks {option} ({kind} cannot be mounted)")),
                _ => Error::io(format_args!("cannot mount {kind} at {at}"), error),
            },
        )?;
    }
    // Containers must not be able to look into the agent's directories through a shared mount.
    let made = fs::create_dir_all(crate::container::DIR)
        .and_then(|()| fs::create_dir_all(crate::sandbox::SHARED))
        .and_then(|()| fs::set_permissions("/run/katavm", Permissions::from_mode(0o711)));
    made.map_err(|error| Error::io("cannot make the directories of the agent", error))
}
