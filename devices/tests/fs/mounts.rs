//! What is mounted on the host below an export: seen by the guest, and unmounted whenever the host wants to.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use katavm_devices::fs::{ExportOptions, FsShare, HostMounts, MountEntry};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, OpenTreeFlags, UnmountFlags, mount, mount_bind, mount_change, open_tree, unmount,
};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::driver::{ALL_FLAGS, Guest, is_root, open_path, scratch};

struct Host;

impl HostMounts for Host {
    fn copy(&self, root: BorrowedFd<'_>) -> io::Result<OwnedFd> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
        let copy = open_tree(root, c"", flags)?;
        let private = libc::mount_attr { attr_set: 0, attr_clr: 0, propagation: libc::MS_PRIVATE, userns_fd: 0 };
        let (at, len) = (std::ptr::from_ref(&private), size_of::<libc::mount_attr>());
        // SAFETY: the path is a C string, `at` is valid for `len` bytes, and both outlive the call.
        let result = unsafe {
            libc::syscall(libc::SYS_mount_setattr, copy.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, at, len)
        };
        if result == 0 { Ok(copy) } else { Err(io::Error::last_os_error()) }
    }

    fn list(&self) -> io::Result<Vec<MountEntry>> {
        let list = fs::read_to_string("/proc/thread-self/mountinfo")?;
        Ok(list.lines().map(entry).collect())
    }
}

fn entry(line: &str) -> MountEntry {
    let fields: Vec<&str> = line.split(' ').collect();
    let (major, minor) = fields[2].split_once(':').unwrap();
    let device = (major.parse().unwrap(), minor.parse().unwrap());
    MountEntry { id: fields[0].parse().unwrap(), parent: fields[1].parse().unwrap(), device, root: fields[3].into() }
}

/// A directory in a mount namespace of this thread's own. None, with the reason printed, when this machine has none.
fn namespace() -> Option<(tempfile::TempDir, PathBuf)> {
    if !is_root() {
        println!("SKIPPED: mounting needs root");
        return None;
    }
    // SAFETY: FS and NEWNS affect this thread's own view of paths, no descriptors.
    if let Err(error) = unsafe { unshare_unsafe(UnshareFlags::FS | UnshareFlags::NEWNS) } {
        println!("SKIPPED: no mount namespace: {error}");
        return None;
    }
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
    Some(scratch())
}

fn tmpfs(at: &Path, file: &str) -> u64 {
    fs::create_dir_all(at).unwrap();
    mount("katavm", at, "tmpfs", MountFlags::empty(), None).unwrap();
    fs::write(at.join(file), file).unwrap();
    fs::metadata(at).unwrap().dev()
}

fn let_go(at: &Path) -> Result<(), Errno> {
    unmount(at, UnmountFlags::empty())
}

fn served(share: FsShare, path: &Path) -> Guest {
    share.add_export("x", open_path(path), ExportOptions::default()).unwrap();
    let mut guest = Guest::attach(share);
    guest.init(ALL_FLAGS).unwrap();
    guest
}

/// Descriptors of this process on a file system.
fn held(device: u64) -> usize {
    let numbers = fs::read_dir("/proc/self/fd").unwrap().flatten();
    numbers.filter(|number| fs::metadata(number.path()).is_ok_and(|file| file.dev() == device)).count()
}

#[test]
fn the_host_unmounts_what_the_guest_knows() {
    let Some((_dir, path)) = namespace() else { return };
    let later = path.join("later");
    let mut guest = served(FsShare::over(Arc::new(Host)), &path);
    let root = guest.root();
    let device = tmpfs(&later, "file");
    let mounted = guest.lookup(root, "later").unwrap();
    assert_eq!(mounted.attr.flags, 1, "a file system of its own");
    let file = guest.lookup(mounted.node, "file").unwrap();
    assert_eq!(guest.lookup(root, "later").unwrap().node, mounted.node, "it is the same the next time");
    let (fh, _) = guest.open(file.node, libc::O_RDWR).unwrap();
    guest.write(file.node, fh, 0, b"by the guest").unwrap();
    assert_eq!(fs::read(later.join("file")).unwrap(), b"by the guest");
    let made = guest.create(mounted.node, "new", libc::O_RDWR, 0o644).unwrap().0;
    assert_eq!(guest.list(mounted.node, true).len(), 4);
    guest.share.refresh_mounts();
    guest.getattr(file.node).unwrap();
    assert!(held(device) > 3);

    let_go(&later).unwrap();
    guest.share.refresh_mounts();
    assert_eq!(held(device), 0, "the file system is let go of");
    for node in [mounted.node, file.node, made.node] {
        assert_eq!(guest.getattr(node).unwrap_err(), libc::ESTALE);
    }
    assert_eq!(guest.read(file.node, fh, 0, 1).unwrap_err(), libc::EBADF);
    let below = guest.lookup(root, "later").unwrap();
    assert_ne!(below.node, mounted.node);
    assert_eq!((below.attr.flags, guest.list(below.node, true).len()), (0, 2), "the empty directory below");

    // Another one at the same place, perhaps with the number of the first.
    tmpfs(&later, "other");
    let mounted = guest.lookup(root, "later").unwrap();
    guest.lookup(mounted.node, "other").unwrap();
    assert_eq!(guest.lookup(mounted.node, "file").unwrap_err(), libc::ENOENT);
    let_go(&later).unwrap();
    tmpfs(&later, "third");
    let mounted = guest.lookup(root, "later").unwrap();
    guest.lookup(mounted.node, "third").unwrap();
    guest.share.remove_export("x");
    let_go(&later).unwrap();
}

#[test]
fn without_copies_the_host_is_told_that_it_is_busy() {
    let Some((_dir, path)) = namespace() else { return };
    let later = path.join("later");
    tmpfs(&later, "file");
    let mut guest = served(FsShare::new(), &path);
    let root = guest.root();
    let node = guest.lookup(root, "later").unwrap().node;
    assert_eq!(let_go(&later), Err(Errno::BUSY));
    guest.forget(node, 1);
    let_go(&later).unwrap();
}

#[test]
fn mounts_on_mounts() {
    let Some((_dir, path)) = namespace() else { return };
    let (outer, inner) = (path.join("sub/outer"), path.join("sub/outer/a/inner"));
    tmpfs(&outer, "file");
    let mut guest = served(FsShare::over(Arc::new(Host)), &path);
    let root = guest.root();
    let sub = guest.lookup(root, "sub").unwrap().node;
    let on_outer = guest.lookup(sub, "outer").unwrap().node;
    fs::create_dir_all(&inner).unwrap();
    let a = guest.lookup(on_outer, "a").unwrap();
    assert_eq!(a.attr.flags, 0);
    let empty = guest.lookup(a.node, "inner").unwrap();
    assert_eq!(empty.attr.flags, 0);
    // It comes when the guest has a copy of the outer one already.
    let device = tmpfs(&inner, "deep");
    guest.share.refresh_mounts();
    let on_inner = guest.lookup(a.node, "inner").unwrap();
    assert_eq!(on_inner.attr.flags, 1);
    let deep = guest.lookup(on_inner.node, "deep").unwrap().node;
    guest.lookup(a.node, "inner").unwrap();
    // What is covered has no path.
    guest.forget(empty.node, 1);
    // A single file that lies over another.
    fs::write(outer.join("over"), "").unwrap();
    mount_bind(inner.join("deep"), outer.join("over")).unwrap();
    guest.share.refresh_mounts();
    let over = guest.lookup(on_outer, "over").unwrap();
    assert_eq!((over.attr.size, over.attr.flags), (4, 0));
    assert_ne!(over.node, deep, "one by each mount");

    let state = guest.share.save();
    assert_eq!(state.unreachable(), 0, "{state:?}");
    let paths: Vec<_> = state.nodes.iter().map(|node| node.file.as_ref().unwrap().path.clone()).collect();
    assert!(paths.contains(&b"sub/outer/a/inner/deep".to_vec()), "{paths:?}");
    guest.reset_device();
    drop(guest);
    let share = FsShare::over(Arc::new(Host));
    share.add_export("x", open_path(&path), ExportOptions::default()).unwrap();
    let report = share.restore(&state);
    assert_eq!((report.nodes, report.stale_nodes), (state.nodes.len(), 0));
    let mut guest = Guest::attach(share);
    assert_eq!(guest.getattr(deep).unwrap().size, 4);
    assert_eq!(guest.lookup(a.node, "inner").unwrap().node, on_inner.node);

    let_go(&outer.join("over")).unwrap();
    let_go(&inner).unwrap();
    guest.share.refresh_mounts();
    assert_eq!(held(device), 0);
    assert_eq!(guest.getattr(deep).unwrap_err(), libc::ESTALE);
    assert_eq!(guest.getattr(over.node).unwrap_err(), libc::ESTALE);
    guest.getattr(a.node).unwrap();
    assert_eq!(guest.lookup(a.node, "inner").unwrap().attr.flags, 0, "the directory that it was mounted on");
    guest.getattr(on_outer).unwrap();
    let_go(&outer).unwrap();
    guest.share.refresh_mounts();
    assert_eq!(guest.getattr(a.node).unwrap_err(), libc::ESTALE);
    guest.getattr(sub).unwrap();
}
