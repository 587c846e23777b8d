//! Limits of the process.

use std::fs;
use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the number of files that this process may have open as far as it goes: a file server holds one descriptor
/// per file that its guest knows, and a root file system has tens of thousands.
///
/// That is what the kernel allows any process (fs.nr_open) for who may raise the hard limit, and the hard limit else.
///
/// # Errors
/// Those of setrlimit(2).
pub fn raise_open_files() -> io::Result<()> {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let most = fs::read_to_string("/proc/sys/fs/nr_open").ok().and_then(|text| text.trim().parse().ok());
    if let Some(most) = most.filter(|most| maximum.is_some_and(|maximum| maximum < *most))
        && setrlimit(Resource::Nofile, Rlimit { current: Some(most), maximum: Some(most) }).is_ok()
    {
        return Ok(());
    }
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?;
    Ok(())
}
