//! A bundle and its `config.json` (OCI runtime specification 1.2): read, checked, and every field of it accounted for.

mod fields;
mod honoured;
mod validate;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;
use serde_json::Value;

pub use honoured::{Unhonoured, unhonoured};

use crate::host::{self, system_message};

/// Why a bundle cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// No such folder.
    #[error("cannot open the bundle {path}: {reason}")]
    Bundle {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// It has no configuration.
    #[error(
        "JSON specification file {0} not found: BUNDLE must be a folder that holds config.json and the root file system"
    )]
    NoConfig(PathBuf),
    /// It cannot be read.
    #[error("cannot read {path}: {reason}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// It is no JSON, or not the specification's.
    #[error("{path}: line {line}, column {column}: {reason}")]
    Json {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// From 1; 0 before the line's first character.
        column: usize,
        /// What is wrong there.
        reason: String,
    },
    /// It says what cannot be.
    #[error("{path}: {reason}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Field and fault.
        reason: String,
    },
    /// The root file system is not there.
    #[error("invalid rootfs: stat {path}: {reason}")]
    Rootfs {
        /// Where it should be.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// The root file system is not this user's to use.
    #[error("invalid rootfs: open {path}: {reason}")]
    RootfsAccess {
        /// Where it is.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
}

/// A bundle whose configuration can be run.
#[derive(Clone, Debug)]
pub struct Bundle {
    /// The folder, absolute.
    pub path: PathBuf,
    /// The root file system, absolute.
    pub rootfs: PathBuf,
    /// What the guest is to mount instead of sharing that folder, which is empty then.
    pub in_guest: Option<GuestRoot>,
    /// The configuration.
    pub spec: Spec,
    /// What it says that a container will not get.
    pub unhonoured: Vec<Unhonoured>,
}

/// A root file system that the guest mounts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestRoot {
    /// It is on one disk.
    Disk(FileSystem),
    /// It is an overlay of disks.
    Overlay(Overlay),
}

/// An overlay whose lower layers are disks of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overlay {
    /// The uppermost first.
    pub layers: Vec<FileSystem>,
    /// Where changes go, if any can be made.
    pub upper: Option<Upper>,
    /// As mount(8) has them, without those that name the layers.
    pub options: Vec<String>,
}

/// The upper layer of an overlay, in a folder of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upper {
    /// The folder that both of these are in.
    pub parent: PathBuf,
    /// The name of the layer.
    pub upper: String,
    /// The name of the folder in which overlayfs prepares changes.
    pub work: String,
}

/// A file system on a block device or in an image file of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileSystem {
    /// Its type.
    pub kind: String,
    /// What it is on.
    pub source: PathBuf,
    /// As mount(8) has them.
    pub options: Vec<String>,
}

impl Bundle {
    /// Reads and checks a bundle.
    ///
    /// # Errors
    /// Any [`ConfigError`].
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let bundle = |error: io::Error| ConfigError::Bundle { path: path.into(), reason: system_message(&error) };
        let path = fs::canonicalize(path).map_err(bundle)?;
        if !path.is_dir() {
            return Err(bundle(io::Error::from_raw_os_error(libc::ENOTDIR)));
        }
        let file = path.join("config.json");
        let text = fs::read(&file).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => ConfigError::NoConfig(file.clone()),
            _ => ConfigError::Read { path: file.clone(), reason: system_message(&error) },
        })?;
        let (spec, value) = parse(&text, &file)?;
        validate::check(&spec).map_err(|reason| ConfigError::Invalid { path: file, reason })?;
        let root = spec.root().as_ref().map(|root| root.path().clone()).unwrap_or_default();
        let rootfs = path.join(root);
        let missing = |error: io::Error| ConfigError::Rootfs { path: rootfs.clone(), reason: system_message(&error) };
        if !fs::metadata(&rootfs).map_err(missing)?.is_dir() {
            return Err(missing(io::Error::from_raw_os_error(libc::ENOTDIR)));
        }
        host::may_use_directory(&rootfs)
            .map_err(|error| ConfigError::RootfsAccess { path: rootfs.clone(), reason: system_message(&error) })?;
        Ok(Self { path, unhonoured: unhonoured(&value), rootfs, in_guest: None, spec })
    }
}

fn parse(text: &[u8], file: &Path) -> Result<(Spec, Value), ConfigError> {
    let failed = |error: serde_json::Error| {
        let (line, column) = (error.line(), error.column());
        let text = error.to_string();
        let reason = text.split(&format!(" at line {line} column")).next().unwrap_or(&text).to_owned();
        ConfigError::Json { path: file.into(), line, column, reason }
    };
    // The specification's types first: their errors name the line of a wrong field.
    let spec = serde_json::from_slice(text).map_err(failed)?;
    let value = serde_json::from_slice(text).map_err(failed)?;
    Ok((spec, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{
  "ociVersion": "1.2.0",
  "process": { "user": { "uid": 0, "gid": 0 }, "args": ["sh"], "cwd": "/" },
  "root": { "path": "rootfs" },
  "linux": { "namespaces": [{ "type": "network" }] }
}"#;

    fn bundle(config: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), config).unwrap();
        fs::create_dir(dir.path().join("rootfs")).unwrap();
        dir
    }

    fn error(config: &str) -> String {
        let dir = bundle(config);
        let path = fs::canonicalize(dir.path()).unwrap();
        Bundle::load(dir.path()).unwrap_err().to_string().replace(path.to_str().unwrap(), "B")
    }

    #[test]
    fn a_good_bundle_loads() {
        let dir = bundle(GOOD);
        let bundle = Bundle::load(dir.path()).unwrap();
        assert!(bundle.rootfs.is_absolute() && bundle.rootfs.ends_with("rootfs"));
        assert_eq!(bundle.unhonoured, []);
    }

    #[test]
    fn broken_json_is_shown_where_it_breaks() {
        assert_eq!(
            error("{\n  \"ociVersion\": \"1.2.0\",\n  \"root\" \"rootfs\"\n}"),
            "B/config.json: line 3, column 10: expected `:`"
        );
        assert_eq!(error(""), "B/config.json: line 1, column 0: EOF while parsing a value");
        let wrong_type = GOOD.replace(r#"["sh"]"#, r#""sh""#);
        assert_eq!(
            error(&wrong_type),
            "B/config.json: line 3, column 59: invalid type: string \"sh\", expected a sequence"
        );
        let no_user = GOOD.replace(r#""user": { "uid": 0, "gid": 0 }, "#, "");
        assert!(error(&no_user).ends_with("missing field `user`"), "{}", error(&no_user));
    }

    #[test]
    fn what_is_missing_is_named() {
        let dir = bundle(GOOD);
        let load = |path: &Path| Bundle::load(path).unwrap_err().to_string();
        let nowhere = dir.path().join("nowhere");
        assert!(load(&nowhere).ends_with("nowhere: no such file or directory"), "{}", load(&nowhere));
        let file = dir.path().join("config.json");
        assert!(load(&file).ends_with("config.json: not a directory"), "{}", load(&file));
        fs::remove_dir(dir.path().join("rootfs")).unwrap();
        let text = load(dir.path());
        assert!(text.starts_with("invalid rootfs: stat /"), "{text}");
        assert!(text.ends_with("/rootfs: no such file or directory"), "{text}");
        fs::write(dir.path().join("rootfs"), "").unwrap();
        assert!(load(dir.path()).ends_with("/rootfs: not a directory"));
        fs::remove_file(file).unwrap();
        assert!(load(dir.path()).contains("/config.json not found"));
    }
}
