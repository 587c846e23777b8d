//! Artefacts live outside `target/`, each in a folder named by the hash of everything it was built from.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

/// The hash of everything that an artefact is built from.
#[derive(Default)]
pub struct Inputs(Sha256);

impl Inputs {
    /// Starts with the artefact's recipe: bump `recipe` whenever the build steps change their meaning.
    pub fn new(recipe: &str) -> Self {
        Self::default().text("recipe", recipe)
    }

    /// Adds a named piece of text.
    #[must_use]
    pub fn text(mut self, name: &str, value: &str) -> Self {
        for part in [name, value] {
            self.0.update((part.len() as u64).to_le_bytes());
            self.0.update(part);
        }
        self
    }

    /// Adds a file's contents.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn file(mut self, path: &Path) -> Result<Self> {
        let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        self.0.update((bytes.len() as u64).to_le_bytes());
        self.0.update(&bytes);
        Ok(self)
    }

    /// The key: 16 hexadecimal digits.
    pub fn key(self) -> String {
        self.0.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
    }
}

/// The folder that holds all artefacts: `$KATAVM_CACHE`, else `$XDG_CACHE_HOME/katavm`, else `~/.cache/katavm`.
///
/// # Errors
/// When none of these variables nor `HOME` is set.
pub fn root() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("KATAVM_CACHE") {
        return Ok(dir.into());
    }
    if let Some(dir) = std::env::var_os("XDG_CACHE_HOME") {
        return Ok(Path::new(&dir).join("katavm"));
    }
    let home = std::env::var_os("HOME").context("HOME is not set: set KATAVM_CACHE to a folder for built artefacts")?;
    Ok(Path::new(&home).join(".cache/katavm"))
}

/// The folder of the artefact `name` with these `inputs`, made by `build` if it is not there yet.
///
/// `build` fills a scratch folder beside it, which is renamed into place when it succeeded: a
/// half-built artefact is never taken for a whole one, and two builders at once wait for each other.
///
/// # Errors
/// What `build` returned, or a failure to make the folders.
pub fn artefact(name: &str, inputs: Inputs, build: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let root = root()?;
    fs::create_dir_all(&root).with_context(|| format!("cannot make {}", root.display()))?;
    let done = root.join(format!("{name}-{}", inputs.key()));
    if done.exists() {
        return Ok(done);
    }
    let lock = File::create(root.join(format!("{name}.lock")))?;
    lock.lock()?;
    if done.exists() {
        return Ok(done);
    }
    let scratch = root.join(format!("{name}.building"));
    if scratch.exists() {
        fs::remove_dir_all(&scratch).with_context(|| format!("cannot clear {}", scratch.display()))?;
    }
    fs::create_dir(&scratch)?;
    build(&scratch)?;
    fs::rename(&scratch, &done)?;
    Ok(done)
}
