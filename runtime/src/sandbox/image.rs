//! Which kernel and initramfs the guest boots.

use std::env;
use std::ffi::OsString;
use std::path::PathBuf;

/// Why there is nothing to boot.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// No installed guest image.
    #[error(
        "no guest image found: looked for vmlinux and initramfs in {}. Build one with `./just guest-image`, name its \
         folder in KATAVM_GUEST_IMAGE, or give --kernel and --initrd",
        list(.0)
    )]
    NotFound(Vec<PathBuf>),
    /// A file that was named is not there.
    #[error("{option} {path}: no such file")]
    Missing {
        /// The option or variable that named it.
        option: &'static str,
        /// The file.
        path: PathBuf,
    },
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
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
            if let Some(path) = path.as_ref().filter(|path| !path.exists()) {
                return Err(ImageError::Missing { option, path: path.clone() });
            }
        }
        if let (Some(kernel), Some(initramfs)) = (&kernel, &initramfs) {
            return Ok(Self { kernel: kernel.clone(), initramfs: initramfs.clone() });
        }
        let images = folders.iter().map(|dir| (dir.join("vmlinux"), dir.join("initramfs")));
        let mut whole = images.filter(|(kernel, initramfs)| kernel.exists() && initramfs.exists());
        let Some((default_kernel, default_initramfs)) = whole.next() else {
            return Err(ImageError::NotFound(folders));
        };
        Ok(Self { kernel: kernel.unwrap_or(default_kernel), initramfs: initramfs.unwrap_or(default_initramfs) })
    }
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
    use std::fs;

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
        assert!(find(Some(own.clone())).unwrap_err().starts_with("--kernel /"));
        fs::write(&own, "").unwrap();
        assert_eq!(find(Some(own.clone())).unwrap(), GuestImage { kernel: own, ..image });
    }
}
