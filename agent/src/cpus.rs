//! The guest's CPUs, which go online and offline while it runs (Documentation/core-api/cpu_hotplug.rst).

use std::fs;
use std::io;
use std::path::Path;

use crate::error::Error;

/// One folder per CPU that there may be.
const FOLDER: &str = "/sys/devices/system/cpu";

/// Has the first `count` CPUs be online and all others offline. The host has made them.
///
/// # Errors
/// When the kernel does not bring one up or down, or there are not as many.
pub fn set_online(count: u32) -> Result<(), Error> {
    set(Path::new(FOLDER), count)
}

fn set(folder: &Path, count: u32) -> Result<(), Error> {
    if count == 0 {
        return Err(Error::Invalid("a guest has one CPU at least".into()));
    }
    // Those that leave last, so that there is never less than both before and after.
    (1..count).try_for_each(|cpu| switch(folder, cpu, true))?;
    (count..).take_while(|cpu| file(folder, *cpu).exists()).try_for_each(|cpu| switch(folder, cpu, false))
}

fn switch(folder: &Path, cpu: u32, online: bool) -> Result<(), Error> {
    let (file, state) = (file(folder, cpu), if online { "1" } else { "0" });
    let switched = || -> io::Result<()> {
        // What is so already would be written again for nothing, and refused on some kernels.
        if fs::read_to_string(&file)?.trim() == state { Ok(()) } else { fs::write(&file, state) }
    };
    let what = if online { "online" } else { "offline" };
    switched().map_err(|error| Error::io(format_args!("cannot bring CPU {cpu} {what}"), error))
}

fn file(folder: &Path, cpu: u32) -> std::path::PathBuf {
    folder.join(format!("cpu{cpu}/online"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_ones_are_online() {
        let folder = tempfile::tempdir().unwrap();
        for cpu in 0..4 {
            fs::create_dir(folder.path().join(format!("cpu{cpu}"))).unwrap();
            if cpu > 0 {
                fs::write(file(folder.path(), cpu), "0\n").unwrap();
            }
        }
        let state = || (1..4).map(|cpu| fs::read_to_string(file(folder.path(), cpu)).unwrap().trim().to_owned());
        for (count, expected) in
            [(3, ["1", "1", "0"]), (1, ["0", "0", "0"]), (4, ["1", "1", "1"]), (2, ["1", "0", "0"])]
        {
            set(folder.path(), count).unwrap();
            assert!(state().eq(expected), "{count}");
        }
        assert!(set(folder.path(), 5).is_err());
        assert!(set(folder.path(), 0).is_err());
    }
}
