//! Disks that the host puts into places of the machine, and takes away again.
//!
//! A place is a virtio-mmio window whose `DeviceID` is 0 while it is empty (virtio 1.3, 4.2.2). The kernel looks at it when
//! the driver is bound to it, and forgets the disk when the driver is unbound (DESIGN §4.7).

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use katavm_protocol::agent::AttachDiskResponse;

use crate::error::Error;

const DEVICES: &str = "/sys/bus/platform/devices";
const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";

/// Binds the driver to `place`; the block device of the disk there. Doing it again changes nothing.
///
/// # Errors
/// That there is no such place, that it is empty, or has something else.
pub fn attach(place: u32) -> Result<AttachDiskResponse, Error> {
    let name = name(place);
    let device = device(place)?;
    if !device.join("driver").exists() {
        // The driver has looked at the disk when this returns.
        fs::write(Path::new(DRIVER).join("bind"), &name).map_err(|error| match error.raw_os_error() {
            Some(libc::ENODEV) => Error::NotFound(format!("{name} is empty: the host has put no disk there")),
            _ => Error::io(format_args!("cannot bind the driver to {name}"), error),
        })?;
    }
    block_device(&device).map_err(|error| Error::io(format_args!("no disk appeared at {name}"), error))
}

/// Unbinds the driver from `place`, if it is bound: the disk is gone then, also for who still has it
/// open.
///
/// # Errors
/// That there is no such place, or that the kernel does not let go.
pub fn detach(place: u32) -> Result<(), Error> {
    let name = name(place);
    if !device(place)?.join("driver").exists() {
        return Ok(());
    }
    // A file system that is mounted still gets what it has not written yet to the disk.
    nix::unistd::sync();
    fs::write(Path::new(DRIVER).join("unbind"), &name)
        .map_err(|error| Error::io(format_args!("cannot unbind the driver from {name}"), error))
}

fn name(place: u32) -> String {
    format!("virtio-mmio.{place}")
}

fn device(place: u32) -> Result<PathBuf, Error> {
    let device = Path::new(DEVICES).join(name(place));
    if device.exists() { Ok(device) } else { Err(Error::NotFound(format!("the machine has no place {place}"))) }
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
