//! When a guest's boot reaches its stations, from KVM's own trace events: they cost next to nothing, and nobody is woken
//! up for each byte of a console.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::guest::{INSTRUCTION, PRINTED};
use super::process::await_readable;

const INSTANCES: &str = "/sys/kernel/tracing/instances";

/// A trace of the one guest that is started while it exists.
pub struct Moments {
    instance: PathBuf,
    pipe: File,
    text: String,
}

/// A station of the boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Station {
    /// A vCPU enters the guest for the first time.
    FirstRun,
    /// The first instruction in user mode ([`INSTRUCTION`]).
    Userspace,
    /// The first line of user mode has been printed ([`PRINTED`]).
    Printed,
}

impl Moments {
    /// Begins to watch.
    ///
    /// # Errors
    /// When the kernel's tracing cannot be had.
    pub fn watch() -> Result<Self> {
        let instance = Path::new(INSTANCES).join(format!("katavm-bench-{}", std::process::id()));
        let cannot = || format!("cannot trace in {}: it takes root, and tracefs mounted", instance.display());
        fs::create_dir(&instance).with_context(cannot)?;
        let pipe = set_up(&instance).with_context(cannot);
        match pipe {
            Ok(pipe) => Ok(Self { instance, pipe, text: String::new() }),
            Err(error) => {
                let _ = fs::remove_dir(&instance);
                Err(error)
            }
        }
    }

    /// Waits for a station that is still to come, or finds it among those that have; its time by CLOCK_MONOTONIC.
    ///
    /// # Errors
    /// When it does not come.
    pub fn wait(&mut self, station: Station) -> Result<Duration> {
        loop {
            if let Some(time) = find(&self.text, station) {
                return Ok(time);
            }
            self.read().with_context(|| format!("the guest did not get to {station:?}"))?;
        }
    }

    fn read(&mut self) -> Result<()> {
        await_readable(&self.pipe)?;
        let mut bytes = [0; 4096];
        match self.pipe.read(&mut bytes) {
            Ok(len) => self.text.push_str(&String::from_utf8_lossy(&bytes[..len])),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }
}

impl Drop for Moments {
    fn drop(&mut self) {
        // The pipe keeps the instance busy; what cannot be removed is told by the next one.
        if let Ok(null) = File::open("/dev/null") {
            self.pipe = null;
        }
        let _ = fs::remove_dir(&self.instance);
    }
}

fn set_up(instance: &Path) -> Result<File> {
    let write = |file: &str, text: &str| {
        let path = instance.join(file);
        fs::write(&path, text).with_context(|| format!("cannot write {text:?} to {}", path.display()))
    };
    write("trace_clock", "mono")?;
    write("events/kvm/kvm_cpuid/filter", &format!("function == {INSTRUCTION} || function == {PRINTED}"))?;
    write("events/kvm/kvm_cpuid/enable", "1")?;
    // Only the first entry is of interest: it ends with the first exit.
    write("events/kvm/kvm_exit/trigger", "disable_event:kvm:kvm_entry:1")?;
    write("events/kvm/kvm_entry/enable", "1")?;
    Ok(File::options().read(true).custom_flags(libc::O_NONBLOCK).open(instance.join("trace_pipe"))?)
}

/// The time of the first whole line about `station`: `  vcpu0-151  [000] d..1.  9.358188: kvm_entry: vcpu 0, ...`.
fn find(text: &str, station: Station) -> Option<Duration> {
    let event = match station {
        Station::FirstRun => ": kvm_entry: ".to_string(),
        Station::Userspace => format!(": kvm_cpuid: func {INSTRUCTION:x} "),
        Station::Printed => format!(": kvm_cpuid: func {PRINTED:x} "),
    };
    let line = text.split_inclusive('\n').find(|line| line.ends_with('\n') && line.contains(&event))?;
    let seconds = line.split(&event).next()?.split_whitespace().next_back()?;
    seconds.parse().ok().map(Duration::from_secs_f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stations_are_found_in_the_trace() {
        let text = "          <...>-151     [000] d..1.     9.358188: kvm_entry: vcpu 0, rip 0x1000123\n\
                    \x20         vcpu 0-151     [000] .....     9.5: kvm_cpuid: func 4b410001 idx 0 rax 0\n\
                    \x20         vcpu 0-151     [000] .....     9.6: kvm_cpuid: func 4b410002 idx";
        assert_eq!(find(text, Station::FirstRun), Some(Duration::from_micros(9_358_188)));
        assert_eq!(find(text, Station::Userspace), Some(Duration::from_millis(9500)));
        // The line is not whole yet.
        assert_eq!(find(text, Station::Printed), None);
    }
}
