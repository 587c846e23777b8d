//! An instance of the kernel's tracing, for one benchmark.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::process::await_readable;

const INSTANCES: &str = "/sys/kernel/tracing/instances";

/// What was traced since it was made.
pub struct Trace {
    instance: PathBuf,
    pipe: File,
    text: String,
}

impl Trace {
    /// Begins to trace by the monotonic clock, once these texts have been written to these files of the instance.
    ///
    /// # Errors
    /// When the kernel's tracing cannot be had.
    pub fn new(settings: &[(&str, &str)]) -> Result<Self> {
        let instance = Path::new(INSTANCES).join(format!("katavm-bench-{}", std::process::id()));
        let cannot = || format!("cannot trace in {}: it takes root, and tracefs mounted", instance.display());
        fs::create_dir(&instance).with_context(cannot)?;
        match set_up(&instance, settings).with_context(cannot) {
            Ok(pipe) => Ok(Self { instance, pipe, text: String::new() }),
            Err(error) => {
                let _ = fs::remove_dir(&instance);
                Err(error)
            }
        }
    }

    /// All lines so far; the last one may not be whole.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The text of one of the instance's files.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn file(&self, name: &str) -> Result<String> {
        let path = self.instance.join(name);
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    }

    /// Waits for more.
    ///
    /// # Errors
    /// When nothing comes.
    pub fn read(&mut self) -> Result<()> {
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

impl Drop for Trace {
    fn drop(&mut self) {
        // The pipe keeps the instance busy; what cannot be removed is told by the next one.
        if let Ok(null) = File::open("/dev/null") {
            self.pipe = null;
        }
        let _ = fs::remove_dir(&self.instance);
    }
}

fn set_up(instance: &Path, settings: &[(&str, &str)]) -> Result<File> {
    for (file, text) in [("trace_clock", "mono")].iter().chain(settings) {
        let path = instance.join(file);
        fs::write(&path, text).with_context(|| format!("cannot write {text:?} to {}", path.display()))?;
    }
    Ok(File::options().read(true).custom_flags(libc::O_NONBLOCK).open(instance.join("trace_pipe"))?)
}

/// The time of the first whole line of `text` with `event`: `  vcpu0-151  [000] d..1.  9.358188: kvm_entry: vcpu 0, ...`.
pub fn time_of(text: &str, event: &str) -> Option<Duration> {
    let line = text.split_inclusive('\n').find(|line| line.ends_with('\n') && line.contains(event))?;
    let seconds = line.split(event).next()?.split_whitespace().next_back()?;
    seconds.parse().ok().map(Duration::from_secs_f64)
}
