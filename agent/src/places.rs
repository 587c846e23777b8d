//! Places of the machine for devices that come and go: virtio-mmio windows whose `DeviceID` is 0 while they are empty
//! (virtio 1.3, 4.2.2). The kernel looks at a place when the driver is bound to it, and forgets the device when the driver is
//! unbound (DESIGN §4.7).

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How the kernel names the places, before a number.
const PREFIX: &str = "virtio-mmio.";

/// The places of this machine.
pub static PLACES: Places = Places::new(Cow::Borrowed("/sys/bus/platform"));

/// The places below a folder of sysfs.
pub struct Places {
    bus: Cow<'static, str>,
    /// Those that have had disks. Whoever binds or unbinds holds this: a look for network devices must not bind a disk that
    /// the host is about to take away.
    disks: Mutex<BTreeSet<u32>>,
}

impl Places {
    const fn new(bus: Cow<'static, str>) -> Self {
        Self { bus, disks: Mutex::new(BTreeSet::new()) }
    }

    /// The device of a place.
    ///
    /// # Errors
    /// That there is no such place.
    pub fn device(&self, place: u32) -> io::Result<PathBuf> {
        let device = Path::new(&*self.bus).join("devices").join(name(place));
        if device.exists() { Ok(device) } else { Err(io::ErrorKind::NotFound.into()) }
    }

    /// Whether the kernel has found a device there.
    #[must_use]
    pub fn is_bound(&self, place: u32) -> bool {
        self.device(place).is_ok_and(|device| is_bound(&device))
    }

    /// Has the kernel look at a place for a disk; it has done so when this returns. Doing it again changes nothing.
    ///
    /// # Errors
    /// ENODEV when the place is empty, and others of the kernel's.
    pub fn bind_disk(&self, place: u32) -> io::Result<()> {
        let mut disks = self.lock();
        disks.insert(place);
        if self.is_bound(place) { Ok(()) } else { self.tell("bind", &name(place)) }
    }

    /// Has the kernel forget the device at a place.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn unbind(&self, place: &str) -> io::Result<()> {
        let _held = self.lock();
        self.tell("unbind", place)
    }

    /// Has the kernel look at all places that were empty and have never had disks; the devices that it finds are there when
    /// this returns.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn look(&self) -> io::Result<()> {
        let disks = self.lock();
        for entry in fs::read_dir(Path::new(&*self.bus).join("devices"))? {
            let entry = entry?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let Some(place) = name.strip_prefix(PREFIX) else { continue };
            if is_bound(&entry.path()) || place.parse().is_ok_and(|place| disks.contains(&place)) {
                continue;
            }
            match self.tell("bind", &name) {
                // Still empty.
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
                done => done?,
            }
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeSet<u32>> {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, what: &str, name: &str) -> io::Result<()> {
        fs::write(Path::new(&*self.bus).join("drivers/virtio-mmio").join(what), name)
    }
}

/// The name of a place.
#[must_use]
pub fn name(place: u32) -> String {
    format!("{PREFIX}{place}")
}

/// Whether this is the name of one.
#[must_use]
pub fn is_name(name: &str) -> bool {
    name.starts_with(PREFIX)
}

fn is_bound(device: &Path) -> bool {
    device.join("driver").exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_leaves_is_not_found_again_by_who_looks_for_networks() {
        let folder = tempfile::tempdir().unwrap();
        let bus = folder.path();
        for device in ["virtio-mmio.3", "virtio-mmio.4", "serial8250"] {
            fs::create_dir_all(bus.join("devices").join(device)).unwrap();
        }
        let driver = bus.join("drivers/virtio-mmio");
        fs::create_dir_all(&driver).unwrap();
        let places = Places::new(Cow::Owned(bus.to_str().unwrap().to_owned()));
        places.bind_disk(3).unwrap();
        assert_eq!(fs::read_to_string(driver.join("bind")).unwrap(), "virtio-mmio.3");
        places.unbind(&name(3)).unwrap();
        assert_eq!(fs::read_to_string(driver.join("unbind")).unwrap(), "virtio-mmio.3");
        fs::remove_file(driver.join("bind")).unwrap();
        places.look().unwrap();
        assert_eq!(fs::read_to_string(driver.join("bind")).unwrap(), "virtio-mmio.4");
        // What is bound is not bound again.
        fs::remove_file(driver.join("bind")).unwrap();
        for place in [3, 4] {
            fs::write(places.device(place).unwrap().join("driver"), "").unwrap();
        }
        places.look().unwrap();
        places.bind_disk(3).unwrap();
        assert!(places.is_bound(3) && !driver.join("bind").exists());
        assert!(!places.is_bound(5) && places.device(5).is_err());
    }
}
