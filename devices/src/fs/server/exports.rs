//! The directories and files that the share shows at its root.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use super::names;

/// How an export is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportOptions {
    /// Every change is refused with EROFS.
    pub read_only: bool,
    /// How long the guest may trust names and attributes without asking. That is how late it can notice a change
    /// made on the host; zero asks each time.
    pub cache: Duration,
    /// How long the guest may trust that a name does not exist. Programs look for their files in many places, so this saves
    /// requests where only the guest makes files; zero asks each time.
    pub cache_absent: Duration,
    /// Whether what is mounted inside the directory on the host is part of it. Otherwise its mount points give EXDEV.
    pub cross_mounts: bool,
    /// Only these names are there in the directory, and it can not be changed: none comes or goes, and it keeps its own
    /// attributes. What the names stand for can be changed as elsewhere. Empty: all that there are.
    pub only: Vec<CString>,
    /// Attributes of security modules that the guest does not have (`security.*` but for `security.capability`) are not
    /// refused but dropped: overlayfs copies those of a file in a lower layer with it, or does not copy it.
    pub drop_labels: bool,
}

impl Default for ExportOptions {
    /// Writable, one second for what is there and none for what is not, mounts and all names included.
    fn default() -> Self {
        let (cache, cache_absent) = (Duration::from_secs(1), Duration::ZERO);
        Self { read_only: false, cache, cache_absent, cross_mounts: true, only: Vec::new(), drop_labels: false }
    }
}

/// One entry of the root.
#[derive(Debug)]
pub struct Export {
    /// Unique for the life of the share, from 1.
    pub id: u64,
    /// Its name in the root.
    pub name: CString,
    /// How it is served.
    pub options: ExportOptions,
    /// The directory or regular file.
    pub fd: Arc<OwnedFd>,
    /// A descriptor to open file handles by, with the number of its mount; None when that does not work.
    pub door: OnceLock<Option<(OwnedFd, u64)>>,
    /// Changes are not refused, whatever the options said at first.
    writable: AtomicBool,
    removed: AtomicBool,
}

impl Export {
    fn new(id: u64, name: CString, options: ExportOptions, fd: Arc<OwnedFd>) -> Arc<Self> {
        let (writable, removed) = (AtomicBool::new(!options.read_only), AtomicBool::new(false));
        Arc::new(Self { id, name, options, fd, door: OnceLock::new(), writable, removed })
    }

    /// Whether the guest may change it.
    pub fn is_writable(&self) -> bool {
        self.writable.load(Ordering::Acquire)
    }

    /// From now on the guest may change it.
    pub fn make_writable(&self) {
        self.writable.store(true, Ordering::Release);
    }

    /// Whether it was taken away: nothing more of it may be opened.
    pub fn is_removed(&self) -> bool {
        self.removed.load(Ordering::Acquire)
    }
}

/// All exports, in the order in which they came.
#[derive(Debug, Default)]
pub struct Exports {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    by_id: BTreeMap<u64, Arc<Export>>,
    last_id: u64,
}

impl Exports {
    /// Adds one.
    ///
    /// # Errors
    /// `InvalidInput` for a name that is no single component, `AlreadyExists`.
    pub fn add(&self, name: &str, fd: OwnedFd, options: ExportOptions) -> io::Result<()> {
        let name = CString::new(name)?;
        names::check(&name)?;
        let mut inner = self.lock();
        if inner.by_id.values().any(|export| export.name == name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        inner.last_id += 1;
        let id = inner.last_id;
        inner.by_id.insert(id, Export::new(id, name, options, Arc::new(fd)));
        Ok(())
    }

    /// Takes one away.
    pub fn remove(&self, name: &str) -> Option<Arc<Export>> {
        let mut inner = self.lock();
        let id = inner.by_id.values().find(|export| export.name.as_bytes() == name.as_bytes())?.id;
        let export = inner.by_id.remove(&id)?;
        export.removed.store(true, Ordering::Release);
        Some(export)
    }

    /// Finds one by its name.
    pub fn find(&self, name: &CStr) -> Option<Arc<Export>> {
        self.lock().by_id.values().find(|export| export.name.as_c_str() == name).cloned()
    }

    /// All with an id of more than `after`.
    pub fn after(&self, after: u64) -> Vec<Arc<Export>> {
        let from = after.saturating_add(1);
        self.lock().by_id.range(from..).map(|(_, export)| Arc::clone(export)).collect()
    }

    /// The id that was given last.
    pub fn last_id(&self) -> u64 {
        self.lock().last_id
    }

    /// Gives the exports the ids that exports of the same names had in `saved`; others get ids after `last_id`.
    pub fn renumber(&self, saved: &[(u64, Vec<u8>)], last_id: u64) {
        let mut inner = self.lock();
        inner.last_id = saved.iter().map(|(id, _)| *id).fold(last_id, u64::max);
        for (_, export) in std::mem::take(&mut inner.by_id) {
            let old = saved.iter().find(|(_, name)| name.as_slice() == export.name.as_bytes());
            let id = old.map(|(id, _)| *id).filter(|id| !inner.by_id.contains_key(id)).unwrap_or_else(|| {
                inner.last_id += 1;
                inner.last_id
            });
            let options = ExportOptions { read_only: !export.is_writable(), ..export.options.clone() };
            let renumbered = Export::new(id, export.name.clone(), options, Arc::clone(&export.fd));
            inner.by_id.insert(id, renumbered);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
