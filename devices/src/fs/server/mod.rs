//! The file server: FUSE requests in, replies out, system calls on the host in between.
//!
//! It knows nothing of queues and may be called from several threads at once. Every file that the
//! guest knows is held by a descriptor, so no path is ever walked on the guest's word: each name is one component,
//! resolved in a directory that the guest was shown before (`openat2` with `RESOLVE_BENEATH`), and links are never followed.

mod attr;
mod budget;
mod create;
mod credentials;
mod dir;
mod exports;
mod file;
mod handle;
mod handles;
mod held;
mod init;
mod inode;
mod lookup;
mod mounts;
mod names;
mod namespace;
mod persist;
mod request;
mod root;
mod thread;
mod wire;
mod xattr;

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use zerocopy::IntoBytes;

pub use exports::ExportOptions;
pub use init::Session;
pub use mounts::{HostMounts, MountEntry};
pub use persist::RestoreReport;

use crate::virtio::queue::Buffers;
use budget::Budget;
use exports::Exports;
use handles::Handles;
use inode::Nodes;
use mounts::Mounts;
use request::Request;
use wire::{AttrOut, EntryOut, InitOut, LseekOut, OpenOut, OutHeader, StatfsOut, StatxOut, WriteOut, opcode};

/// The server of one share.
#[derive(Default)]
pub struct Server {
    session: Mutex<Option<Session>>,
    exports: Exports,
    nodes: Nodes,
    handles: Handles,
    budget: Budget,
    mounts: Mounts,
    proc_fds: OnceLock<OwnedFd>,
}

type Handler = fn(&Server, &mut Request<'_>, &mut Buffers<'_>) -> Result<(), Errno>;

/// How an opcode is served: the room that its reply needs, and by whom.
const fn operation(code: u32) -> Option<(usize, Handler)> {
    const ENTRY: usize = size_of::<EntryOut>();
    const OPEN: usize = size_of::<OpenOut>();
    const ATTR: usize = size_of::<AttrOut>();
    Some(match code {
        opcode::INIT => (size_of::<InitOut>(), Server::init),
        opcode::DESTROY => (0, Server::destroy),
        opcode::LOOKUP => (ENTRY, Server::lookup),
        opcode::GETATTR => (ATTR, Server::getattr),
        opcode::SETATTR => (ATTR, Server::setattr),
        opcode::STATX => (size_of::<StatxOut>(), Server::statx),
        opcode::READLINK => (0, Server::readlink),
        opcode::SYMLINK => (ENTRY, Server::symlink),
        opcode::MKNOD => (ENTRY, Server::mknod),
        opcode::MKDIR => (ENTRY, Server::mkdir),
        opcode::UNLINK => (0, Server::unlink),
        opcode::RMDIR => (0, Server::rmdir),
        opcode::RENAME => (0, Server::rename),
        opcode::RENAME2 => (0, Server::rename2),
        opcode::LINK => (ENTRY, Server::link),
        opcode::OPEN => (OPEN, Server::open),
        opcode::CREATE => (ENTRY + OPEN, Server::create),
        opcode::TMPFILE => (ENTRY + OPEN, Server::tmpfile),
        opcode::READ => (0, Server::read),
        opcode::WRITE => (size_of::<WriteOut>(), Server::write),
        opcode::STATFS => (size_of::<StatfsOut>(), Server::statfs),
        opcode::FLUSH => (0, Server::flush),
        opcode::FSYNC | opcode::FSYNCDIR => (0, Server::fsync),
        opcode::SYNCFS => (0, Server::syncfs),
        opcode::RELEASE | opcode::RELEASEDIR => (0, Server::release),
        opcode::FALLOCATE => (0, Server::fallocate),
        opcode::LSEEK => (size_of::<LseekOut>(), Server::lseek),
        opcode::COPY_FILE_RANGE => (size_of::<WriteOut>(), Server::copy_file_range),
        opcode::SETXATTR => (0, Server::setxattr),
        opcode::GETXATTR => (0, Server::getxattr),
        opcode::LISTXATTR => (0, Server::listxattr),
        opcode::REMOVEXATTR => (0, Server::removexattr),
        opcode::OPENDIR => (OPEN, Server::opendir),
        opcode::READDIR => (0, Server::readdir),
        opcode::READDIRPLUS => (0, Server::readdirplus),
        opcode::IOCTL => (0, Server::ioctl),
        _ => return None,
    })
}

impl Server {
    /// One that serves mounts below its exports by copies.
    pub fn over(mounts: Arc<dyn HostMounts>) -> Self {
        Self { mounts: Mounts::over(mounts), ..Self::default() }
    }

    /// Serves one request. Gives the number of bytes written to `reply`: 0 for requests that have no
    /// reply, and for those too broken to be answered.
    pub fn handle(&self, request: Buffers<'_>, mut reply: Buffers<'_>) -> usize {
        let Some(mut request) = Request::parse(request) else { return 0 };
        let well_formed = request.delimit();
        match request.header.opcode {
            opcode::FORGET | opcode::BATCH_FORGET => {
                if well_formed.is_ok() && self.session().is_some() {
                    // Nobody hears of an error here, and there is none that would matter.
                    let _unheard = self.forget(&mut request);
                }
                return 0;
            }
            // What is under way is in a system call of the host, which goes on to its end; the protocol allows that.
            opcode::INTERRUPT => return 0,
            _ => {}
        }
        if reply.remaining() < wire::OUT_HEADER {
            return 0;
        }
        let mut body = reply.split_off(wire::OUT_HEADER);
        let result = well_formed.and_then(|()| self.dispatch(&mut request, &mut body));
        let (error, written) = match result {
            Ok(()) => (0, body.consumed()),
            Err(errno) => (-errno.raw_os_error(), 0),
        };
        let len = wire::OUT_HEADER + written;
        // READ, the longest reply, is capped far below 4 GiB.
        let header = OutHeader { len: len as u32, error, unique: request.header.unique };
        if reply.write_all(header.as_bytes()).is_ok() { len } else { 0 }
    }

    fn dispatch(&self, request: &mut Request<'_>, out: &mut Buffers<'_>) -> Result<(), Errno> {
        let code = request.header.opcode;
        if code != opcode::INIT && self.session().is_none() {
            return Err(Errno::IO);
        }
        let (room, handler) = operation(code).ok_or(Errno::NOSYS)?;
        // Before anything is done that could not be reported.
        if out.remaining() < room {
            return Err(Errno::INVAL);
        }
        thread::prepare(self.proc_fds()?)?;
        handler(self, request, out)
    }

    /// Adds an export: see `FsShare::add_export`.
    pub fn add_export(&self, name: &str, fd: OwnedFd, options: ExportOptions) -> io::Result<()> {
        let kind = rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode);
        if !kind.is_dir() && !kind.is_file() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "only a directory or a regular file can be exported",
            ));
        }
        self.proc_fds()?;
        self.exports.add(name, fd, options)
    }

    /// Lets the guest change an export: see `FsShare::make_writable`.
    pub fn make_writable(&self, name: &str) -> bool {
        let found = CString::new(name).ok().and_then(|name| self.exports.find(&name));
        found.as_ref().map(|export| export.make_writable()).is_some()
    }

    /// Removes an export and closes all that the guest had of it. False when there is none of that name.
    pub fn remove_export(&self, name: &str) -> bool {
        let Some(export) = self.exports.remove(name) else { return false };
        self.handles.drop_where(|node| node.key.export == export.id);
        self.nodes.drop_where(|node| node.key.export == export.id);
        self.mounts.drop_export(export.id);
        true
    }

    /// Ends the session: all nodes and handles of the guest are gone.
    pub fn reset(&self) {
        *self.session.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.handles.clear();
        self.nodes.clear();
        self.mounts.clear();
    }

    fn session(&self) -> Option<Session> {
        *self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `/proc/self/fd` of this process, by which a descriptor is opened again with other flags.
    fn proc_fds(&self) -> Result<BorrowedFd<'_>, Errno> {
        if let Some(fd) = self.proc_fds.get() {
            return Ok(fd.as_fd());
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(CWD, c"/proc/self/fd", flags, Mode::empty())?;
        Ok(self.proc_fds.get_or_init(|| fd).as_fd())
    }

    fn ioctl(&self, _request: &mut Request<'_>, _out: &mut Buffers<'_>) -> Result<(), Errno> {
        // ENOSYS would make the guest give up ioctls for good; this is what a file system without any says.
        Err(Errno::NOTTY)
    }
}
