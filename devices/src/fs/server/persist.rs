//! Saving the server's state, and taking it up again on the same exports.

use std::collections::HashMap;
use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, PoisonError};

use log::warn;
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;
use rustix::path::DecInt;

use super::exports::Export;
use super::handles::Handle;
use super::held::Held;
use super::inode::{Found, Key, Node, Place};
use super::{Server, lookup};
use crate::fs::state::{FileState, FsState, HandleState, NodeState};

/// Ids of a snapshot beyond this are refused: no guest gets that far, and counting on from them must not wrap.
const ID_MAX: u64 = 1 << 62;

/// What came back. The guest gets ESTALE or EBADF for what did not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RestoreReport {
    /// Nodes that are the same files as before.
    pub nodes: usize,
    /// Nodes whose files are gone, or others now.
    pub stale_nodes: usize,
    /// Open files that are open again.
    pub handles: usize,
    /// Open files that could not be opened again.
    pub stale_handles: usize,
}

impl Server {
    /// The state as it is now. No request may be under way.
    pub fn save(&self) -> FsState {
        let exports = self.exports.after(0);
        let roots: HashMap<u64, Vec<u8>> =
            exports.iter().filter_map(|export| Some((export.id, self.path_of(&export.fd).ok()?))).collect();
        let (nodes, last_node) = self.nodes.snapshot();
        let nodes = nodes.into_iter().map(|(id, lookups, node)| {
            let file = node.and_then(|node| self.locate(&node, roots.get(&node.key.export)?));
            NodeState { id, lookups, file }
        });
        let (handles, last_handle) = self.handles.snapshot();
        let handles = handles.iter().map(|(fh, handle)| HandleState {
            fh: *fh,
            node: handle.node.id,
            flags: handle.flags & libc::O_ACCMODE.cast_unsigned(),
        });
        FsState {
            session: self.session(),
            nodes: nodes.collect(),
            handles: handles.collect(),
            exports: exports.iter().map(|export| (export.id, export.name.to_bytes().to_vec())).collect(),
            last_export: self.exports.last_id(),
            last_node,
            last_handle,
        }
    }

    /// Takes up `state`, on exports that were added under the same names before.
    pub fn restore(&self, state: &FsState) -> RestoreReport {
        self.reset();
        let named: Vec<_> = state.exports.iter().filter(|(id, _)| (1..ID_MAX).contains(id)).cloned().collect();
        self.exports.renumber(&named, state.last_export.min(ID_MAX));
        let mut report = RestoreReport::default();
        let exports: HashMap<u64, Arc<Export>> =
            self.exports.after(0).into_iter().map(|export| (export.id, export)).collect();
        // Device numbers may differ after a reboot or a new mount, but one stays one.
        let mut devices = HashMap::new();
        let files = state.nodes.iter().filter_map(|node| Some((node.file.as_ref()?, node.id)));
        let ids: HashMap<_, _> = files.map(|(file, id)| ((file.export, file.path.as_slice()), id)).collect();
        let sound = |saved: &&NodeState| (super::wire::ROOT_ID + 1..ID_MAX).contains(&saved.id) && saved.lookups > 0;
        for saved in state.nodes.iter().filter(sound) {
            let found = saved.file.as_ref().and_then(|file| {
                let found = self.find(exports.get(&file.export)?, file);
                found.inspect_err(|error| warn!("node {} is not restored: {error}", saved.id)).ok()
            });
            let found = found.zip(saved.file.as_ref()).and_then(|(found, file)| {
                let dev = Key::of(&found.export, &found.stat).dev;
                (*devices.entry(file.dev).or_insert(dev) == dev).then_some(found)
            });
            let found =
                found.map(|found| Found { place: saved.file.as_ref().and_then(|file| place(file, &ids)), ..found });
            *(if found.is_some() { &mut report.nodes } else { &mut report.stale_nodes }) += 1;
            self.nodes.restore(saved.id, saved.lookups, found);
            self.make_room();
        }
        self.nodes.reserve_ids(state.last_node.min(ID_MAX));
        for saved in &state.handles {
            match self.open_again(saved) {
                Ok(handle) => {
                    self.handles.restore(saved.fh, handle);
                    report.handles += 1;
                }
                Err(error) => {
                    warn!("open file {} is not restored: {error}", saved.fh);
                    report.stale_handles += 1;
                }
            }
        }
        self.handles.reserve(state.last_handle.min(ID_MAX));
        *self.session.lock().unwrap_or_else(PoisonError::into_inner) = state.session;
        report
    }

    /// The host path of a descriptor, as the kernel knows it.
    pub(super) fn path_of(&self, fd: impl AsFd) -> Result<Vec<u8>, Errno> {
        rustix::fs::readlinkat(self.proc_fds()?, DecInt::from_fd(fd), Vec::new()).map(CString::into_bytes)
    }

    /// Where `node` is beneath its export, if it can be found there.
    fn locate(&self, node: &Arc<Node>, root: &[u8]) -> Option<FileState> {
        let key = node.key;
        let is_at = |path: Vec<u8>| {
            let file =
                FileState { export: key.export, path, dev: key.dev, ino: key.ino, is_submount: node.is_submount };
            // The kernel marks deleted files in the path itself, so only trying tells what it means.
            let found = self.find(&node.export, &file).ok()?;
            let is_it = node.mark().is_none_or(|mark| mark.is_of(&found.fd, &found.stat));
            (is_it && Key::of(&found.export, &found.stat) == key).then_some(file)
        };
        // One that was opened by a handle may have no path to the kernel.
        let kernels = self.path_in_export(node, root).and_then(is_at);
        kernels.or_else(|| self.path_by_names(node).and_then(is_at))
    }

    /// The path of `node` as the guest saw it.
    fn path_by_names(&self, node: &Arc<Node>) -> Option<Vec<u8>> {
        let mut names = Vec::new();
        let mut node = Arc::clone(node);
        while !node.is_export_root {
            let (parent, name) = node.place()?;
            names.push(name);
            node = self.nodes.get(parent).ok().filter(|_| names.len() < libc::PATH_MAX as usize)?;
        }
        Some(names.iter().rev().map(|name| name.to_bytes()).collect::<Vec<_>>().join(&b'/'))
    }

    /// The path of `node` beneath its export, whose own path is `root`.
    fn path_in_export(&self, node: &Arc<Node>, root: &[u8]) -> Option<Vec<u8>> {
        if node.is_export_root {
            return Some(Vec::new());
        }
        let path = self.path_of(node.open_fd()?).ok()?;
        let Some(mounted) = &node.mount else {
            let rest = path.strip_prefix(root)?;
            // The root of a mount or of everything ends with a slash already.
            let rest = if root.ends_with(b"/") { rest } else { rest.strip_prefix(b"/")? };
            return Some(rest.to_vec());
        };
        let (at, name) = mounted.at();
        let directory = self.path_in_export(at, root).or_else(|| self.path_by_names(at))?;
        let parts = [directory.as_slice(), name.to_bytes(), path.strip_prefix(b"/")?];
        Some(parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(&b'/'))
    }

    /// The file at a path, a step at a time.
    fn walk(&self, export: &Arc<Export>, path: &[u8]) -> Result<Found, Errno> {
        let mut found = super::root::export_root(export)?;
        for name in path.split(|byte| *byte == b'/') {
            let name = CString::new(name).map_err(|_| Errno::INVAL)?;
            let fd = Arc::clone(&found.fd);
            found = self.find_child(&Held::new(Node::unlisted(found), fd), super::names::check(&name)?)?;
        }
        Ok(found)
    }

    fn find(&self, export: &Arc<Export>, file: &FileState) -> Result<Found, Errno> {
        let found = if file.path.is_empty() {
            super::root::export_root(export)?
        } else {
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
            let path = CString::new(file.path.as_slice()).map_err(|_| Errno::INVAL)?;
            match openat2(&export.fd, &path, flags, Mode::empty(), resolve | ResolveFlags::NO_XDEV) {
                Ok(fd) => {
                    let fd = self.admit(fd)?;
                    let stat = lookup::stat(&fd)?;
                    let (fd, export, is_submount) = (Arc::new(fd), Arc::clone(export), file.is_submount);
                    Found { fd, stat, export, is_export_root: false, is_submount, mount: None, place: None }
                }
                Err(Errno::XDEV) => self.walk(export, &file.path)?,
                Err(error) => return Err(error),
            }
        };
        if found.stat.stx_ino == file.ino { Ok(found) } else { Err(Errno::STALE) }
    }

    fn open_again(&self, saved: &HandleState) -> Result<Handle, Errno> {
        if !(1..ID_MAX).contains(&saved.fh) {
            return Err(Errno::INVAL);
        }
        let node = self.node(saved.node)?;
        let flags = OFlags::from_bits_retain(saved.flags) & OFlags::ACCMODE;
        if flags != OFlags::RDONLY {
            node.writable()?;
        }
        let file: OwnedFd = if node.kind == FileType::Directory {
            self.open_directory(&node)?
        } else {
            self.open_regular(&node, flags)?
        };
        Ok(Handle::new(Arc::clone(node.node()), file, flags.bits()))
    }
}

/// Where a file of a snapshot is, if its directory is in the snapshot as well.
fn place(file: &FileState, ids: &HashMap<(u64, &[u8]), u64>) -> Option<Place> {
    let slash = file.path.iter().rposition(|byte| *byte == b'/');
    let (directory, name) = match slash {
        Some(slash) => (file.path.get(..slash)?, file.path.get(slash + 1..)?),
        None => (&[][..], file.path.as_slice()),
    };
    let name = CString::new(name).ok().filter(|name| !name.is_empty())?;
    Some((*ids.get(&(file.export, directory))?, name.into()))
}
