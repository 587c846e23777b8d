//! A folder as it is: names, kinds, owners, modes and contents, to be compared with what it is later.

use std::collections::BTreeMap;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

/// What is known of one file.
#[derive(Debug, PartialEq, Eq)]
struct File {
    mode: u32,
    owner: (u32, u32),
    links: u64,
    /// Of a regular file's bytes, or of a link's target.
    contents: u64,
    /// A regular file's last change, nanoseconds and all; what is in a folder may come and go.
    changed: Option<(i64, i64)>,
}

/// The files of a folder.
pub struct Manifest {
    folder: PathBuf,
    except: PathBuf,
    files: BTreeMap<PathBuf, File>,
}

impl Manifest {
    /// Reads everything in `folder` but `except`, which is named from there.
    ///
    /// # Errors
    /// When something cannot be read.
    pub fn of(folder: &Path, except: &str) -> Result<Self> {
        let mut manifest = Self { folder: folder.into(), except: folder.join(except), files: BTreeMap::new() };
        manifest.read(folder).with_context(|| format!("cannot read {}", folder.display()))?;
        ensure!(!manifest.files.is_empty(), "{} is empty", folder.display());
        Ok(manifest)
    }

    fn read(&mut self, folder: &Path) -> Result<()> {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path == self.except {
                continue;
            }
            let metadata = path.symlink_metadata()?;
            let mut hasher = DefaultHasher::new();
            if metadata.is_file() {
                fs::read(&path)?.hash(&mut hasher);
            } else if metadata.is_symlink() {
                fs::read_link(&path)?.as_os_str().as_bytes().hash(&mut hasher);
            }
            let file = File {
                mode: metadata.mode(),
                owner: (metadata.uid(), metadata.gid()),
                links: metadata.nlink(),
                contents: hasher.finish(),
                changed: metadata.is_file().then(|| (metadata.mtime(), metadata.mtime_nsec())),
            };
            self.files.insert(path.clone(), file);
            if metadata.is_dir() {
                self.read(&path)?;
            }
        }
        Ok(())
    }

    /// Reads it again.
    ///
    /// # Errors
    /// What has come, gone or changed.
    pub fn expect_same(&self) -> Result<()> {
        let mut now = Self { folder: self.folder.clone(), except: self.except.clone(), files: BTreeMap::new() };
        now.read(&self.folder)?;
        for (path, file) in &self.files {
            let other = now.files.remove(path).with_context(|| format!("{} is gone", path.display()))?;
            ensure!(*file == other, "{} is {other:?}, was {file:?}", path.display());
        }
        let new: Vec<_> = now.files.keys().collect();
        ensure!(new.is_empty(), "new in {}: {new:?}", self.folder.display());
        Ok(())
    }
}
