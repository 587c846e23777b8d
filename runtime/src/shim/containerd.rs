//! Which containerd runs this program: from 2.0 on it takes an answer to `start` that older ones cannot read.
//!
//! Neither its options nor its environment tell: both say the same in all versions. Its program does, by `--version`. That
//! takes tens of milliseconds, so what it said is remembered beside the state of the containers.

use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::parent_id;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::input;
use crate::host;

/// How long it may take to say its version.
const PATIENCE: Duration = Duration::from_secs(5);
/// A version is one line.
const LONGEST: usize = 4096;
/// The file with what was said; no container has such a name.
const MEMORY: &str = ".containerd";

/// The major version of the containerd that has started this process, which calls itself `program`. What it said is
/// remembered in `folder`.
///
/// Nothing if it cannot be told: what runs may have been replaced on disk by another version meanwhile.
#[must_use]
pub fn major_version(program: &Path, folder: &Path) -> Option<u32> {
    version_of(program, &PathBuf::from(format!("/proc/{}/exe", parent_id())), folder)
}

fn version_of(program: &Path, running: &Path, folder: &Path) -> Option<u32> {
    let (named, running) = (fs::metadata(program).ok()?, fs::metadata(running).ok()?);
    if host::identity(&named) != host::identity(&running) {
        return None;
    }
    let memory = folder.join(MEMORY);
    let key = key(&named);
    if let Some(version) = fs::read_to_string(&memory).ok().and_then(|said| remembered(&said, &key)) {
        return Some(version);
    }
    let version = parse(&ask(program)?)?;
    // Without it the next one asks again.
    let _ = fs::write(&memory, format!("{key} {version}\n"));
    Some(version)
}

/// What changes when the file does.
fn key(file: &Metadata) -> String {
    let times = [file.mtime(), file.mtime_nsec(), file.ctime(), file.ctime_nsec()].map(|number| number.to_string());
    let numbers = [file.dev(), file.ino(), file.size()].map(|number| number.to_string());
    [numbers.join(":"), times.join(":")].join(":")
}

fn remembered(said: &str, key: &str) -> Option<u32> {
    // One that is just being written has no end of line.
    said.strip_suffix('\n')?.strip_prefix(key)?.strip_prefix(' ')?.parse().ok()
}

/// What the program says of its version.
fn ask(program: &Path) -> Option<String> {
    let mut asked = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let said = asked.stdout.take().map(|stdout| input::read(stdout, LONGEST, PATIENCE));
    // One that has ended is not hurt.
    let _ = asked.kill();
    let _ = asked.wait();
    String::from_utf8(said?.ok()?.bytes).ok()
}

/// `containerd PACKAGE VERSION REVISION`, the version with or without a `v` before it.
fn parse(said: &str) -> Option<u32> {
    let mut words = said.split_ascii_whitespace();
    if words.next()? != "containerd" {
        return None;
    }
    let version = words.nth(1)?;
    version.trim_start_matches('v').split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn versions_are_told_as_they_are_printed() {
        for (said, version) in [
            ("containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u3\n", Some(1)),
            ("containerd github.com/containerd/containerd/v2 2.1.9+unknown \n", Some(2)),
            ("containerd containerd.io v1.7.27 05044ec0a9a75232cad458027ca83437aae3f4da\n", Some(1)),
            ("k3s version v1.30.0+k3s1 (14549535)\n", None),
            ("containerd containerd.io \n", None),
            ("", None),
        ] {
            assert_eq!(parse(said), version, "{said}");
        }
    }

    #[test]
    fn a_program_is_asked_once_until_it_changes() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("containerd");
        let write = |version: &str| {
            let text = format!("#!/bin/sh\necho asked >>{}.log\necho containerd x {version} y\n", program.display());
            // A new file, as a package's update leaves it.
            let _ = fs::remove_file(&program);
            fs::write(&program, text).unwrap();
            fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        };
        let asked = || fs::read_to_string(folder.path().join("containerd.log")).unwrap().lines().count();
        write("1.7.1");
        let kept = folder.path().join("kept");
        fs::hard_link(&program, &kept).unwrap();
        for _ in 0..2 {
            assert_eq!(version_of(&program, &program, folder.path()), Some(1));
            assert_eq!(asked(), 1);
        }
        write("v2.1.0");
        assert_eq!(version_of(&program, &program, folder.path()), Some(2));
        assert_eq!(asked(), 2);
        // The old one still runs.
        assert_eq!(version_of(&program, &kept, folder.path()), None);
        assert_eq!(version_of(&folder.path().join("gone"), &kept, folder.path()), None);
        // A memory that is not whole.
        fs::write(folder.path().join(MEMORY), format!("{} 1", key(&fs::metadata(&program).unwrap()))).unwrap();
        assert_eq!(version_of(&program, &program, folder.path()), Some(2));
    }
}
