//! Opening and creating files.
//!
//! Only regular files and directories are ever opened on the host; pipes, sockets and devices are the guest
//! kernel's own business, and opening one here could block or do harm.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, Statx, openat2};
use rustix::io::Errno;
use rustix::path::DecInt;

use super::credentials::{as_caller, without_fsetid};
use super::handles::Handle;
use super::held::Held;
use super::inode::Node;
use super::lookup::{self, NAME_ROOM, resolve};
use super::request::{Request, put};
use super::wire::{self, CreateIn, OpenIn, OpenOut, ROOT_ID};
use super::{Server, names};
use crate::virtio::queue::Buffers;

/// How often CREATE tries again when the name comes and goes under it.
const ATTEMPTS: usize = 8;

/// What of the guest's open flags reaches the host. O_APPEND and O_SYNC come with each WRITE; O_DIRECT and
/// O_NOATIME are between the guest's program and the guest's cache.
fn host_flags(flags: u32) -> Result<OFlags, Errno> {
    let flags = OFlags::from_bits_retain(flags);
    let access = flags & OFlags::ACCMODE;
    if access == OFlags::ACCMODE {
        return Err(Errno::INVAL);
    }
    Ok(access | flags & OFlags::TRUNC)
}

fn changes(flags: OFlags) -> bool {
    flags & OFlags::ACCMODE != OFlags::RDONLY || flags.contains(OFlags::TRUNC)
}

impl Server {
    /// Opens what a descriptor stands for once more, with other flags.
    fn reopen(&self, fd: impl AsFd, flags: OFlags) -> Result<OwnedFd, Errno> {
        let file = rustix::fs::openat(self.proc_fds()?, DecInt::from_fd(fd), flags | OFlags::CLOEXEC, Mode::empty())?;
        self.admit(file)
    }

    /// Opens the regular file `node`.
    pub(super) fn open_regular(&self, node: &Held, flags: OFlags) -> Result<OwnedFd, Errno> {
        match node.kind {
            FileType::RegularFile => self.reopen(node, flags),
            FileType::Directory => Err(Errno::ISDIR),
            FileType::Symlink => Err(Errno::LOOP),
            _ => Err(Errno::NXIO),
        }
    }

    /// Opens the directory `node`.
    pub(super) fn open_directory(&self, node: &Held) -> Result<OwnedFd, Errno> {
        if node.kind != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        self.reopen(node, OFlags::RDONLY | OFlags::DIRECTORY)
    }

    pub(super) fn open(&self, request: &mut Request<'_>, out: &mut Buffers<'_>) -> Result<(), Errno> {
        let open: OpenIn = request.read()?;
        let node = self.node(request.header.nodeid)?;
        let reply = self.open_node(&node, host_flags(open.flags)?, kill_for(open.open_flags, request))?;
        put(out, &reply)
    }

    pub(super) fn opendir(&self, request: &mut Request<'_>, out: &mut Buffers<'_>) -> Result<(), Errno> {
        let _open: OpenIn = request.read()?;
        if request.header.nodeid == ROOT_ID {
            return put(out, &OpenOut::default());
        }
        let node = self.node(request.header.nodeid)?;
        let file = self.open_directory(&node)?;
        let fh = self.handles.add(Handle::new(Arc::clone(node.node()), file, OFlags::RDONLY.bits()))?;
        put(out, &OpenOut { fh, ..OpenOut::default() })
    }

    fn open_node(&self, node: &Held, flags: OFlags, kill_for: Option<u32>) -> Result<OpenOut, Errno> {
        if changes(flags) {
            node.writable()?;
        }
        let act = || self.open_regular(node, flags);
        let file = match kill_for.filter(|_| flags.contains(OFlags::TRUNC)) {
            Some(gid) => without_fsetid(gid, act)?,
            None => act()?,
        };
        // Close-to-open consistency: the guest keeps the pages it has only if the file is as it last was told.
        let unchanged = node.tell(&lookup::stat(&file)?);
        self.reply_open(node, file, flags, unchanged)
    }

    fn reply_open(&self, node: &Held, file: OwnedFd, flags: OFlags, unchanged: bool) -> Result<OpenOut, Errno> {
        let handle = Handle::new(Arc::clone(node.node()), file, flags.bits());
        let mut open_flags = if unchanged { wire::FOPEN_KEEP_CACHE } else { 0 };
        if !handle.is_writable() {
            open_flags |= wire::FOPEN_NOFLUSH;
        }
        let fh = self.handles.add(handle)?;
        Ok(OpenOut { fh, open_flags, padding: 0 })
    }

    pub(super) fn create(&self, request: &mut Request<'_>, out: &mut Buffers<'_>) -> Result<(), Errno> {
        let create: CreateIn = request.read()?;
        let caller = self.caller(request, create.umask)?;
        let flags = host_flags(create.flags)?;
        let parent = self.directory_to_change(request.header.nodeid)?;
        let name = request.rest(NAME_ROOM)?;
        let name = names::only(&name)?;
        let kill_for = kill_for(create.open_flags, request);
        let exclusive = OFlags::from_bits_retain(create.flags).contains(OFlags::EXCL);
        let mode = Mode::from_bits_retain(create.mode & 0o7777);
        let make = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC | flags & OFlags::ACCMODE;
        for _ in 0..ATTEMPTS {
            // Always exclusive: what is there already may be a pipe, on which an open would block.
            match as_caller(&caller, || openat2(&parent, name, make, mode, resolve(&parent))) {
                Ok(file) => return self.reply_created(&parent, Some(name), self.admit(file)?, flags, out),
                Err(Errno::EXIST) if !exclusive => {}
                Err(error) => return Err(error),
            }
            match self.lookup_child(&parent, name) {
                Ok((node, stat)) => return self.reply_existing(&node, &stat, flags, kill_for, out),
                Err(Errno::NOENT) => {}
                Err(error) => return Err(error),
            }
        }
        Err(Errno::BUSY)
    }

    fn reply_existing(
        &self,
        node: &Held,
        stat: &Statx,
        flags: OFlags,
        kill_for: Option<u32>,
        out: &mut Buffers<'_>,
    ) -> Result<(), Errno> {
        let entry = self.entry(node, stat);
        match self.open_node(node, flags, kill_for) {
            Ok(open) => {
                put(out, &entry)?;
                put(out, &open)
            }
            Err(error) => {
                // The guest does not learn of the node, so it will not forget it.
                self.nodes.forget(node.id, 1);
                Err(error)
            }
        }
    }

    pub(super) fn tmpfile(&self, request: &mut Request<'_>, out: &mut Buffers<'_>) -> Result<(), Errno> {
        let create: CreateIn = request.read()?;
        let caller = self.caller(request, create.umask)?;
        let flags = host_flags(create.flags)?;
        let parent = self.directory_to_change(request.header.nodeid)?;
        // The name that follows is no name. With O_EXCL the file can never be linked.
        let exclusive = OFlags::from_bits_retain(create.flags) & OFlags::EXCL;
        let make = OFlags::TMPFILE | OFlags::CLOEXEC | flags & OFlags::ACCMODE | exclusive;
        let mode = Mode::from_bits_retain(create.mode & 0o7777);
        let file = as_caller(&caller, || openat2(&parent, c".", make, mode, ResolveFlags::empty()))?;
        self.reply_created(&parent, None, self.admit(file)?, flags, out)
    }

    /// Tells the guest of the new file `file`, which is in no table yet.
    fn reply_created(
        &self,
        parent: &Node,
        name: Option<&CStr>,
        file: OwnedFd,
        flags: OFlags,
        out: &mut Buffers<'_>,
    ) -> Result<(), Errno> {
        // By descriptor, as the name may be another file's by now.
        let (node, stat) = self.adopt(parent, name, self.reopen(&file, OFlags::PATH)?)?;
        let entry = self.entry(&node, &stat);
        let open = self.reply_open(&node, file, flags & OFlags::ACCMODE, true);
        match open {
            Ok(open) => {
                put(out, &entry)?;
                put(out, &open)
            }
            Err(error) => {
                self.nodes.forget(node.id, 1);
                Err(error)
            }
        }
    }
}

/// The group of a caller for whom set-id bits go when a file is cut off.
fn kill_for(open_flags: u32, request: &Request<'_>) -> Option<u32> {
    (open_flags & wire::OPEN_KILL_SUIDGID != 0).then_some(request.header.gid)
}
