//! Network devices come and go in places of the machine that are empty meanwhile: a virtio-mmio window whose `DeviceID`
//! is 0 (virtio 1.3, 4.2.2). The kernel looks at a place when the driver is bound to it.

use std::fs;
use std::io;
use std::path::Path;

const DEVICES: &str = "/sys/bus/platform/devices";
const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";
const INTERFACES: &str = "/sys/class/net";
/// How the kernel names the places, before a number.
const PREFIX: &str = "virtio-mmio.";

/// Has the kernel look at all places that were empty; the interfaces of new devices are there when this returns.
pub fn look() -> io::Result<()> {
    for entry in fs::read_dir(DEVICES)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if !name.starts_with(PREFIX) || entry.path().join("driver").exists() {
            continue;
        }
        match fs::write(Path::new(DRIVER).join("bind"), name.as_bytes()) {
            // Still empty.
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
            done => done?,
        }
    }
    Ok(())
}

/// Takes an interface away whose device has left its place; true if it was such an interface.
pub fn leave(interface: &str) -> io::Result<bool> {
    // The device of the interface is a child of its place.
    let Ok(device) = fs::canonicalize(Path::new(INTERFACES).join(interface).join("device")) else { return Ok(false) };
    let place = device.parent().and_then(Path::file_name).map(|name| name.to_string_lossy());
    let Some(place) = place.filter(|name| name.starts_with(PREFIX)) else { return Ok(false) };
    fs::write(Path::new(DRIVER).join("unbind"), place.as_bytes())?;
    Ok(true)
}
