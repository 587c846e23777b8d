//! Identity-mapped mounts (mount_setattr(2), `MOUNT_ATTR_IDMAP`): a tree whose files seem to be others'.

use std::fs;
use std::io::{self, PipeReader};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use rustix::process::{Pid, WaitOptions, waitpid};

use super::children;
use super::namespaces::open_namespace;

/// A range of ids: those from `inside` on in the file system are those from `outside` on in the mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdRange {
    /// First id in the file system; the specification's `containerID`.
    pub inside: u32,
    /// First id in the mount; the specification's `hostID`.
    pub outside: u32,
    /// How many.
    pub size: u32,
}

/// Whose the files of a mount seem to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IdMap {
    /// Of users.
    pub users: Vec<IdRange>,
    /// Of groups.
    pub groups: Vec<IdRange>,
    /// For the mounts below as well.
    pub recursive: bool,
}

impl IdMap {
    /// Maps a detached tree.
    ///
    /// # Errors
    /// Those of clone(2), of writing the maps, and of mount_setattr(2): `EPERM` for who is not root where the file system
    /// was mounted, `EINVAL` for a file system that cannot do it.
    pub fn apply(&self, tree: &OwnedFd) -> io::Result<()> {
        self.set(tree, &self.namespace()?)
    }

    /// A user namespace with these maps, which is what mount_setattr(2) wants them as.
    ///
    /// # Errors
    /// Those of clone(2) and of writing the maps.
    pub fn namespace(&self) -> io::Result<OwnedFd> {
        let (reader, writer) = io::pipe()?;
        let child = children::note(|| wait_in_user_namespace(&reader, &writer), |child| Some(*child))?;
        let process = format!("/proc/{}", child.as_raw_nonzero());
        let write = |file: &str, ranges: &[IdRange]| fs::write(Path::new(&process).join(file), text(ranges));
        let namespace = write("uid_map", &self.users)
            .and_then(|()| write("gid_map", &self.groups))
            .and_then(|()| open_namespace(&Path::new(&process).join("ns/user")));
        // It ends with the pipe.
        drop(writer);
        waitpid(Some(child), WaitOptions::empty())?;
        namespace
    }

    /// Maps a detached tree by a namespace that [`IdMap::namespace`] gave.
    ///
    /// # Errors
    /// Those of mount_setattr(2).
    pub fn set(&self, tree: &OwnedFd, namespace: &OwnedFd) -> io::Result<()> {
        let attributes = libc::mount_attr {
            attr_set: libc::MOUNT_ATTR_IDMAP,
            attr_clr: 0,
            propagation: 0,
            userns_fd: u64::try_from(namespace.as_raw_fd()).map_err(io::Error::other)?,
        };
        super::mounts::set_attributes(tree, &attributes, self.recursive)
    }
}

/// As /proc/PID/uid_map takes it (user_namespaces(7)).
fn text(ranges: &[IdRange]) -> String {
    ranges.iter().map(|IdRange { inside, outside, size }| format!("{inside} {outside} {size}\n")).collect()
}

/// A child in a user namespace of its own, which ends when nobody has the pipe's writing end any more.
fn wait_in_user_namespace(reader: &PipeReader, writer: &impl AsRawFd) -> io::Result<Pid> {
    let (reader, writer) = (reader.as_raw_fd(), writer.as_raw_fd());
    let flags = libc::c_long::from(libc::CLONE_NEWUSER | libc::SIGCHLD);
    // SAFETY: without CLONE_VM and a stack it is fork(2). The child, whose other threads are gone with their locks held,
    // makes system calls on plain integers only and ends.
    let pid = unsafe {
        let pid = libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0);
        if pid == 0 {
            let mut byte = 0_u8;
            libc::close(writer);
            libc::read(reader, (&raw mut byte).cast(), 1);
            libc::_exit(0);
        }
        pid
    };
    let pid = Errno::result(pid)?;
    i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or_else(|| io::Error::other("clone(2) gave no pid"))
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn a_namespace_has_the_maps() {
        // Anybody may map themselves, whatever else this machine allows.
        let own = |outside| vec![IdRange { inside: 7, outside, size: 1 }];
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let map = IdMap { users: own(uid), groups: own(gid), recursive: false };
        assert_eq!(text(&map.users), format!("7 {uid} 1\n"));
        if rustix::process::geteuid().is_root() {
            let namespace = map.namespace().unwrap();
            assert!(File::from(namespace).metadata().is_ok());
        }
    }
}
