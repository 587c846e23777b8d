//! A tmpfs that starts with what the root file system has in its place (the mount option `tmpcopyup`).
//!
//! The container does not run yet: nobody changes what is copied meanwhile.

use std::fs::{self, FileType, Metadata, Permissions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

use nix::sys::stat::{Mode, SFlag, mknod};

use super::inside::{open_directory, open_in_root};
use crate::error::Error;

/// Copies into the mounts of the container whose first process is `init` what `root` has in their places.
///
/// # Errors
/// Which could not be copied.
pub fn run(root: &Path, init: i32, mounts: &[PathBuf]) -> Result<(), Error> {
    for destination in mounts {
        let failed = |error| {
            let what =
                format_args!("cannot copy what the root file system has at {} (tmpcopyup)", destination.display());
            Error::io(what, error)
        };
        let from = place(root, destination).map_err(failed)?;
        let to = place(Path::new(&format!("/proc/{init}/root")), destination).map_err(failed)?;
        copy_entries(&path_of(&from), &path_of(&to)).map_err(failed)?;
    }
    Ok(())
}

/// Never outside of `root`, whatever links there are in it.
fn place(root: &Path, destination: &Path) -> io::Result<OwnedFd> {
    open_in_root(&open_directory(root)?, destination.as_os_str())
}

/// What a directory is reached by as long as its descriptor is open.
fn path_of(directory: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", directory.as_raw_fd()).into()
}

/// Copies all entries of a directory with owners, modes and device numbers.
fn copy_entries(from: &Path, to: &Path) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        copy(&entry.path(), &entry.metadata()?, &to.join(entry.file_name()))?;
    }
    Ok(())
}

fn copy(from: &Path, metadata: &Metadata, to: &Path) -> io::Result<()> {
    let kind = metadata.file_type();
    if kind.is_dir() {
        fs::create_dir(to)?;
        copy_entries(from, to)?;
    } else if kind.is_symlink() {
        symlink(fs::read_link(from)?, to)?;
    } else if kind.is_file() {
        fs::copy(from, to)?;
    } else {
        mknod(to, node(kind), Mode::S_IRUSR, metadata.rdev())?;
    }
    lchown(to, Some(metadata.uid()), Some(metadata.gid()))?;
    if kind.is_symlink() {
        return Ok(());
    }
    // After the owner: a change of that takes the set-id bits away.
    fs::set_permissions(to, Permissions::from_mode(metadata.mode()))
}

fn node(kind: FileType) -> SFlag {
    if kind.is_fifo() {
        SFlag::S_IFIFO
    } else if kind.is_socket() {
        SFlag::S_IFSOCK
    } else if kind.is_block_device() {
        SFlag::S_IFBLK
    } else {
        SFlag::S_IFCHR
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_copied_as_it_is() {
        let scratch = tempfile::tempdir().unwrap();
        let (from, to) = (scratch.path().join("from"), scratch.path().join("to"));
        fs::create_dir_all(from.join("deep/er")).unwrap();
        fs::create_dir(&to).unwrap();
        fs::write(from.join("deep/er/file"), "text").unwrap();
        fs::set_permissions(from.join("deep/er/file"), Permissions::from_mode(0o4750)).unwrap();
        fs::set_permissions(from.join("deep"), Permissions::from_mode(0o1777)).unwrap();
        symlink("/nowhere", from.join("link")).unwrap();
        mknod(&from.join("fifo"), SFlag::S_IFIFO, Mode::S_IRUSR, 0).unwrap();
        copy_entries(&from, &to).unwrap();
        assert_eq!(fs::read_to_string(to.join("deep/er/file")).unwrap(), "text");
        assert_eq!(fs::metadata(to.join("deep/er/file")).unwrap().mode() & 0o7777, 0o4750);
        assert_eq!(fs::metadata(to.join("deep")).unwrap().mode() & 0o7777, 0o1777);
        assert_eq!(fs::read_link(to.join("link")).unwrap(), Path::new("/nowhere"));
        assert!(fs::metadata(to.join("fifo")).unwrap().file_type().is_fifo());
    }
}
