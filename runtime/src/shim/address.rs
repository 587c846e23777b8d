//! Where a pod's server is reached, and which containers share one.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::host;

/// Where containerd and its shims have their sockets.
const FOLDER: &str = "/run/containerd/s";
/// Annotations that name a container's group, the first one that is there.
const GROUPS: [&str; 2] = ["io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id"];

/// The group of containers that share a server: what an annotation of the bundle says, else the container itself.
#[must_use]
pub fn group(bundle: &Path, id: &str) -> String {
    // There may be none: containerd's sandboxes have no configuration at `start`.
    let config = fs::read(bundle.join("config.json")).unwrap_or_default();
    let config: Value = serde_json::from_slice(&config).unwrap_or_default();
    named_group(|name| config["annotations"][name].as_str()).unwrap_or(id).to_owned()
}

/// The group that annotations name, if they do.
pub fn named_group<'a>(annotation: impl Fn(&str) -> Option<&'a str>) -> Option<&'a str> {
    GROUPS.iter().find_map(|name| annotation(name)).filter(|group| !group.is_empty())
}

/// A server's socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    path: PathBuf,
}

impl Address {
    /// The socket of a group in a namespace of the containerd at `address`.
    #[must_use]
    pub fn of(address: &str, namespace: &str, group: &str) -> Self {
        let digest = Sha256::digest(Path::new(address).join(namespace).join(group).as_os_str().as_encoded_bytes());
        let name: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        Self { path: Path::new(FOLDER).join(name) }
    }

    /// The same in another folder.
    #[must_use]
    pub fn within(&self, folder: &Path) -> Self {
        Self { path: self.path.file_name().map_or_else(|| self.path.clone(), |name| folder.join(name)) }
    }

    /// What `start` has written to a bundle.
    #[must_use]
    pub fn of_bundle(bundle: &Path) -> Option<Self> {
        let url = fs::read_to_string(bundle.join("address")).ok()?;
        Some(Self { path: url.trim_end().strip_prefix("unix://")?.into() })
    }

    /// As containerd wants it.
    #[must_use]
    pub fn url(&self) -> String {
        format!("unix://{}", self.path.display())
    }

    /// Whether a server answers there.
    #[must_use]
    fn answers(&self) -> bool {
        UnixStream::connect(&self.path).is_ok()
    }

    /// Makes the socket, which only this user may reach, if no server answers there; one that a dead server has left is
    /// replaced. Of several that try at the same time one gets it.
    ///
    /// # Errors
    /// Those of bind(2).
    pub fn claim(&self) -> io::Result<Option<UnixListener>> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(self.folder())?;
        let folder = File::open(self.folder())?;
        folder.lock()?;
        if self.answers() {
            return Ok(None);
        }
        self.remove()?;
        let listener = UnixListener::bind(&self.path)?;
        fs::set_permissions(&self.path, fs::Permissions::from_mode(0o600))?;
        Ok(Some(listener))
    }

    /// Removes the socket if no server answers there.
    ///
    /// # Errors
    /// Those of unlink(2).
    pub fn sweep(&self) -> io::Result<()> {
        let Ok(folder) = File::open(self.folder()) else { return Ok(()) };
        folder.lock()?;
        if self.answers() { Ok(()) } else { self.remove() }
    }

    fn folder(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new(FOLDER))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn remove(&self) -> io::Result<()> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

/// The socket of this process: its name may be another server's by now.
pub struct OwnSocket {
    path: PathBuf,
    key: (u64, u64),
}

impl OwnSocket {
    /// The one that `listener` is bound to.
    ///
    /// # Errors
    /// When its name leads to nothing.
    pub fn of(listener: &UnixListener) -> io::Result<Self> {
        let address = listener.local_addr()?;
        let path = address.as_pathname().ok_or_else(|| io::Error::other("the socket has no name"))?.to_owned();
        let key = host::identity(&fs::symlink_metadata(&path)?);
        Ok(Self { path, key })
    }

    /// Removes its name, unless that is another server's.
    pub fn remove(&self) {
        let removed = || -> io::Result<()> {
            let folder = File::open(self.path.parent().unwrap_or(Path::new("/")))?;
            folder.lock()?;
            match fs::symlink_metadata(&self.path) {
                Ok(there) if host::identity(&there) == self.key => fs::remove_file(&self.path),
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            }
        };
        if let Err(error) = removed() {
            log::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_of_a_pod_share_a_group() {
        let folder = tempfile::tempdir().unwrap();
        let said = |config: &str| {
            fs::write(folder.path().join("config.json"), config).unwrap();
            group(folder.path(), "c1")
        };
        assert_eq!(said(r#"{"annotations": {"io.kubernetes.cri.sandbox-id": "pod"}}"#), "pod");
        let both = r#"{"annotations": {"io.kubernetes.cri.sandbox-id": "a", "io.containerd.runc.v2.group": "b"}}"#;
        assert_eq!(said(both), "b");
        assert_eq!(said(r#"{"annotations": {"other": "x"}}"#), "c1");
        assert_eq!(said("{"), "c1");
        assert_eq!(group(Path::new("/nowhere"), "c2"), "c2");
    }

    #[test]
    fn a_socket_is_removed_by_its_owner_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let first = UnixListener::bind(&path).unwrap();
        let own = OwnSocket::of(&first).unwrap();
        own.remove();
        assert!(!path.exists());
        let _second = UnixListener::bind(&path).unwrap();
        own.remove();
        assert!(path.exists());
    }

    #[test]
    fn an_address_may_be_in_another_folder_and_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let address = Address::of("/a", "n", "g").within(folder.path());
        assert_eq!(address.path.parent().unwrap(), folder.path());
        assert_eq!(address.path.file_name(), Address::of("/a", "n", "g").path.file_name());
        assert_eq!(Address::of_bundle(folder.path()), None);
        fs::write(folder.path().join("address"), address.url()).unwrap();
        assert_eq!(Address::of_bundle(folder.path()), Some(address));
    }

    #[test]
    fn addresses_differ_by_containerd_namespace_and_group() {
        let all = [("/a", "n", "g"), ("/b", "n", "g"), ("/a", "m", "g"), ("/a", "n", "h")];
        let urls: std::collections::BTreeSet<_> = all.iter().map(|(a, n, g)| Address::of(a, n, g).url()).collect();
        assert_eq!(urls.len(), all.len());
        assert!(urls.iter().all(|url| url.starts_with("unix:///run/containerd/s/") && url.len() < 107));
    }
}
