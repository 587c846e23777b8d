//! Work on open files.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{FallocateFlags, FileType, Mode, SeekFrom};
use rustix::io::Errno;

use super::credentials::without_fsetid;
use super::handles::Handle;
use super::init::MAX_WRITE;
use super::request::{Request, put};
use super::wire::{
    self, CopyFileRangeIn, FallocateIn, FlushIn, FsyncIn, LseekIn, LseekOut, ROOT_ID, ReadIn, ReleaseIn, StatfsOut,
    WriteIn, WriteOut,
};
use super::{Server, names};
use crate::virtio::queue::Buffers;

/// Most bytes that one COPY_FILE_RANGE copies, so that a request ends in good time; the guest asks for the rest.
const MAX_COPY: u64 = 64 << 20;

impl Server {
    pub(super) fn read(&self, request: &mut Request<'_>, out: &mut Buffers<'_>) -> Result<(), Errno> {
        let read: ReadIn = request.read()?;
        let handle = self.handles.get(read.fh, request.header.nodeid)?;
        let offset = offset(read.offset)?;
        let vectors = out.iovecs(read.size.min(MAX_WRITE) as usize);
        // SAFETY: the vectors point to `out`'s guest memory, which stays mapped while `out` lives; the kernel writes at
        // most their lengths into them. No reference to that memory exists on this side.
        let done = unsafe { libc::preadv(handle.file.as_raw_fd(), vectors.as_ptr(), count(&vectors), offset) };
        out.consume(usize::try_from(done).map_err(|_| last_error())?);
        Ok(())
    }

    pub(super) fn write(&self, request: &mut Request<'_>, out: &mut Buffers<'_>) -> Result<(), Errno> {
        let write: WriteIn = request.read()?;
        let handle = self.handles.get(write.fh, request.header.nodeid)?;
        handle.node.writable()?;
        let size = write.size as usize;
        if write.size > MAX_WRITE || size > request.body.remaining() {
            return Err(Errno::INVAL);
        }
        let mut act = || write_all(&handle, &mut request.body, size, &write);
        // The guest asks for it whenever the caller could not keep such bits; few files have them.
        let kill = write.write_flags & wire::WRITE_KILL_SUIDGID != 0 && has_set_id_bits(&handle.file)?;
        let written = if kill { without_fsetid(request.header.gid, act)? } else { act()? };
        // At most MAX_WRITE.
        put(out, &WriteOut { size: written as u32, padding: 0 })
    }

    pub(super) fn flush(&self, request: &mut Request<'_>, _out: &mut Buffers<'_>) -> Result<(), Errno> {
        let flush: FlushIn = request.read()?;
        let handle = self.handles.get(flush.fh, request.header.nodeid)?;
        // Closing a duplicate is how a host file system (NFS, quota) gets to report what it put off.
        let duplicate = rustix::io::fcntl_dupfd_cloexec(&handle.file, 0)?;
        // SAFETY: the descriptor was made here, and `into_raw_fd` gave its ownership up.
        let closed = unsafe { libc::close(std::os::fd::IntoRawFd::into_raw_fd(duplicate)) };
        if closed == 0 { Ok(()) } else { Err(last_error()) }
    }

    pub(super) fn fsync(&self, request: &mut Request<'_>, _out: &mut Buffers<'_>) -> Result<(), Errno> {
        let fsync: FsyncIn = request.read()?;
        if request.header.nodeid == ROOT_ID {
            return Ok(());
        }
        let handle = self.handles.get(fsync.fh, request.header.nodeid)?;
        if fsync.fsync_flags & wire::FSYNC_FDATASYNC != 0 {
            rustix::fs::fdatasync(&handle.file)
        } else {
            rustix::fs::fsync(&handle.file)
        }
    }

    pub(super) fn syncfs(&self, request: &mut Request<'_>, _out: &mut Buffers<'_>) -> Result<(), Errno> {
        if request.header.nodeid != ROOT_ID {
            let node = self.node(request.header.nodeid)?;
            return rustix::fs::syncfs(self.open_directory(&node)?);
        }
        // Exported files are left to fsync; their directories are not ours to open.
        for export in self.exports.after(0) {
            let found = super::root::export_root(&export)?;
            if found.kind() == FileType::Directory {
                let (node, _) = self.intern(found)?;
                let synced = self.open_directory(&node).and_then(rustix::fs::syncfs);
                self.nodes.forget(node.id, 1);
                synced?;
            }
        }
        Ok(())
    }

    pub(super) fn release(&self, request: &mut Request<'_>, _out: &mut Buffers<'_>) -> Result<(), Errno> {
        let release: ReleaseIn = request.read()?;
        if request.header.nodeid == ROOT_ID {
            return Ok(());
        }
        self.handles.remove(release.fh, request.header.nodeid).map(drop)
    }

    pub(super) fn fallocate(&self, request: &mut Request<'_>, _out: &mut Buffers<'_>) -> Result<(), Errno> {
        let fallocate: FallocateIn = request.read()?;
        let handle = self.handles.get(fallocate.fh, request.header.nodeid)?;
        handle.node.writable()?;
        let (start, len) = (offset(fallocate.offset)?, offset(fallocate.length)?);
        let mode = FallocateFlags::from_bits_retain(fallocate.mode);
        let act = || rustix::fs::fallocate(&handle.file, mode, start.cast_unsigned(), len.cast_unsigned());
        // Unlike a write, it does not say whether the caller could keep such bits.
        let kill = request.header.uid != 0 && has_set_id_bits(&handle.file)?;
        if kill { without_fsetid(request.header.gid, act) } else { act() }
    }

    pub(super) fn lseek(&self, request: &mut Request<'_>, out: &mut Buffers<'_>) -> Result<(), Errno> {
        let lseek: LseekIn = request.read()?;
        let handle = self.handles.get(lseek.fh, request.header.nodeid)?;
        let start = offset(lseek.offset)?.cast_unsigned();
        // The guest keeps file positions itself; only what needs the file's layout is asked here.
        let whence = match lseek.whence.cast_signed() {
            libc::SEEK_DATA => SeekFrom::Data(start),
            libc::SEEK_HOLE => SeekFrom::Hole(start),
            _ => return Err(Errno::INVAL),
        };
        if handle.node.kind != FileType::RegularFile {
            return Err(Errno::INVAL);
        }
        let offset = rustix::fs::seek(&handle.file, whence)?;
        put(out, &LseekOut { offset })
    }

    pub(super) fn copy_file_range(&self, request: &mut Request<'_>, out: &mut Buffers<'_>) -> Result<(), Errno> {
        let copy: CopyFileRangeIn = request.read()?;
        let from = self.handles.get(copy.fh_in, request.header.nodeid)?;
        let to = self.handles.get(copy.fh_out, copy.nodeid_out)?;
        to.node.writable()?;
        if copy.flags != 0 {
            return Err(Errno::INVAL);
        }
        let mut from_offset = offset(copy.off_in)?.cast_unsigned();
        let mut to_offset = offset(copy.off_out)?.cast_unsigned();
        let len = copy.len.min(MAX_COPY) as usize;
        let done =
            rustix::fs::copy_file_range(&from.file, Some(&mut from_offset), &to.file, Some(&mut to_offset), len)?;
        // At most MAX_COPY.
        put(out, &WriteOut { size: done as u32, padding: 0 })
    }

    pub(super) fn statfs(&self, request: &mut Request<'_>, out: &mut Buffers<'_>) -> Result<(), Errno> {
        if request.header.nodeid == ROOT_ID {
            let namelen = names::NAME_MAX as u32;
            return put(out, &StatfsOut { bsize: 4096, frsize: 4096, namelen, ..StatfsOut::default() });
        }
        let node = self.node(request.header.nodeid)?;
        let host = rustix::fs::fstatvfs(&node)?;
        let small = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        let reply = StatfsOut {
            blocks: host.f_blocks,
            bfree: host.f_bfree,
            bavail: host.f_bavail,
            files: host.f_files,
            ffree: host.f_ffree,
            bsize: small(host.f_bsize),
            namelen: small(host.f_namemax),
            frsize: small(host.f_frsize),
            ..StatfsOut::default()
        };
        put(out, &reply)
    }
}

/// Writes the first `size` bytes of `data`; gives how many went in before an error.
fn write_all(handle: &Handle, data: &mut Buffers<'_>, size: usize, write: &WriteIn) -> Result<usize, Errno> {
    let flags = write_flags(write);
    let mut done = 0;
    while done < size {
        let offset = offset(write.offset.checked_add(done as u64).ok_or(Errno::FBIG)?)?;
        let vectors = data.iovecs(size - done);
        // SAFETY: as for preadv in `Server::read`, except that the kernel only reads. The guest may change the bytes
        // meanwhile, which changes what is written and nothing else.
        let wrote =
            unsafe { libc::pwritev2(handle.file.as_raw_fd(), vectors.as_ptr(), count(&vectors), offset, flags) };
        match usize::try_from(wrote) {
            Ok(0) => break,
            Ok(wrote) => {
                data.consume(wrote);
                done += wrote;
            }
            Err(_) if done > 0 => break,
            Err(_) => return Err(last_error()),
        }
    }
    Ok(done)
}

/// The `RWF_*` flags for the guest's open flags, which come with each write: fcntl(2) can change them any time.
fn write_flags(write: &WriteIn) -> libc::c_int {
    let open = write.flags.cast_signed();
    let mut flags = 0;
    // Pages of a mapping belong where they are, whatever handle they travel by.
    if open & libc::O_APPEND != 0 && write.write_flags & wire::WRITE_CACHE == 0 {
        flags |= libc::RWF_APPEND;
    }
    if open & libc::O_SYNC == libc::O_SYNC {
        flags |= libc::RWF_SYNC;
    } else if open & libc::O_DSYNC != 0 {
        flags |= libc::RWF_DSYNC;
    }
    flags
}

/// Whether a file has a set-user-ID or set-group-ID bit.
fn has_set_id_bits(file: &OwnedFd) -> Result<bool, Errno> {
    let mode = Mode::from_raw_mode(rustix::fs::fstat(file)?.st_mode);
    Ok(mode.intersects(Mode::SUID | Mode::SGID))
}

/// A file offset of the host.
fn offset(offset: u64) -> Result<i64, Errno> {
    i64::try_from(offset).map_err(|_| Errno::INVAL)
}

fn count(vectors: &[libc::iovec]) -> libc::c_int {
    // `Buffers::iovecs` gives IOV_MAX at most.
    vectors.len() as libc::c_int
}

/// Why the system call before failed.
pub fn last_error() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}
