//! Disks that the host puts into places of the machine, and takes away again.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use katavm_protocol::agent::{AttachDiskRequest, AttachDiskResponse};

use crate::error::Error;
use crate::file_system;
use crate::places::{self, PLACES};

/// Where file systems of disks are mounted, each in a directory by the number of its place.
const MOUNTED: &str = "/run/katavm/disks";

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
    let path = mounted(request.place);
    file_system::mount_at(&path, device, &request.type_, &request.options)?;
    Ok(path)
}

fn mounted(place: u32) -> String {
    format!("{MOUNTED}/{place}")
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
    file_system::unmount(&mounted(place));
    PLACES.unbind(&name).map_err(|error| Error::io(format_args!("cannot unbind the driver from {name}"), error))
}

/// Settles all file systems that are mounted: the guest is about to end.
pub fn settle_all() {
    for entry in fs::read_dir(MOUNTED).into_iter().flatten().flatten() {
        file_system::settle(&entry.path().to_string_lossy());
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
