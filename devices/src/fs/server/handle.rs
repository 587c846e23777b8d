//! File handles of the host (name_to_handle_at(2)): a file without a descriptor that would hold it.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use rustix::io::Errno;

use super::file::last_error;

/// Longest handle in bytes (`MAX_HANDLE_SZ`).
const MAX_LEN: usize = 128;

/// What file_handle is in C, with room for any.
#[repr(C)]
struct Raw {
    len: libc::c_uint,
    kind: libc::c_int,
    bytes: [MaybeUninit<u8>; MAX_LEN],
}

/// A handle. It has the file's generation in it: another file with its inode number has another handle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileHandle {
    kind: libc::c_int,
    bytes: Box<[u8]>,
}

impl FileHandle {
    /// The handle of an open file.
    ///
    /// # Errors
    /// EOPNOTSUPP for file systems without handles.
    pub fn of(file: impl AsFd) -> Result<Self, Errno> {
        let mut raw = Raw { len: MAX_LEN as libc::c_uint, kind: 0, bytes: [MaybeUninit::uninit(); MAX_LEN] };
        let (mut mount, fd) = (0, file.as_fd().as_raw_fd());
        // SAFETY: the path is a C string; `raw` has the layout of file_handle and as much room as it says; all outlive the
        // call.
        let result = unsafe {
            libc::name_to_handle_at(
                fd,
                c"".as_ptr(),
                std::ptr::from_mut(&mut raw).cast(),
                &raw mut mount,
                libc::AT_EMPTY_PATH,
            )
        };
        if result != 0 {
            return Err(last_error());
        }
        let bytes = raw.bytes.get(..raw.len as usize).ok_or(Errno::OVERFLOW)?;
        // SAFETY: the kernel has written as many bytes as it says.
        let bytes = bytes.iter().map(|byte| unsafe { byte.assume_init() }).collect();
        Ok(Self { kind: raw.kind, bytes })
    }

    /// Opens the file for nothing but to be found again (O_PATH). `mount` is any file of its mount that is open for reading.
    ///
    /// # Errors
    /// EPERM without CAP_DAC_READ_SEARCH; ESTALE when the file is not there any more.
    pub fn open(&self, mount: impl AsFd) -> Result<OwnedFd, Errno> {
        let mut raw =
            Raw { len: self.bytes.len() as libc::c_uint, kind: self.kind, bytes: [MaybeUninit::new(0); MAX_LEN] };
        for (to, from) in raw.bytes.iter_mut().zip(&self.bytes) {
            to.write(*from);
        }
        let flags = libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC;
        // SAFETY: `raw` has the layout of file_handle, all of it is written, and it outlives the call.
        let fd =
            unsafe { libc::open_by_handle_at(mount.as_fd().as_raw_fd(), std::ptr::from_mut(&mut raw).cast(), flags) };
        if fd < 0 {
            return Err(last_error());
        }
        // SAFETY: the descriptor is new, so nobody else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handle_is_of_one_file() {
        let dir = tempfile::tempdir().unwrap();
        let make = |name: &str| std::fs::File::create(dir.path().join(name)).unwrap();
        let (one, other) = (make("one"), make("other"));
        let handle = match FileHandle::of(&one) {
            Err(Errno::OPNOTSUPP) => return println!("SKIPPED: the file system has no handles"),
            handle => handle.unwrap(),
        };
        assert_eq!(handle, FileHandle::of(&one).unwrap());
        assert_ne!(handle, FileHandle::of(&other).unwrap());
        match handle.open(&other) {
            Err(Errno::PERM) => println!("SKIPPED: handles are not for this user"),
            opened => assert_eq!(FileHandle::of(opened.unwrap()).unwrap(), handle),
        }
    }
}
