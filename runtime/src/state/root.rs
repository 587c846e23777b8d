//! Where the state root is, and that it is nobody else's.

use std::env;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::process::geteuid;

use super::{StateError, failed};
use crate::host::{is_root_of_host, system_message};

/// `/run/katavm` for root, `$XDG_RUNTIME_DIR/katavm` for others, `/tmp/katavm-UID` where that is not set.
///
/// Root of a user namespace may be some user's, as under a rootless engine, whose runtime folder it has then; or that of
/// a whole system.
#[must_use]
pub fn default_root() -> PathBuf {
    choose(geteuid().as_raw(), is_root_of_host(), env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from))
}

fn choose(uid: u32, of_host: bool, runtime_dir: Option<PathBuf>) -> PathBuf {
    let users =
        runtime_dir.filter(|dir| dir.is_absolute() && !of_host && (uid != 0 || dir != Path::new("/run/user/0")));
    match users {
        Some(dir) => dir.join("katavm"),
        None if uid == 0 => "/run/katavm".into(),
        None => format!("/tmp/katavm-{uid}").into(),
    }
}

/// Makes the root where it is missing, and refuses one in which others could plant files.
pub fn make(path: &Path) -> Result<(), StateError> {
    let not_made = |path: &Path| {
        let path = path.to_owned();
        move |error: io::Error| StateError::Root { path, reason: system_message(&error) }
    };
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(not_made(parent))?;
    }
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(not_made(path)(error)),
    }
    let metadata = path.symlink_metadata().map_err(failed("look at", path))?;
    let ours = metadata.is_dir() && metadata.uid() == geteuid().as_raw() && metadata.mode() & 0o022 == 0;
    if ours { Ok(()) } else { Err(StateError::Unsafe(path.into())) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn users_have_a_root_of_their_own() {
        for (of_host, dir) in [(true, "/run/user/0"), (true, "/run/user/1000"), (false, "/run/user/0")] {
            assert_eq!(choose(0, of_host, Some(dir.into())), Path::new("/run/katavm"));
        }
        assert_eq!(choose(0, false, None), Path::new("/run/katavm"));
        for uid in [0, 1000] {
            assert_eq!(choose(uid, false, Some("/run/user/1000".into())), Path::new("/run/user/1000/katavm"));
        }
        assert_eq!(choose(1000, false, Some("relative".into())), Path::new("/tmp/katavm-1000"));
        assert_eq!(choose(1000, false, None), Path::new("/tmp/katavm-1000"));
    }

    #[test]
    fn a_root_that_others_may_write_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/root");
        make(&path).unwrap();
        make(&path).unwrap();
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o700);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(make(&path), Err(StateError::Unsafe(_))));
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("deep/root", &link).unwrap();
        assert!(matches!(make(&link), Err(StateError::Unsafe(_))));
    }
}
