//! Disks that the host puts into places of the machine, and takes away again.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use katavm_protocol::agent::{AttachDiskRequest, AttachDiskResponse};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::error::Error;
use crate::places::{self, PLACES};

/// Where file systems of disks are mounted, each in a directory by the number of its place.
const MOUNTED: &str = "/run/katavm/disks";
/// Options of mount(8) that are flags of mount(2), and whether they set or clear them.
const FLAGS: [(&str, MsFlags, bool); 20] = [
    ("ro", MsFlags::MS_RDONLY, true),
    ("rw", MsFlags::MS_RDONLY, false),
    ("nosuid", MsFlags::MS_NOSUID, true),
    ("suid", MsFlags::MS_NOSUID, false),
    ("nodev", MsFlags::MS_NODEV, true),
    ("dev", MsFlags::MS_NODEV, false),
    ("noexec", MsFlags::MS_NOEXEC, true),
    ("exec", MsFlags::MS_NOEXEC, false),
    ("noatime", MsFlags::MS_NOATIME, true),
    ("atime", MsFlags::MS_NOATIME, false),
    ("nodiratime", MsFlags::MS_NODIRATIME, true),
    ("diratime", MsFlags::MS_NODIRATIME, false),
    ("relatime", MsFlags::MS_RELATIME, true),
    ("norelatime", MsFlags::MS_RELATIME, false),
    ("strictatime", MsFlags::MS_STRICTATIME, true),
    ("nostrictatime", MsFlags::MS_STRICTATIME, false),
    ("sync", MsFlags::MS_SYNCHRONOUS, true),
    ("async", MsFlags::MS_SYNCHRONOUS, false),
    ("dirsync", MsFlags::MS_DIRSYNC, true),
    ("lazytime", MsFlags::MS_LAZYTIME, true),
];
/// Options that say nothing here: where propagation goes the container's mount says, and a disk is there already.
const WITHOUT_EFFECT: [&str; 10] =
    ["defaults", "loop", "private", "rprivate", "slave", "rslave", "shared", "rshared", "unbindable", "runbindable"];

/// Binds the driver to a place, and mounts the file system on the disk there, if one is asked for.
///
/// # Errors
/// That there is no such place, that it is empty, or has something else; or that it cannot be mounted, and then the driver
/// is unbound again.
pub fn attach(request: &AttachDiskRequest) -> Result<AttachDiskResponse, Error> {
    let mut found = bind(request.place)?;
    if !request.type_.is_empty() {
        found.mounted = mount_on(request, &found.device).inspect_err(|_| {
            if let Err(error) = detach(request.place) {
                crate::error!("{error}");
            }
        })?;
    }
    Ok(found)
}

/// Mounts the file system on `device`; where.
fn mount_on(request: &AttachDiskRequest, device: &str) -> Result<String, Error> {
    let AttachDiskRequest { place, type_, options, .. } = request;
    let path = format!("{MOUNTED}/{place}");
    fs::create_dir_all(&path).map_err(|error| Error::io(format_args!("cannot make {path}"), error))?;
    let (flags, text) = flags_and_text(options);
    mount(Some(device), path.as_str(), Some(type_.as_str()), flags, Some(text.as_str())).map_err(
        |error| match error {
            Errno::ENODEV => Error::Invalid(format!("the guest's kernel has no file system {type_}")),
            Errno::EINVAL => {
                Error::Invalid(format!("no {type_} on the disk, or an option of {options:?} is none of it"))
            }
            error => Error::io(format_args!("cannot mount {type_}, with {options:?}"), error.into()),
        },
    )?;
    Ok(path)
}

/// What mount(2) takes for options of mount(8).
fn flags_and_text(options: &[String]) -> (MsFlags, String) {
    let (mut flags, mut text) = (MsFlags::empty(), Vec::new());
    for option in options {
        match FLAGS.iter().find(|(name, ..)| name == option) {
            Some((_, flag, set)) => flags.set(*flag, *set),
            None if WITHOUT_EFFECT.contains(&option.as_str()) => {}
            None => text.push(option.as_str()),
        }
    }
    (flags, text.join(","))
}

/// Binds the driver to `place`; the block device of the disk there. Doing it again changes nothing.
fn bind(place: u32) -> Result<AttachDiskResponse, Error> {
    let name = places::name(place);
    let device = device(place)?;
    PLACES.bind_disk(place).map_err(|error| match error.raw_os_error() {
        Some(libc::ENODEV) => Error::NotFound(format!("{name} is empty: the host has put no disk there")),
        _ => Error::io(format_args!("cannot bind the driver to {name}"), error),
    })?;
    block_device(&device).map_err(|error| Error::io(format_args!("no disk appeared at {name}"), error))
}

/// Unmounts what is on the disk at `place`, and unbinds the driver, if it is bound: the disk is gone then, also for who still has it
/// open.
///
/// # Errors
/// That there is no such place, or that the kernel does not let go.
pub fn detach(place: u32) -> Result<(), Error> {
    device(place)?;
    if !PLACES.is_bound(place) {
        return Ok(());
    }
    let name = places::name(place);
    let path = format!("{MOUNTED}/{place}");
    if Path::new(&path).exists() {
        settle(&path);
        match umount2(path.as_str(), MntFlags::empty()) {
            // None was mounted, or it is no more.
            Ok(()) | Err(Errno::EINVAL) => {}
            Err(error) => {
                crate::error!("cannot unmount {path}: {error}");
                // Some process still has it; what it does from now on fails.
                let _ = umount2(path.as_str(), MntFlags::MNT_DETACH);
            }
        }
        let _ = fs::remove_dir(&path);
    }
    PLACES.unbind(&name).map_err(|error| Error::io(format_args!("cannot unbind the driver from {name}"), error))
}

/// Settles all file systems that are mounted: the guest is about to end.
pub fn settle_all() {
    for entry in fs::read_dir(MOUNTED).into_iter().flatten().flatten() {
        settle(&entry.path().to_string_lossy());
    }
}

/// Has everything that was written to the file system at `path` on its disk, and marked as whole: who has the disk next need
/// not recover it, and may be one who cannot. It is read-only then, also where another mount of it is left.
fn settle(path: &str) {
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    match mount(None::<&str>, path, None::<&str>, flags, None::<&str>) {
        // None was mounted, or it is no more.
        Ok(()) | Err(Errno::EINVAL) => {}
        Err(error) => {
            crate::error!("{path} cannot be made read-only: {error}");
            // Some process still writes to it: what it wrote so far goes to the disk.
            nix::unistd::sync();
        }
    }
}

fn device(place: u32) -> Result<PathBuf, Error> {
    PLACES.device(place).map_err(|_| Error::NotFound(format!("the machine has no place {place}")))
}

/// The only disk below `device`: `virtio<n>/block/<name>`.
fn block_device(device: &Path) -> io::Result<AttachDiskResponse> {
    for entry in fs::read_dir(device)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with("virtio")
            && let Ok(mut disks) = fs::read_dir(entry.path().join("block"))
            && let Some(disk) = disks.next()
        {
            let node = Path::new("/dev").join(disk?.file_name());
            let numbers = fs::metadata(&node)?.rdev();
            return Ok(AttachDiskResponse {
                device: node.to_string_lossy().into(),
                major: libc::major(numbers),
                minor: libc::minor(numbers),
                ..Default::default()
            });
        }
    }
    Err(io::ErrorKind::NotFound.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_flags_or_text() {
        let all = ["ro", "noatime", "data=journal", "loop", "nosuid", "suid", "errors=panic", "rprivate"];
        let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOATIME;
        assert_eq!(flags_and_text(&all.map(String::from)), (flags, "data=journal,errors=panic".into()));
        assert_eq!(flags_and_text(&[]), (MsFlags::empty(), String::new()));
    }
}
