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
/// Options of mount(8) that are flags of a file system, and not text for it.
const FLAGS: [(&str, MsFlags); 4] = [
    ("ro", MsFlags::MS_RDONLY),
    ("sync", MsFlags::MS_SYNCHRONOUS),
    ("dirsync", MsFlags::MS_DIRSYNC),
    ("lazytime", MsFlags::MS_LAZYTIME),
];

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

/// What mount(2) takes for options of mount(8), those of one mount left out.
fn flags_and_text(options: &[String]) -> (MsFlags, String) {
    const OF_A_MOUNT: [&str; 26] = [
        "rw",
        "async",
        "defaults",
        "loop",
        "nosuid",
        "suid",
        "nodev",
        "dev",
        "noexec",
        "exec",
        "noatime",
        "atime",
        "nodiratime",
        "diratime",
        "relatime",
        "norelatime",
        "strictatime",
        "nostrictatime",
        "private",
        "rprivate",
        "slave",
        "rslave",
        "shared",
        "rshared",
        "unbindable",
        "runbindable",
    ];
    let (mut flags, mut text) = (MsFlags::empty(), Vec::new());
    for option in options {
        match FLAGS.iter().find(|(name, _)| name == option) {
            Some((_, flag)) => flags |= *flag,
            None if OF_A_MOUNT.contains(&option.as_str()) => {}
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
        match umount2(path.as_str(), MntFlags::empty()) {
            // None was mounted, or it is no more.
            Ok(()) | Err(Errno::EINVAL) => {}
            Err(error) => {
                crate::error!("cannot unmount {path}: {error}");
                // Some process still has it: what it wrote so far goes to the disk, and what it does from now on fails.
                nix::unistd::sync();
                let _ = umount2(path.as_str(), MntFlags::MNT_DETACH);
            }
        }
        let _ = fs::remove_dir(&path);
    }
    PLACES.unbind(&name).map_err(|error| Error::io(format_args!("cannot unbind the driver from {name}"), error))
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
    fn options_are_flags_text_or_another_mounts() {
        let all = ["ro", "noatime", "data=journal", "loop", "nosuid", "errors=panic", "rprivate"].map(String::from);
        assert_eq!(flags_and_text(&all), (MsFlags::MS_RDONLY, "data=journal,errors=panic".into()));
        assert_eq!(flags_and_text(&[]), (MsFlags::empty(), String::new()));
    }
}
