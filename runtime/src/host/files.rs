//! Opening what the guest is to see.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{
    Access, AtFlags, CWD, FileType, FlockOperation, Mode, OFlags, StatxAttributes, StatxFlags, accessat, flock, fstat,
    fstatfs, major, minor, statx,
};
use rustix::io::Errno;

/// What a path leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A directory.
    Directory,
    /// A regular file.
    Regular,
    /// A character device with these numbers.
    CharacterDevice(u32, u32),
    /// A block device.
    BlockDevice,
    /// A socket of the host's kernel.
    Socket,
    /// A named pipe of the host's kernel.
    Fifo,
    /// None of these.
    Other,
}

impl FileKind {
    /// As a person calls it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Directory => "directory",
            Self::Regular => "regular file",
            Self::CharacterDevice(..) => "character device",
            Self::BlockDevice => "block device",
            Self::Socket => "socket",
            Self::Fifo => "named pipe",
            Self::Other => "file of unknown kind",
        }
    }
}

/// Opens a block device or an image file as a disk of the guest, which nobody else may write meanwhile: a block device
/// must not be mounted or otherwise in use on the host, and an image not be another guest's. Read-only, others may read.
///
/// # Errors
/// Those of open(2), and `ResourceBusy`.
pub fn open_disk(path: &Path, read_only: bool) -> io::Result<File> {
    // O_NONBLOCK: whatever else has taken the path's place is to be refused later, not waited for.
    let mut flags = OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
    flags |= if read_only { OFlags::RDONLY } else { OFlags::RDWR };
    let is_device = rustix::fs::stat(path).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode).is_block_device());
    if is_device && !read_only {
        // Without O_CREAT this is for block devices only (open(2)).
        flags |= OFlags::EXCL;
    }
    let fd = rustix::fs::open(path, flags, Mode::empty())?;
    let lock = if read_only { FlockOperation::NonBlockingLockShared } else { FlockOperation::NonBlockingLockExclusive };
    flock(&fd, lock).map_err(|error| match error {
        Errno::WOULDBLOCK => io::Error::new(io::ErrorKind::ResourceBusy, "it is in use as another disk"),
        error => error.into(),
    })?;
    Ok(fd.into())
}

/// Opens `path` for nothing but to be found again (open(2), `O_PATH`), following links as mount(2) does.
///
/// # Errors
/// Those of open(2) and fstat(2).
pub fn open_shared(path: &Path) -> io::Result<(OwnedFd, FileKind)> {
    let fd = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let stat = fstat(&fd)?;
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => FileKind::Directory,
        FileType::RegularFile => FileKind::Regular,
        FileType::CharacterDevice => FileKind::CharacterDevice(major(stat.st_rdev), minor(stat.st_rdev)),
        FileType::BlockDevice => FileKind::BlockDevice,
        FileType::Socket => FileKind::Socket,
        FileType::Fifo => FileKind::Fifo,
        _ => FileKind::Other,
    };
    Ok((fd, kind))
}

/// What tells a file as it is reached by one mount from all others, for as long as it is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    mount: u64,
    device: (u32, u32),
    inode: u64,
}

impl Place {
    /// Of an open file.
    ///
    /// # Errors
    /// Those of statx(2).
    pub fn of(fd: &OwnedFd) -> io::Result<Self> {
        let stat = statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::INO | StatxFlags::MNT_ID)?;
        Ok(Self { mount: stat.stx_mnt_id, device: (stat.stx_dev_major, stat.stx_dev_minor), inode: stat.stx_ino })
    }
}

/// A file system in memory that is mounted at a directory and has nothing in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EmptyTmpfs {
    /// No other has it while it is mounted.
    pub device: (u32, u32),
    /// How much it may hold, in bytes.
    pub size: u64,
}

impl EmptyTmpfs {
    /// The one at `path`, if there is one.
    ///
    /// # Errors
    /// Those of open(2) and of reading the directory.
    pub fn at(path: &Path) -> io::Result<Option<Self>> {
        let fd = open_shared(path)?.0;
        let file_system = fstatfs(&fd)?;
        let stat = statx(&fd, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)?;
        let is_mounted = stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT);
        if file_system.f_type != libc::TMPFS_MAGIC || !is_mounted || std::fs::read_dir(path)?.next().is_some() {
            return Ok(None);
        }
        let size = file_system.f_blocks.saturating_mul(file_system.f_bsize.unsigned_abs());
        Ok(Some(Self { device: (stat.stx_dev_major, stat.stx_dev_minor), size }))
    }
}

/// What tells a file from all others on this machine, under whatever name: its device and inode number.
#[must_use]
pub fn identity(metadata: &std::fs::Metadata) -> (u64, u64) {
    use std::os::unix::fs::MetadataExt;
    (metadata.dev(), metadata.ino())
}

/// A file in memory without a name (memfd_create(2)).
///
/// # Errors
/// Those of memfd_create(2).
pub fn scratch_file() -> io::Result<std::fs::File> {
    Ok(rustix::fs::memfd_create("katavm", rustix::fs::MemfdFlags::CLOEXEC)?.into())
}

/// Whether this user may list and pass through a directory (access(2) with the effective ids).
///
/// # Errors
/// Those of access(2).
pub fn may_use_directory(path: &Path) -> io::Result<()> {
    let wanted = Access::READ_OK | Access::EXEC_OK;
    Ok(accessat(CWD, path, wanted, AtFlags::EACCESS)?)
}

/// An error of the system as container runtimes word it: `no such file or directory`.
#[must_use]
pub fn system_message(error: &io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or(&text);
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_lowercase().chain(letters).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let kind = |path: &Path| open_shared(path).unwrap().1;
        assert_eq!(kind(dir.path()), FileKind::Directory);
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert_eq!(kind(&file), FileKind::Regular);
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert_eq!(kind(&link), FileKind::Regular);
        let socket = dir.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert_eq!(kind(&socket), FileKind::Socket);
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(kind(&fifo), FileKind::Fifo);
        assert_eq!(kind(Path::new("/dev/null")), FileKind::CharacterDevice(1, 3));
    }

    #[test]
    fn a_directory_is_used_by_who_may() {
        let dir = tempfile::tempdir().unwrap();
        may_use_directory(dir.path()).unwrap();
        assert_eq!(may_use_directory(&dir.path().join("no")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn errors_read_as_those_of_other_runtimes() {
        let error = open_shared(Path::new("/nowhere")).unwrap_err();
        assert_eq!(system_message(&error), "no such file or directory");
    }
}
