//! Mounts in the mount namespace of the calling process.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use rustix::mount::{
    MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount_change, move_mount,
    open_tree, unmount,
};
use rustix::process::{chdir, pivot_root};

/// Makes the mounts of this namespace invisible to others, while theirs still appear here (`MS_SLAVE`).
///
/// # Errors
/// Those of mount(2).
pub fn receive_mounts_only() -> io::Result<()> {
    let flags = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    Ok(mount_change("/", flags)?)
}

/// A copy of the mounts at `path`, attached to nothing yet (open_tree(2)).
///
/// # Errors
/// Those of open_tree(2).
pub fn clone_tree(path: &Path) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    Ok(open_tree(CWD, path, flags)?)
}

/// Makes a detached tree read-only, with everything in it (mount_setattr(2)).
///
/// # Errors
/// Those of mount_setattr(2).
pub fn make_read_only(tree: &OwnedFd) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: MountAttrFlags::MOUNT_ATTR_RDONLY.bits().into(),
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    set_attributes(tree, &attributes, true)
}

/// Changes a detached tree, or its topmost mount only (mount_setattr(2)).
pub(super) fn set_attributes(tree: &OwnedFd, attributes: &libc::mount_attr, recursive: bool) -> io::Result<()> {
    let below = if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the empty path is a C string, the structure is valid for the size that is told, and both outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            std::os::fd::AsRawFd::as_raw_fd(tree),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | below,
            std::ptr::from_ref(attributes),
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Attaches a detached tree at `path` inside `root`, resolved as if `root` were "/".
///
/// # Errors
/// Those of openat2(2) and move_mount(2).
pub fn attach_inside(tree: &OwnedFd, root: impl AsFd, path: &Path) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let target = openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(tree, "", target, "", flags)?)
}

/// A detached proc(5) of the calling process' pid namespace.
///
/// # Errors
/// Those of fsopen(2) and fsmount(2).
pub fn new_proc() -> io::Result<OwnedFd> {
    use rustix::mount::{FsMountFlags, FsOpenFlags, fsconfig_create, fsmount, fsopen};
    let fs = fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&fs)?;
    let attributes =
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Ok(fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}

/// Makes a detached tree this process' root; the old one is gone from the namespace.
///
/// # Errors
/// Those of move_mount(2), pivot_root(2) and umount(2).
pub fn change_root(tree: &OwnedFd, staging: &Path) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(tree, "", CWD, staging, flags)?;
    chdir(staging)?;
    // Over itself: the old root then lies on top of the new one and can be taken off (pivot_root(2), NOTES).
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    chdir("/")?;
    Ok(())
}
