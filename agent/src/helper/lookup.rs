//! Which file a program's name means, and runc's words when there is none.

use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use nix::unistd::{AccessFlags, eaccess};

use crate::error::Error;

/// The program to execute, searched in `path` as a shell would, from the current directory, as the current user.
///
/// # Errors
/// `NotFound` or `Denied`, worded like runc.
pub fn find(name: &str, path: &str) -> Result<CString, Error> {
    let found =
        if name.contains('/') { check(name, Path::new(name)).map(|()| name.into()) } else { search(name, path) };
    let found: PathBuf = found?;
    CString::new(found.into_os_string().into_vec()).map_err(|_| Error::Invalid(format!("exec: {name:?}: NUL byte")))
}

fn search(name: &str, path: &str) -> Result<PathBuf, Error> {
    let mut denied = None;
    for directory in path.split(':').filter(|directory| !directory.is_empty()) {
        let candidate = Path::new(directory).join(name);
        match check(name, &candidate) {
            Ok(()) => return Ok(candidate),
            Err(error @ Error::Denied(_)) => denied = Some(error),
            Err(_) => {}
        }
    }
    Err(denied.unwrap_or_else(|| Error::NotFound(format!("exec: {name:?}: executable file not found in $PATH"))))
}

fn check(name: &str, path: &Path) -> Result<(), Error> {
    let metadata = fs::metadata(path).map_err(|error| {
        let words = words(error.raw_os_error());
        let text = format!("exec: {name:?}: stat {}: {words}", path.display());
        if error.kind() == std::io::ErrorKind::PermissionDenied { Error::Denied(text) } else { Error::NotFound(text) }
    })?;
    if metadata.is_dir() {
        return Err(Error::Denied(format!("exec: {name:?}: is a directory")));
    }
    eaccess(path, AccessFlags::X_OK).map_err(|_| Error::Denied(format!("exec: {name:?}: permission denied")))
}

/// An errno in the words that Go programs, runc among them, use.
pub fn words(errno: Option<i32>) -> String {
    let text = std::io::Error::from_raw_os_error(errno.unwrap_or(0)).to_string();
    text.split(" (os error").next().unwrap_or_default().to_lowercase()
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn programs_are_found_and_failures_worded_like_runc() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::write(at("plain"), "").unwrap();
        fs::write(at("program"), "").unwrap();
        fs::set_permissions(at("program"), Permissions::from_mode(0o755)).unwrap();
        fs::create_dir(at("folder")).unwrap();
        let path = format!("/nonexistent::{}", directory.path().display());
        let program = at("program");
        assert_eq!(find("program", &path).unwrap().to_str().unwrap(), program.to_str().unwrap());
        assert!(find(program.to_str().unwrap(), "").is_ok());
        let error = |name: &str| find(name, &path).unwrap_err().to_string();
        assert_eq!(error("foo"), "exec: \"foo\": executable file not found in $PATH");
        assert_eq!(error("/foo"), "exec: \"/foo\": stat /foo: no such file or directory");
        assert_eq!(error("plain"), "exec: \"plain\": permission denied");
        assert_eq!(error("/"), "exec: \"/\": is a directory");
        assert_eq!(find("program", "").unwrap_err().to_string(), error("program2").replace("program2", "program"));
    }
}
