//! The folders that the lab shows at their own paths.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use katavm_guest_image::support::cache;

use super::job::{Access, Job};

/// Variables that go into the lab besides every `KATAVM_*`.
const PASSED: [&str; 6] = ["TERM", "COLORTERM", "NO_COLOR", "RUST_LOG", "RUST_BACKTRACE", "FIRECRACKER"];

/// Where things are outside, and so inside as well.
#[derive(Debug, Clone)]
pub struct Places {
    /// The checkout, read-only inside.
    pub checkout: PathBuf,
    /// The folder of `katavm` and the shim, first in the search path.
    pub bin_dir: PathBuf,
    /// The cache of built artefacts; what is written there inside is forgotten.
    pub cache: PathBuf,
    /// `$KATAVM_OUT`: what is written here comes back.
    pub out: PathBuf,
    /// More folders to show.
    pub extra: Vec<(PathBuf, Access)>,
}

impl Places {
    /// The usual places: the checkout around the current folder, `bin_dir` or else `$KATAVM_BIN_DIR` or else
    /// the `lab` profile's folder in cargo's target folder.
    ///
    /// # Errors
    /// When a folder cannot be made or resolved.
    pub fn find(bin_dir: Option<PathBuf>) -> Result<Self> {
        let checkout = find_checkout()?;
        let bin_dir = bin_dir.or_else(|| env::var_os("KATAVM_BIN_DIR").map(PathBuf::from)).unwrap_or_else(|| {
            env::var_os("CARGO_TARGET_DIR").map_or_else(|| checkout.join("target"), PathBuf::from).join("lab")
        });
        let out = checkout.join("out");
        Ok(Self {
            bin_dir: made(&bin_dir)?,
            cache: made(&cache::root()?)?,
            out: made(&out)?,
            checkout,
            extra: Vec::new(),
        })
    }

    /// A job with these folders.
    #[must_use]
    pub fn job(&self, argv: Vec<String>) -> Job {
        let mut job = Job {
            argv,
            env: Vec::new(),
            cwd: self.checkout.clone(),
            shares: Vec::new(),
            terminal: None,
            systemd: false,
            heartbeat: true,
        };
        job.share(&self.checkout, Access::ReadOnly);
        job.share(&self.bin_dir, Access::ReadOnly);
        job.share(&self.cache, Access::Scratch);
        job.share(&self.out, Access::Writable);
        for (path, access) in &self.extra {
            job.share(path, *access);
        }
        for (name, value) in self.environment() {
            job.set_env(&name, &value);
        }
        if let Ok(current) = env::current_dir()
            && job.shares.iter().any(|share| current.starts_with(&share.path))
        {
            job.cwd = current;
        }
        job
    }

    /// The command's environment.
    fn environment(&self) -> Vec<(String, String)> {
        let mut list: Vec<(String, String)> =
            env::vars().filter(|(name, _)| PASSED.contains(&name.as_str()) || name.starts_with("KATAVM_")).collect();
        let path = format!("{}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", self.bin_dir.display());
        let own = [
            ("PATH", path),
            ("HOME", "/root".into()),
            ("USER", "root".into()),
            ("SHELL", "/bin/bash".into()),
            ("LANG", "C.UTF-8".into()),
            ("XDG_RUNTIME_DIR", "/run/user/0".into()),
            ("KATAVM_CACHE", self.cache.display().to_string()),
            ("KATAVM_OUT", self.out.display().to_string()),
            ("KATAVM_BIN_DIR", self.bin_dir.display().to_string()),
            ("KATAVM_LAB", "1".into()),
        ];
        list.extend(own.map(|(name, value)| (name.to_string(), value)));
        list
    }
}

/// Makes a folder if need be and gives its absolute path without links.
fn made(path: &Path) -> Result<PathBuf> {
    fs::create_dir_all(path).with_context(|| format!("cannot make the folder {}", path.display()))?;
    path.canonicalize().with_context(|| format!("cannot resolve {}", path.display()))
}

/// The checkout around the current folder, else the one that this program was built from.
fn find_checkout() -> Result<PathBuf> {
    let current = env::current_dir().context("cannot tell the current folder")?;
    let built_from = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    current
        .ancestors()
        .chain(built_from)
        .find(|dir| dir.join("guest-image/Cargo.toml").is_file() && dir.join("tests/Cargo.toml").is_file())
        .context("no katavm checkout here: run this inside one")?
        .canonicalize()
        .context("cannot resolve the checkout's path")
}
