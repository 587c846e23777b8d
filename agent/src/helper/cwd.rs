//! The working directory: made if it is not there, as runc does, without following a link out of the root.

use std::io;
use std::path::{Component, Path};
use std::sync::OnceLock;

use nix::sys::stat::{Mode, mkdirat};

use super::inside::{open_directory, open_in_root};
use super::report::{self, Report};
use crate::error::Error;

static CWD: OnceLock<String> = OnceLock::new();

/// Notes the directory that [`report_failure`] is about.
pub fn note(cwd: &Path) {
    let _ = CWD.set(cwd.display().to_string());
}

/// Reports, in runc's words, that the process could not change to its directory.
pub fn report_failure(event: &str) {
    let why = if event.contains("EACCES") {
        "permission denied"
    } else if event.contains("ENOTDIR") {
        "not a directory"
    } else {
        "no such file or directory"
    };
    let error = failure(CWD.get().map_or("", String::as_str), why);
    report::write(&Report::Failed { error });
}

/// runc's words.
pub fn failure(cwd: &str, why: &str) -> Error {
    Error::NotFound(format!("chdir to cwd ({cwd:?}) set in config.json failed: {why}"))
}

/// Makes the directory `path` of the file system below `root`, and those above it, where there is none.
///
/// # Errors
/// Those of openat2(2) and mkdirat(2).
pub fn make(root: &Path, path: &Path) -> io::Result<()> {
    let mut directory = open_directory(root)?;
    let root = directory.try_clone()?;
    let mut sofar = std::path::PathBuf::from("/");
    for component in path.components() {
        // ".." is resolved by the kernel below, inside the root.
        if !matches!(component, Component::Normal(_) | Component::ParentDir) {
            continue;
        }
        sofar.push(component);
        directory = match open_in_root(&root, sofar.as_os_str()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                mkdirat(&directory, component.as_os_str(), Mode::from_bits_truncate(0o755))?;
                open_in_root(&root, sofar.as_os_str())?
            }
            other => other?,
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_directory_is_made_inside_the_root_whatever_links_say() {
        let parent = tempfile::tempdir().unwrap();
        let root = parent.path().join("root");
        std::fs::create_dir_all(root.join("data")).unwrap();
        symlink("/data", root.join("absolute")).unwrap();
        symlink("../../../..", root.join("climbing")).unwrap();
        make(&root, Path::new("/a/b/c")).unwrap();
        make(&root, Path::new("/absolute/x")).unwrap();
        make(&root, Path::new("/climbing/y")).unwrap();
        make(&root, Path::new("/../../z")).unwrap();
        for made in ["a/b/c", "data/x", "y", "z"] {
            assert!(root.join(made).is_dir(), "{made}");
        }
        assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 1);
        symlink("nowhere", root.join("dangling")).unwrap();
        assert!(make(&root, Path::new("/dangling")).is_err());
    }
}
