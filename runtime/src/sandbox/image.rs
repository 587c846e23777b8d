//! Which kernel and initramfs the guest boots.

use std::env;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use crate::host::system_message;

/// Why there is nothing to boot.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// No installed guest image.
    #[error(
        "no guest image found: looked for vmlinux and initramfs in {}. Build one with `./just guest-image`, name its \
         folder in KATAVM_GUEST_IMAGE, or give --kernel and --initrd",
        list(.0)
    )]
    NotFound(Vec<Looked>),
    /// A file that was named is not there, or out of reach.
    #[error("{option} {path}: {reason}")]
    Named {
        /// The option that named it.
        option: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
}

/// A folder that has no guest image, or none that this user can reach.
#[derive(Debug)]
pub struct Looked {
    folder: PathBuf,
    error: io::Error,
}

impl fmt::Display for Looked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.folder.display())?;
        if self.error.kind() == ErrorKind::NotFound { Ok(()) } else { write!(f, " ({})", system_message(&self.error)) }
    }
}

fn list(folders: &[Looked]) -> String {
    folders.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// What the guest boots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestImage {
    /// An ELF `vmlinux` or a `bzImage`.
    pub kernel: PathBuf,
    /// With the agent as `/init`.
    pub initramfs: PathBuf,
}

impl GuestImage {
    /// The files that were named, and the installed image's for those that were not: of the first folder that has both
    /// among `$KATAVM_GUEST_IMAGE`, `/usr/share/katavm`, and `guest-image/current` in katavm's cache.
    ///
    /// # Errors
    /// Any [`ImageError`].
    pub fn find(kernel: Option<PathBuf>, initramfs: Option<PathBuf>) -> Result<Self, ImageError> {
        Self::find_among(kernel, initramfs, folders(|name| env::var_os(name)))
    }

    fn find_among(
        kernel: Option<PathBuf>,
        initramfs: Option<PathBuf>,
        folders: Vec<PathBuf>,
    ) -> Result<Self, ImageError> {
        for (option, path) in [("--kernel", &kernel), ("--initrd", &initramfs)] {
            if let Some(path) = path {
                let reason = |error| system_message(&error);
                reach(path).map_err(|error| ImageError::Named { option, path: path.clone(), reason: reason(error) })?;
            }
        }
        if let (Some(kernel), Some(initramfs)) = (&kernel, &initramfs) {
            return Ok(Self { kernel: kernel.clone(), initramfs: initramfs.clone() });
        }
        let mut without = Vec::new();
        for folder in folders {
            let (default_kernel, default_initramfs) = (folder.join("vmlinux"), folder.join("initramfs"));
            match reach(&default_kernel).and_then(|()| reach(&default_initramfs)) {
                Ok(()) => {
                    let kernel = kernel.unwrap_or(default_kernel);
                    return Ok(Self { kernel, initramfs: initramfs.unwrap_or(default_initramfs) });
                }
                Err(error) => without.push(Looked { folder, error }),
            }
        }
        Err(ImageError::NotFound(without))
    }
}

fn reach(path: &Path) -> io::Result<()> {
    fs::metadata(path).map(drop)
}

fn folders(variable: impl Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
    // Who names a folder wants that one and no other.
    if let Some(dir) = variable("KATAVM_GUEST_IMAGE") {
        return vec![dir.into()];
    }
    let cache = variable("KATAVM_CACHE")
        .map(PathBuf::from)
        .or_else(|| variable("XDG_CACHE_HOME").map(|dir| PathBuf::from(dir).join("katavm")))
        .or_else(|| variable("HOME").map(|dir| PathBuf::from(dir).join(".cache/katavm")));
    let mut folders = vec![PathBuf::from("/usr/share/katavm")];
    folders.extend(cache.map(|dir| dir.join("guest-image/current")));
    folders
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_looked_through_in_order() {
        let none = |_: &str| None;
        assert_eq!(folders(none), [PathBuf::from("/usr/share/katavm")]);
        let home = |name: &str| (name == "HOME").then(|| "/h".into());
        assert_eq!(folders(home)[1], PathBuf::from("/h/.cache/katavm/guest-image/current"));
        let named = |name: &str| Some(OsString::from(format!("/{name}")));
        assert_eq!(folders(named), [PathBuf::from("/KATAVM_GUEST_IMAGE")]);
        let cached = |name: &str| (name == "KATAVM_CACHE").then(|| "/c".into());
        assert_eq!(folders(cached)[1], PathBuf::from("/c/guest-image/current"));
    }

    #[test]
    fn a_folder_out_of_reach_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let (none, within) = (dir.path().join("none"), file.join("within"));
        let error = GuestImage::find_among(None, None, vec![none.clone(), within.clone()]).unwrap_err().to_string();
        let folders = format!("in {}, {} (not a directory). Build one", none.display(), within.display());
        assert!(error.contains(&folders), "{error}");
    }

    #[test]
    fn named_files_come_before_the_installed_and_must_exist() {
        let dir = tempfile::tempdir().unwrap();
        let (empty, full) = (dir.path().join("empty"), dir.path().join("full"));
        fs::create_dir(&empty).unwrap();
        fs::create_dir(&full).unwrap();
        let find = |kernel: Option<PathBuf>| {
            GuestImage::find_among(kernel, None, vec![empty.clone(), full.clone()]).map_err(|error| error.to_string())
        };
        assert!(find(None).unwrap_err().contains("no guest image found: looked for vmlinux and initramfs in /"));
        fs::write(full.join("vmlinux"), "").unwrap();
        assert!(find(None).is_err());
        fs::write(full.join("initramfs"), "").unwrap();
        let image = GuestImage { kernel: full.join("vmlinux"), initramfs: full.join("initramfs") };
        assert_eq!(find(None).unwrap(), image);
        let own = dir.path().join("own");
        let missing = find(Some(own.clone())).unwrap_err();
        assert!(missing.starts_with("--kernel /") && missing.ends_with("/own: no such file or directory"), "{missing}");
        fs::write(&own, "").unwrap();
        assert_eq!(find(Some(own.clone())).unwrap(), GuestImage { kernel: own, ..image });
    }
}
