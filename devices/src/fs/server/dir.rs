//! Reading directories.

use std::collections::VecDeque;
use std::ffi::{CStr, CString};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError};

use rustix::fs::{FileType, RawDir, SeekFrom};
use rustix::io::Errno;

use super::Server;
use super::held::Held;
use super::request::{Request, put, put_bytes};
use super::wire::{Attr, Dirent, EntryOut, ROOT_ID, ReadIn};
use crate::virtio::queue::Buffers;

/// Size of the buffer for getdents64(2) in bytes.
const CHUNK: usize = 16 << 10;
/// Cookies of "." and ".." in the root; export `n` has `n + 2`.
const ROOT_ENTRIES: u64 = 2;

/// An entry as the host gave it.
#[derive(Debug)]
struct Entry {
    ino: u64,
    /// Where reading goes on after it: the host's own cookie, good for this directory at any time.
    next: u64,
    kind: FileType,
    name: CString,
}

/// Entries read ahead of the guest.
#[derive(Debug, Default)]
pub struct DirStream {
    /// The cookie of the last entry that the guest got.
    position: u64,
    ahead: VecDeque<Entry>,
}

impl DirStream {
    /// Makes the entry after `offset` the front one, if there is one.
    fn seek(&mut self, dir: &OwnedFd, offset: u64) -> Result<(), Errno> {
        if offset != self.position {
            rustix::fs::seek(dir, SeekFrom::Start(offset))?;
            self.ahead.clear();
            self.position = offset;
        }
        Ok(())
    }

    /// The entry at the front. None at the end of the directory.
    fn front(&mut self, dir: &OwnedFd) -> Result<Option<&Entry>, Errno> {
        if self.ahead.is_empty() {
            self.refill(dir)?;
        }
        Ok(self.ahead.front())
    }

    fn refill(&mut self, dir: &OwnedFd) -> Result<(), Errno> {
        let mut buffer = [MaybeUninit::uninit(); CHUNK];
        let mut entries = RawDir::new(dir, &mut buffer);
        while let Some(entry) = entries.next() {
            let entry = entry?;
            self.ahead.push_back(Entry {
                ino: entry.ino(),
                next: entry.next_entry_cookie(),
                kind: entry.file_type(),
                name: entry.file_name().to_owned(),
            });
            if entries.is_buffer_empty() {
                break;
            }
        }
        Ok(())
    }

    fn advance(&mut self) {
        if let Some(entry) = self.ahead.pop_front() {
            self.position = entry.next;
        }
    }
}

/// The `DT_*` value of a type.
fn kind_bits(kind: FileType) -> u32 {
    if kind == FileType::Unknown { 0 } else { kind.as_raw_mode() >> 12 }
}

/// Room that an entry takes.
fn room(name: &CStr, plus: bool) -> usize {
    let head = if plus { size_of::<EntryOut>() } else { 0 } + size_of::<Dirent>();
    (head + name.count_bytes()).next_multiple_of(8)
}

fn put_entry(out: &mut Buffers<'_>, plus: Option<&EntryOut>, dirent: &Dirent, name: &CStr) -> Result<(), Errno> {
    if let Some(entry) = plus {
        put(out, entry)?;
    }
    put(out, dirent)?;
    put_bytes(out, name.to_bytes())?;
    let len = name.count_bytes();
    put_bytes(out, [0_u8; 8].get(..len.next_multiple_of(8) - len).unwrap_or_default())
}

impl Server {
    pub(super) fn readdir(&self, request: &mut Request<'_>, out: &mut Buffers<'_>) -> Result<(), Errno> {
        self.list(request, out, false)
    }

    pub(super) fn readdirplus(&self, request: &mut Request<'_>, out: &mut Buffers<'_>) -> Result<(), Errno> {
        self.list(request, out, true)
    }

    fn list(&self, request: &mut Request<'_>, out: &mut Buffers<'_>, plus: bool) -> Result<(), Errno> {
        let read: ReadIn = request.read()?;
        let _beyond = out.split_off(read.size as usize);
        if request.header.nodeid == ROOT_ID {
            return self.list_root(read.offset, out, plus);
        }
        let handle = self.handles.get(read.fh, request.header.nodeid)?;
        if handle.node.kind != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        let parent = self.hold(Arc::clone(&handle.node))?;
        let mut stream = handle.stream.lock().unwrap_or_else(PoisonError::into_inner);
        stream.seek(&handle.file, read.offset)?;
        while let Some(entry) = stream.front(&handle.file)? {
            if room(&entry.name, plus) > out.remaining() {
                // A buffer too small for one entry would look like the end.
                return if out.consumed() == 0 { Err(Errno::INVAL) } else { Ok(()) };
            }
            self.put_child(&parent, entry, out, plus)?;
            stream.advance();
        }
        Ok(())
    }

    fn put_child(&self, parent: &Held, entry: &Entry, out: &mut Buffers<'_>, plus: bool) -> Result<(), Errno> {
        let is_dot = matches!(entry.name.to_bytes(), b"." | b"..");
        // What is above an export's root is none of the guest's business.
        let ino = if parent.is_export_root && is_dot { parent.key.ino } else { entry.ino };
        // Nor is a file name of the host that no guest could have made (one with a slash, from a broken file system).
        if !is_dot && (!parent.shows(&entry.name) || super::names::check(&entry.name).is_err()) {
            return Ok(());
        }
        let namelen = entry.name.count_bytes() as u32;
        let dirent = Dirent { ino, off: entry.next, namelen, kind: kind_bits(entry.kind) };
        if !plus {
            return put_entry(out, None, &dirent, &entry.name);
        }
        let known = if is_dot { Err(Errno::NOENT) } else { self.lookup_child(parent, &entry.name) };
        match known {
            Ok((node, stat)) => put_entry(out, Some(&self.entry(&node, &stat)), &dirent, &entry.name),
            // Deleted since the host listed it.
            Err(Errno::NOENT) if !is_dot => Ok(()),
            // Node 0 says: here is a name, look it up when you need it.
            Err(_) => {
                let attr = Attr { ino, mode: kind_bits(entry.kind) << 12, ..Attr::default() };
                put_entry(out, Some(&EntryOut { attr, ..EntryOut::default() }), &dirent, &entry.name)
            }
        }
    }

    fn list_root(&self, offset: u64, out: &mut Buffers<'_>, plus: bool) -> Result<(), Errno> {
        let mut entries: Vec<(u64, u64, CString)> = Vec::new();
        if offset < 1 {
            entries.push((1, ROOT_ID, c".".to_owned()));
        }
        if offset < ROOT_ENTRIES {
            entries.push((ROOT_ENTRIES, ROOT_ID, c"..".to_owned()));
        }
        for export in self.exports.after(offset.saturating_sub(ROOT_ENTRIES)) {
            entries.push((export.id + ROOT_ENTRIES, super::root::FIRST_FILE_INODE + export.id, export.name.clone()));
        }
        for (off, ino, name) in entries {
            if room(&name, plus) > out.remaining() {
                break;
            }
            let kind = if ino == ROOT_ID { kind_bits(FileType::Directory) } else { 0 };
            let dirent = Dirent { ino, off, namelen: name.count_bytes() as u32, kind };
            // Always by LOOKUP: that is what mounts an exported directory.
            let entry = EntryOut { attr: Attr { ino, ..Attr::default() }, ..EntryOut::default() };
            put_entry(out, plus.then_some(&entry), &dirent, &name)?;
        }
        Ok(())
    }
}
