//! Mounts in the mount namespace of the calling process.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;

use katavm_devices::fs::MountEntry;
use nix::sched::{CloneFlags, unshare};
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, StatxFlags, openat2, statx};
use rustix::mount::{
    MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount_change,
    mount_remount, move_mount, open_tree,
};
use rustix::process::{chdir, pivot_root};

use super::loops::Loop;

/// Makes the mounts of this namespace invisible to others, while theirs still appear here (`MS_SLAVE`).
///
/// # Errors
/// Those of mount(2).
pub fn receive_mounts_only() -> io::Result<()> {
    let flags = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    Ok(mount_change("/", flags)?)
}

/// Options of mount(8) that are flags of mount(2), and whether they set or clear them; the first two columns of its
/// table of options that are for all file systems.
const FLAGS: [(&str, MountFlags, bool); 21] = [
    ("ro", MountFlags::RDONLY, true),
    ("rw", MountFlags::RDONLY, false),
    ("nosuid", MountFlags::NOSUID, true),
    ("suid", MountFlags::NOSUID, false),
    ("nodev", MountFlags::NODEV, true),
    ("dev", MountFlags::NODEV, false),
    ("noexec", MountFlags::NOEXEC, true),
    ("exec", MountFlags::NOEXEC, false),
    ("noatime", MountFlags::NOATIME, true),
    ("atime", MountFlags::NOATIME, false),
    ("nodiratime", MountFlags::NODIRATIME, true),
    ("diratime", MountFlags::NODIRATIME, false),
    ("relatime", MountFlags::RELATIME, true),
    ("norelatime", MountFlags::RELATIME, false),
    ("strictatime", MountFlags::STRICTATIME, true),
    ("nostrictatime", MountFlags::STRICTATIME, false),
    ("sync", MountFlags::SYNCHRONOUS, true),
    ("async", MountFlags::SYNCHRONOUS, false),
    ("dirsync", MountFlags::DIRSYNC, true),
    ("silent", MountFlags::SILENT, true),
    ("defaults", MountFlags::empty(), true),
];

/// What mount(2) reads of a file system's own options: a page.
const LONGEST_OPTIONS: usize = 4096;
/// The option of overlayfs that lists its layers.
const LAYERS: &str = "lowerdir=";

/// Mounts as mount(8) does with these options; `bind`, `rbind` and `loop` are options as well.
///
/// # Errors
/// Those of mount(2) and of [`Loop::over`], and `InvalidInput` for options that mount(2) would not read to their end.
pub fn mount(kind: &str, source: &str, options: &[String], target: &Path) -> io::Result<()> {
    let (mut flags, mut bind, mut is_file, mut data) = (MountFlags::empty(), None, false, Vec::new());
    for option in options {
        match (option.as_str(), FLAGS.iter().find(|(name, ..)| name == option)) {
            ("bind", _) => bind = Some(false),
            ("rbind", _) => bind = Some(true),
            ("loop", _) => is_file = true,
            (_, Some((_, flag, set))) => flags.set(*flag, *set),
            (other, None) => data.push(other),
        }
    }
    let Some(recursive) = bind else {
        let device = is_file.then(|| Loop::over(Path::new(source), flags.contains(MountFlags::RDONLY))).transpose()?;
        let source = device.as_ref().map_or(Path::new(source), Loop::path);
        let joined = data.join(",");
        let is_long = joined.len() >= LONGEST_OPTIONS;
        return match is_long.then(|| relative_layers(&data)).flatten() {
            None => mount_with(kind, source, flags, &joined, target),
            // By a thread with a current directory of its own: that of the process is all others'.
            Some((folder, data)) => thread::scope(|scope| {
                let mounted = scope.spawn(|| {
                    unshare(CloneFlags::CLONE_FS)?;
                    chdir(&folder)?;
                    mount_with(kind, source, flags, &data.join(","), target)
                });
                mounted.join().unwrap_or_else(|_| Err(io::Error::other("the thread that mounts has died")))
            }),
        };
    };
    let bound = if recursive { rustix::mount::mount_bind_recursive } else { rustix::mount::mount_bind };
    bound(source, target)?;
    if flags.is_empty() {
        return Ok(());
    }
    // A bind mount takes its flags by a second call (mount(2), NOTES).
    let remounted = mount_remount(target, flags | MountFlags::BIND, c"");
    Ok(remounted.inspect_err(|_| drop(unmount(target)))?)
}

fn mount_with(kind: &str, source: &Path, flags: MountFlags, data: &str, target: &Path) -> io::Result<()> {
    if data.len() >= LONGEST_OPTIONS {
        // mount(2) would cut them off, and a shorter list of layers may be a wrong one.
        let reason = format!("its options are longer than {LONGEST_OPTIONS} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
    }
    Ok(rustix::mount::mount(source, target, kind, flags, CString::new(data)?.as_c_str())?)
}

/// Options of overlayfs with its layers relative to the deepest folder that has them all, and that folder. Nothing if there
/// is none, or if a layer's name is escaped.
fn relative_layers(options: &[&str]) -> Option<(PathBuf, Vec<String>)> {
    let layers = options.iter().find_map(|option| option.strip_prefix(LAYERS)).filter(|list| !list.contains('\\'))?;
    let layers: Vec<&Path> = layers.split(':').map(Path::new).collect();
    let mut folder = layers.first().filter(|_| layers.iter().all(|layer| layer.is_absolute()))?.parent()?;
    while !layers.iter().all(|layer| layer.starts_with(folder) && *layer != folder) {
        folder = folder.parent()?;
    }
    let relative: Option<Vec<&str>> = layers.iter().map(|layer| layer.strip_prefix(folder).ok()?.to_str()).collect();
    let relative = format!("{LAYERS}{}", relative?.join(":"));
    let shorter = |option: &&str| if option.starts_with(LAYERS) { relative.clone() } else { (*option).to_owned() };
    Some((folder.to_owned(), options.iter().map(shorter).collect()))
}

/// Takes off the topmost mount at `target`, whoever still uses it.
///
/// # Errors
/// Those of umount(2).
pub fn unmount(target: &Path) -> io::Result<()> {
    Ok(rustix::mount::unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)?)
}

/// A copy of the mounts at `path`, attached to nothing yet (open_tree(2)).
///
/// # Errors
/// Those of open_tree(2).
pub fn clone_tree(path: &Path) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    Ok(open_tree(CWD, path, flags)?)
}

/// A copy of the mount that `root` is the root of, without what is mounted on it: attached to nothing, and what happens to
/// the original does not happen to it.
///
/// # Errors
/// Those of open_tree(2) and mount_setattr(2).
pub fn private_copy(root: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let copy = open_tree(root, c"", flags)?;
    let attributes = libc::mount_attr { attr_set: 0, attr_clr: 0, propagation: libc::MS_PRIVATE, userns_fd: 0 };
    set_attributes(&copy, &attributes, false)?;
    Ok(copy)
}

/// The mounts of the calling thread's mount namespace.
///
/// # Errors
/// Those of reading the list.
pub fn list_mounts() -> io::Result<Vec<MountEntry>> {
    read_mounts(parse_mount)
}

/// What is mounted where. Paths with spaces or backslashes are escaped, as in proc_pid_mountinfo(5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountSource {
    /// Unique among those that there are, as statx(2) tells it of files.
    pub id: u64,
    /// The mount point.
    pub path: String,
    /// What of the file system is mounted.
    pub root: String,
    /// Options of the mount, separated by commas.
    pub flags: String,
    /// The file system's device number, `st_dev` of its files.
    pub device: u64,
    /// Its type.
    pub kind: String,
    /// What it is on, as who mounted it said.
    pub source: String,
    /// Its own options, separated by commas.
    pub options: String,
}

/// The mount that `path` is on, and the device number of its file system.
///
/// # Errors
/// Those of statx(2), and `Unsupported` before Linux 5.8.
pub fn mount_of(path: &Path) -> io::Result<(u64, u64)> {
    let wanted = StatxFlags::MNT_ID;
    let found = statx(CWD, path, AtFlags::empty(), wanted)?;
    if found.stx_mask & wanted.bits() == 0 {
        return Err(io::ErrorKind::Unsupported.into());
    }
    Ok((found.stx_mnt_id, rustix::fs::makedev(found.stx_dev_major, found.stx_dev_minor)))
}

/// What is mounted in the calling thread's mount namespace.
///
/// # Errors
/// Those of reading the list.
pub fn mount_sources() -> io::Result<Vec<MountSource>> {
    read_mounts(parse_source)
}

/// Reads proc_pid_mountinfo(5).
fn read_mounts<T>(parse: impl Fn(&str) -> Option<T>) -> io::Result<Vec<T>> {
    // Paths may be no UTF-8; they are only compared.
    let list = std::fs::read("/proc/thread-self/mountinfo")?;
    Ok(String::from_utf8_lossy(&list).lines().filter_map(parse).collect())
}

/// A line like those of [`parse_mount`].
fn parse_source(line: &str) -> Option<MountSource> {
    let (mount, file_system) = line.split_once(" - ")?;
    let MountEntry { id, device: (major, minor), root, .. } = parse_mount(mount)?;
    let mut here = mount.split(' ').skip(4).map(str::to_owned);
    let mut fields = file_system.splitn(3, ' ').map(str::to_owned);
    Some(MountSource {
        id,
        path: here.next()?,
        root,
        flags: here.next()?,
        device: rustix::fs::makedev(major, minor),
        kind: fields.next()?,
        source: fields.next()?,
        options: fields.next()?,
    })
}

/// A line as `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw`.
fn parse_mount(line: &str) -> Option<MountEntry> {
    let mut fields = line.split(' ');
    let (id, parent) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    let (major, minor) = fields.next()?.split_once(':')?;
    let device = (major.parse().ok()?, minor.parse().ok()?);
    Some(MountEntry { id, parent, device, root: fields.next()?.to_owned() })
}

/// Tells of each change of the calling thread's mount namespace.
pub struct MountChanges(std::fs::File);

impl MountChanges {
    /// Of all from now on.
    ///
    /// # Errors
    /// Those of open(2).
    pub fn watch() -> io::Result<Self> {
        Ok(Self(std::fs::File::open("/proc/thread-self/mountinfo")?))
    }

    /// Waits for a change, or for `stop` to be readable or hung up: true for a change.
    ///
    /// # Errors
    /// Those of poll(2).
    pub fn wait(&self, stop: BorrowedFd<'_>) -> io::Result<bool> {
        // The file is always readable; a change is an exception (proc_pid_mounts(5)).
        let mut fds = [PollFd::new(&self.0, PollFlags::PRI), PollFd::from_borrowed_fd(stop, PollFlags::IN)];
        loop {
            match rustix::event::poll(&mut fds, None) {
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let [_, stop] = &fds;
        Ok(stop.revents().is_empty())
    }
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
    rustix::mount::unmount(".", UnmountFlags::DETACH)?;
    chdir("/")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_mounts_are_read() {
        let entry = parse_mount("36 35 98:12 /a\\040b /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue");
        assert_eq!(entry, Some(MountEntry { id: 36, parent: 35, device: (98, 12), root: "/a\\040b".into() }));
        for bad in ["", "36", "36 35 98 / / rw", "x 35 98:0 / / rw"] {
            assert_eq!(parse_mount(bad), None, "{bad:?}");
        }
        assert!(list_mounts().unwrap().len() > 1);
    }

    #[test]
    fn sources_of_mounts_are_read() {
        let source = parse_source("36 35 7:3 / /s/1/fs ro,noatime - erofs /dev/loop3 ro,user_xattr").unwrap();
        let expected = MountSource {
            id: 36,
            path: "/s/1/fs".into(),
            root: "/".into(),
            flags: "ro,noatime".into(),
            device: rustix::fs::makedev(7, 3),
            kind: "erofs".into(),
            source: "/dev/loop3".into(),
            options: "ro,user_xattr".into(),
        };
        assert_eq!(source, expected);
        assert_eq!(parse_source("36 35 7:3 / /s/1/fs ro,noatime shared:1 - erofs"), None);
        let (id, device) = mount_of(Path::new("/proc/self")).unwrap();
        let proc = mount_sources().unwrap().into_iter().find(|mount| mount.id == id).unwrap();
        assert_eq!((proc.path.as_str(), proc.kind.as_str(), proc.device), ("/proc", "proc", device));
    }

    #[test]
    fn layers_become_relative_to_what_they_share() {
        let options = ["index=off", "lowerdir=/s/snapshots/12/fs:/s/snapshots/1/fs", "upperdir=/s/snapshots/13/fs"];
        let (folder, shorter) = relative_layers(&options).unwrap();
        assert_eq!(folder, Path::new("/s/snapshots"));
        assert_eq!(shorter, ["index=off", "lowerdir=12/fs:1/fs", "upperdir=/s/snapshots/13/fs"]);
        let (folder, shorter) = relative_layers(&["lowerdir=/a:/b/c"]).unwrap();
        assert_eq!((folder.as_path(), shorter), (Path::new("/"), vec!["lowerdir=a:b/c".to_owned()]));
        // One layer within another.
        let (folder, shorter) = relative_layers(&["lowerdir=/l/a:/l/a/b"]).unwrap();
        assert_eq!((folder.as_path(), shorter), (Path::new("/l"), vec!["lowerdir=a:a/b".to_owned()]));
        for none in [["lowerdir=/a\\:b:/c"], ["lowerdir=relative:/c"], ["upperdir=/x"]] {
            assert!(relative_layers(&none).is_none(), "{none:?}");
        }
    }
}
