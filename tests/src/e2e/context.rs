//! What a case has: a scratch folder, the guest image, and places to keep what explains a failure.

use std::cell::{Cell, RefCell};
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use katavm_guest_image::support::cache;
use tempfile::TempDir;

use super::cri::{Flavour, Node};
use super::run::Shell;

/// How long a case may take, emulated and with others beside it.
pub const CASE_LIMIT: Duration = Duration::from_secs(900);

/// Whether this is a lab, which may be changed at will, and no machine of anybody's: nothing else happens in it, so
/// everything that is new is ours.
#[must_use]
pub fn is_lab() -> bool {
    env::var_os("KATAVM_LAB").is_some()
}

/// Where it is kept what explains the failure of the case `name`.
#[must_use]
pub fn kept(name: &str) -> PathBuf {
    let out = env::var_os("KATAVM_OUT").map_or_else(|| PathBuf::from("out"), PathBuf::from);
    out.join("e2e").join(name.replace("::", "-"))
}

/// What the cases of one group share; it goes with the last of them.
#[derive(Default)]
pub struct Group {
    /// A shell in a guest, started by the first case that wants it.
    pub shell: RefCell<Option<Shell>>,
    /// A node of Kubernetes, likewise.
    pub node: RefCell<Option<Node>>,
    /// Which one that is.
    pub flavour: Cell<Flavour>,
}

/// The surroundings of one case. Everything in the scratch folder goes when the case ends.
pub struct Context {
    name: String,
    group: Rc<Group>,
    limit: Duration,
    scratch: TempDir,
    notes: RefCell<Vec<(String, Vec<u8>)>>,
}

impl Context {
    /// Surroundings for the case `name`, which shares nothing.
    ///
    /// # Errors
    /// When no scratch folder can be made.
    pub fn new(name: &str) -> Result<Self> {
        Self::in_group(name, Rc::default(), CASE_LIMIT)
    }

    /// Surroundings for the case `name` in a group, which may take so long.
    ///
    /// # Errors
    /// When no scratch folder can be made.
    pub fn in_group(name: &str, group: Rc<Group>, limit: Duration) -> Result<Self> {
        let scratch = TempDir::with_prefix("katavm-e2e-").context("cannot make a scratch folder")?;
        Ok(Self { name: name.into(), group, limit, scratch, notes: RefCell::default() })
    }

    /// How long a script of the case may take: so that there is time to look around and to clean up after one that stands still.
    #[must_use]
    pub fn script_limit(&self) -> Duration {
        self.limit * 2 / 3
    }

    /// What it shares with the other cases of its group.
    #[must_use]
    pub fn group(&self) -> &Group {
        &self.group
    }

    /// The scratch folder.
    #[must_use]
    pub fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    /// A file of the guest image: `vmlinux`, `bzImage`, `initramfs`, `kernel-release`.
    ///
    /// # Errors
    /// When the image has not been built.
    pub fn image(&self, file: &str) -> Result<PathBuf> {
        let path = cache::root()?.join("guest-image/current").join(file);
        anyhow::ensure!(path.exists(), "{} is missing: run ./just guest-image", path.display());
        Ok(path)
    }

    /// The release of the guest image's kernel.
    ///
    /// # Errors
    /// When the image has not been built.
    pub fn kernel_release(&self) -> Result<String> {
        Ok(fs::read_to_string(self.image("kernel-release")?)?.trim().to_string())
    }

    /// Remembers something that explains a failure of this case.
    pub fn note(&self, name: &str, bytes: impl Into<Vec<u8>>) {
        self.notes.borrow_mut().push((name.to_string(), bytes.into()));
    }

    /// Writes all notes and the error to the output folder; returns where.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn keep(&self, error: &str) -> Result<PathBuf> {
        let folder = kept(&self.name);
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("error"), error)?;
        for (name, bytes) in self.notes.borrow().iter() {
            fs::write(folder.join(name), bytes)?;
        }
        Ok(folder)
    }
}
