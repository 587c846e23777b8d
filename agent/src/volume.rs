//! Volumes that the host replaces as a whole, as the kubelet does with a ConfigMap: a copy in the guest's memory, so that
//! programs in here are told of a change by inotify, which a shared file system cannot do.
//!
//! The kubelet writes the new files into a new folder, switches the link `..data` to it by a rename, and removes the old
//! folder. The same happens here, in the same order: nobody sees half of a change.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, lchown, symlink};
use std::path::{Component, Path, PathBuf};

use katavm_protocol::agent::{SetVolumeRequest, VolumeEntry, volume_entry::Kind};

use crate::error::Error;

/// Where they are.
const DIR: &str = "/run/katavm/volumes";
/// What a link is called before it takes the place of another.
const NEXT: &str = "..next";

/// Makes a volume, or makes it what it is to be now.
///
/// # Errors
/// What cannot be made; the volume may have files of both states then, but `..data` leads to whole ones.
pub fn set(request: &SetVolumeRequest) -> Result<(), Error> {
    if !is_plain(Path::new(&request.name)) || Path::new(&request.name).components().count() != 1 {
        return Err(Error::Invalid(format!("{:?} is no name of a volume", request.name)));
    }
    let entries: Vec<_> = request.entries.iter().map(|entry| (path_of(entry), entry)).collect();
    if let Some((path, _)) = entries.iter().find(|(path, _)| !is_plain(path)) {
        return Err(Error::Invalid(format!("{} is no path in a volume", path.display())));
    }
    let folder = Path::new(DIR).join(&request.name);
    apply(&folder, &entries).map_err(|error| Error::io(format_args!("the volume {}", request.name), error))
}

/// Removes volumes that nobody has any more.
pub fn remove(names: &[String]) {
    for name in names.iter().filter(|name| is_plain(Path::new(name))) {
        if let Err(error) = fs::remove_dir_all(Path::new(DIR).join(name)) {
            crate::error!("the volume {name} cannot be removed: {error}");
        }
    }
}

fn path_of(entry: &VolumeEntry) -> &Path {
    Path::new(OsStr::from_bytes(&entry.path))
}

/// Whether a path leads nowhere but down.
fn is_plain(path: &Path) -> bool {
    path.components().next().is_some() && path.components().all(|part| matches!(part, Component::Normal(_)))
}

fn apply(folder: &Path, entries: &[(&Path, &VolumeEntry)]) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o755).create(folder)?;
    let is = |kind: Kind| entries.iter().filter(move |(_, entry)| entry.kind.enum_value_or_default() == kind);
    for (path, entry) in is(Kind::DIRECTORY).chain(is(Kind::FILE)) {
        write(&folder.join(path), entry)?;
    }
    for (path, entry) in is(Kind::LINK) {
        switch(&folder.join(path), entry)?;
    }
    let kept: BTreeSet<_> = entries.iter().map(|(path, _)| folder.join(path)).collect();
    remove_others(folder, &kept)
}

/// Makes a directory or a file that is not there.
fn write(path: &Path, entry: &VolumeEntry) -> io::Result<()> {
    if entry.kind.enum_value_or_default() == Kind::DIRECTORY {
        match DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => made?,
        }
    } else if fs::read(path).is_ok_and(|content| content == entry.content) {
        // It is as it was.
    } else {
        let next = path.with_file_name(NEXT);
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&next)?;
        file.write_all(&entry.content)?;
        fs::rename(&next, path)?;
    }
    lchown(path, Some(entry.uid), Some(entry.gid))?;
    fs::set_permissions(path, Permissions::from_mode(entry.mode & 0o7777))
}

/// Makes a link, or leads it elsewhere in one step.
fn switch(path: &Path, entry: &VolumeEntry) -> io::Result<()> {
    let target = Path::new(OsStr::from_bytes(&entry.content));
    if fs::read_link(path).is_ok_and(|old| old == target) {
        return Ok(());
    }
    let next = path.with_file_name(NEXT);
    symlink(target, &next)?;
    lchown(&next, Some(entry.uid), Some(entry.gid))?;
    fs::rename(&next, path)
}

fn remove_others(folder: &Path, kept: &BTreeSet<PathBuf>) -> io::Result<()> {
    for found in fs::read_dir(folder)? {
        let found = found?;
        let path = found.path();
        let is_directory = found.file_type()?.is_dir();
        match (kept.contains(&path), is_directory) {
            (true, true) => remove_others(&path, kept)?,
            (true, false) => {}
            (false, true) => fs::remove_dir_all(&path)?,
            (false, false) => fs::remove_file(&path)?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: &str, kind: Kind, content: &str) -> VolumeEntry {
        // SAFETY: getuid(2) and getgid(2) always succeed.
        let (uid, gid) = unsafe { (libc::getuid(), libc::getgid()) };
        let mode = if kind == Kind::DIRECTORY { 0o755 } else { 0o644 };
        let (path, content) = (path.as_bytes().to_vec(), content.as_bytes().to_vec());
        VolumeEntry { path, kind: kind.into(), mode, uid, gid, content, ..Default::default() }
    }

    fn config_map(version: &str, content: &str) -> Vec<VolumeEntry> {
        vec![
            entry("..data", Kind::LINK, version),
            entry("key", Kind::LINK, "..data/key"),
            entry(version, Kind::DIRECTORY, ""),
            entry(&format!("{version}/key"), Kind::FILE, content),
        ]
    }

    fn applied(folder: &Path, entries: &[VolumeEntry]) {
        let entries: Vec<_> = entries.iter().map(|entry| (path_of(entry), entry)).collect();
        apply(folder, &entries).unwrap();
    }

    #[test]
    fn a_config_map_is_switched() {
        let dir = tempfile::tempdir().unwrap();
        let read = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
        applied(dir.path(), &config_map("..1", "one"));
        assert_eq!((read("key"), read("..1/key")), ("one".into(), "one".into()));
        let open = fs::File::open(dir.path().join("key")).unwrap();
        applied(dir.path(), &config_map("..2", "two"));
        assert_eq!(read("key"), "two");
        assert_eq!(io::read_to_string(open).unwrap(), "one", "who has it open sees the old one");
        let mut names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["..2", "..data", "key"]);
        assert_eq!(fs::metadata(dir.path().join("..2/key")).unwrap().permissions().mode() & 0o7777, 0o644);
    }

    #[test]
    fn paths_that_leave_the_volume_are_refused() {
        for path in ["../x", "/etc/x", "a/../b", "", "."] {
            let request = SetVolumeRequest {
                name: "volume-1".into(),
                entries: vec![entry(path, Kind::FILE, "x")],
                ..Default::default()
            };
            assert!(set(&request).is_err(), "{path}");
        }
        for name in ["..", "a/b", "/", ""] {
            assert!(set(&SetVolumeRequest { name: name.into(), ..Default::default() }).is_err(), "{name}");
        }
    }
}
