//! A container's directory: what the agent and its helper hand each other.

use std::fs::{self, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::Error;

/// An id becomes a directory's and a cgroup's name.
///
/// # Errors
/// It cannot.
pub fn check_id(id: &str) -> Result<(), Error> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "_+-.".contains(c);
    if id.is_empty() || id.len() > 200 || !id.chars().all(allowed) || id.starts_with('.') {
        let rule = "1 to 200 letters, digits and any of _ + - . with no dot in front";
        return Err(Error::Invalid(format!("{id:?} is no id: {rule}")));
    }
    Ok(())
}

/// A directory that is removed with everything in it when dropped.
pub struct Directory(PathBuf);

impl Directory {
    /// Makes one in `parent`, for the agent alone. Its name is a number: the paths of sockets in it must be shorter than
    /// the 107 bytes that they may have, which ids are not.
    ///
    /// # Errors
    /// Those of mkdir(2).
    pub fn make(parent: &Path) -> io::Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let path = parent.join(NEXT.fetch_add(1, Ordering::Relaxed).to_string());
        fs::create_dir(&path)?;
        fs::set_permissions(&path, Permissions::from_mode(0o700))?;
        Ok(Self(path))
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            crate::error!("cannot remove {}: {error}", self.0.display());
        }
    }
}

/// Lets the process that waits at `directory/notify.sock` execute its program.
///
/// # Errors
/// `ConnectionRefused` when it does not wait, or no more.
pub fn notify_start(directory: &Path) -> io::Result<()> {
    // By way of the directory's descriptor: the whole path may be longer than sun_path.
    let directory = OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(directory)?;
    let path = format!("/proc/self/fd/{}/notify.sock", directory.as_raw_fd());
    UnixStream::connect(path)?.write_all(b"start")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_cannot_leave_its_directory() {
        for id in ["", ".", "..", ".x", "a/b", "a\0b", "é", &"x".repeat(201)] {
            assert!(matches!(check_id(id), Err(Error::Invalid(_))), "{id:?}");
        }
        for id in ["c1", "0123_abc.d+e-f", &"x".repeat(200)] {
            assert!(check_id(id).is_ok(), "{id:?}");
        }
    }

    #[test]
    fn a_dropped_directory_is_gone() {
        let parent = tempfile::tempdir().unwrap();
        let directory = Directory::make(parent.path()).unwrap();
        fs::write(directory.path().join("config.json"), "{}").unwrap();
        let path = directory.path().to_owned();
        assert_ne!(Directory::make(parent.path()).unwrap().path(), path);
        drop(directory);
        assert!(!path.exists());
    }
}
