//! virtio-fs: directories and files of the host, served to the guest by a file server in this process.
//!
//! [`FsShare`] is what the runtime holds: it adds and removes [exports](FsShare::add_export) while the guest
//! runs. [`Fs`] is the virtio device. `docs/virtiofs.md` tells what is negotiated with the guest and why.

mod device;
mod pool;
mod server;
mod state;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub use device::Fs;
pub use server::{ExportOptions, HostMounts, MountEntry, RestoreReport};
pub use state::{FileState, FsState, HandleState, NodeState};

use crate::virtio::queue::Buffers;
use server::Server;

/// The files that one guest is served. Clones are the same share; any thread may use them.
#[derive(Clone, Default)]
pub struct FsShare {
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    server: Server,
    attached: AtomicBool,
}

impl FsShare {
    /// A share without exports: an empty, read-only root directory.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The same; mounts of the host below exports are served by copies, and so can be unmounted there. Whoever has it
    /// calls [`refresh_mounts`](Self::refresh_mounts).
    #[must_use]
    pub fn over(mounts: Arc<dyn HostMounts>) -> Self {
        Self { inner: Arc::new(Inner { server: Server::over(mounts), attached: AtomicBool::new(false) }) }
    }

    /// Closes what the guest has of mounts that are not there any more, so that their file systems are let go of. To be
    /// called whenever the mount table has changed.
    pub fn refresh_mounts(&self) {
        self.inner.server.refresh_mounts();
    }

    /// Shows a directory, or a single regular file, as `name` in the root.
    ///
    /// The descriptor may be one with O_PATH. The guest can reach what is beneath the directory and nothing
    /// else. Directories on other file systems than their parents become file systems of their own in the guest.
    /// The process must not fork between this and the guest's requests: they use its `/proc/self/fd`.
    ///
    /// # Errors
    /// `InvalidInput` for a name that is no single path component or a descriptor of something
    /// else; `AlreadyExists`; when `/proc` cannot be opened.
    pub fn add_export(&self, name: &str, fd: OwnedFd, options: ExportOptions) -> io::Result<()> {
        self.inner.server.add_export(name, fd, options)
    }

    /// Lets the guest change an export that was read-only, without a break for who uses it. False when there is none of
    /// that name.
    pub fn make_writable(&self, name: &str) -> bool {
        self.inner.server.make_writable(name)
    }

    /// Takes an export away and closes all its files; the guest gets ESTALE for them. False when there is none of that name.
    ///
    /// A guest that has it mounted should unmount it before.
    pub fn remove_export(&self, name: &str) -> bool {
        self.inner.server.remove_export(name)
    }

    /// Serves one FUSE request; gives the number of bytes written to `reply`.
    pub fn handle(&self, request: Buffers<'_>, reply: Buffers<'_>) -> usize {
        self.inner.server.handle(request, reply)
    }

    /// The state for a snapshot. No request may be under way.
    #[must_use]
    pub fn save(&self) -> FsState {
        self.inner.server.save()
    }

    /// Takes up a saved state, in this process or another. The exports must have been added before, under the same names.
    ///
    /// Files are found again by path and known by their inode numbers. What is not the same file any more is
    /// stale to the guest, as are deleted files that it had open: they have no name to find them by.
    pub fn restore(&self, state: &FsState) -> RestoreReport {
        self.inner.server.restore(state)
    }

    fn reset(&self) {
        self.inner.server.reset();
    }

    fn attach(&self) -> io::Result<()> {
        if self.inner.attached.swap(true, Ordering::AcqRel) {
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, "the share serves another virtio-fs device"));
        }
        Ok(())
    }

    fn detach(&self) {
        self.inner.server.reset();
        self.inner.attached.store(false, Ordering::Release);
    }
}
