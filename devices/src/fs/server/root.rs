//! The root of the share: a read-only directory of the exports, which exists on no disk.

use std::ffi::CStr;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{FileType, Statx};
use rustix::io::Errno;

use super::exports::Export;
use super::held::Held;
use super::inode::Found;
use super::wire::{Attr, ROOT_ID};
use super::{Server, lookup};

/// Inode numbers of exported files start here: they stand on the root's file system, whatever file system they are on
/// at the host, so the numbers of those could collide.
pub const FIRST_FILE_INODE: u64 = 1 << 32;

/// Attributes of the root. They never change, so that nothing need be asked for long.
pub const CACHE: Duration = Duration::from_secs(1);

/// What `stat` shows of the root.
pub fn attr() -> Attr {
    Attr { ino: ROOT_ID, mode: libc::S_IFDIR | 0o755, nlink: 2, blksize: 4096, ..Attr::default() }
}

impl Server {
    /// The node of the export `name`; counts one lookup.
    pub(super) fn lookup_export(&self, name: &CStr) -> Result<(Held, Statx), Errno> {
        let export = self.exports.find(name).ok_or(Errno::NOENT)?;
        let found = export_root(&export)?;
        self.intern(found)
    }
}

/// The export's own directory or file.
pub fn export_root(export: &Arc<Export>) -> Result<Found, Errno> {
    let stat = lookup::stat(&export.fd)?;
    let is_submount = FileType::from_raw_mode(stat.stx_mode.into()) == FileType::Directory;
    Ok(Found {
        fd: Arc::clone(&export.fd),
        stat,
        export: Arc::clone(export),
        is_export_root: true,
        is_submount,
        mount: None,
        place: None,
    })
}
