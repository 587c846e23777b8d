//! Operations on a container's cgroup (v2). Limits are applied by libcontainer; this is what happens later.

pub mod devices;
pub mod idle;
pub mod oom;
pub mod stats;
mod update;

use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::error::Error;

/// The mount point of the cgroup tree.
pub const ROOT: &str = "/sys/fs/cgroup";
/// The group of all containers' groups.
pub const CONTAINERS: &str = "/sys/fs/cgroup/katavm";

/// The group of one container.
#[derive(Debug, Clone)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// The group of the container with this (checked) id.
    pub fn of(id: &str) -> Self {
        Self { path: Path::new(CONTAINERS).join(id) }
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its path in the tree, as `linux.cgroupsPath` wants it.
    pub fn path_in_tree(&self) -> PathBuf {
        Path::new("/").join(self.path.strip_prefix(ROOT).unwrap_or(&self.path))
    }

    /// Makes it; libcontainer joins it and sets its limits.
    ///
    /// # Errors
    /// Those of mkdir(2).
    pub fn make(&self) -> io::Result<()> {
        fs::create_dir(&self.path)
    }

    /// Kills every process in it (cgroup.kill); none is left out, however fast they fork.
    ///
    /// # Errors
    /// Those of the write; that there is no such group is none.
    pub fn kill(&self) -> io::Result<()> {
        absent_is_ok(fs::write(self.path.join("cgroup.kill"), "1"))
    }

    /// Sends a signal to every process in it. SIGKILL is [`Self::kill`]; another may miss one that is forked meanwhile.
    ///
    /// # Errors
    /// Those of the files; `InvalidInput` when there is no such signal.
    pub fn signal(&self, signal: u32) -> io::Result<()> {
        if signal == libc::SIGKILL as u32 {
            return self.kill();
        }
        let signal = i32::try_from(signal).unwrap_or(-1);
        for pid in self.processes()? {
            let Ok(pidfd) = pidfd_open(pid) else { continue };
            // The pid may have been recycled before it was opened: only one that is (still) in here is signalled.
            if !self.processes()?.contains(&pid) {
                continue;
            }
            let (fd, info) = (pidfd.as_raw_fd(), std::ptr::null::<libc::siginfo_t>());
            // SAFETY: no siginfo is passed, the rest are numbers.
            match Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, info, 0) }) {
                // One that has ended meanwhile needs none.
                Ok(_) | Err(Errno::ESRCH) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Freezes or thaws it, and waits until the kernel says that it is.
    ///
    /// # Errors
    /// Those of the files, and `TimedOut` after ten seconds.
    pub fn freeze(&self, frozen: bool) -> io::Result<()> {
        let value = if frozen { "1" } else { "0" };
        fs::write(self.path.join("cgroup.freeze"), value)?;
        self.wait_for_event(&format!("frozen {value}"), Duration::from_secs(10))
    }

    /// Changes its limits: those that `resources` names (JSON, `linux.resources` of the runtime specification).
    ///
    /// # Errors
    /// What is no such object, or a value that the kernel refuses.
    pub fn update(&self, resources: &[u8]) -> Result<(), Error> {
        update::apply(self, resources)
    }

    /// Waits until it has no process: each has let go of its files and mounts then.
    ///
    /// # Errors
    /// Those of the files, and `TimedOut` after ten seconds; that there is no such group is none.
    pub fn wait_until_empty(&self) -> io::Result<()> {
        absent_is_ok(self.wait_for_event("populated 0", Duration::from_secs(10)))
    }

    /// Waits until it has no process, and removes it with the groups that were made below it.
    ///
    /// # Errors
    /// Those of the files, and `TimedOut` after ten seconds; that there is no such group is none.
    pub fn remove(&self) -> io::Result<()> {
        self.wait_until_empty()?;
        absent_is_ok(remove_tree(&self.path))
    }

    /// The processes in it and in the groups below it, by their pids in the guest's first pid namespace.
    ///
    /// # Errors
    /// Those of the files.
    pub fn processes(&self) -> io::Result<Vec<u32>> {
        let mut pids = Vec::new();
        collect_processes(&self.path, &mut pids)?;
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }

    /// How often the kernel killed a process in it for want of memory.
    pub fn oom_kills(&self) -> u64 {
        let text = fs::read_to_string(self.path.join("memory.events")).unwrap_or_default();
        stats::pairs(&text).find(|(name, _)| *name == "oom_kill").map_or(0, |(_, count)| count)
    }

    /// Waits for a line of cgroup.events (cgroups(7): a change of the file is announced by POLLPRI).
    fn wait_for_event(&self, line: &str, limit: Duration) -> io::Result<()> {
        let path = self.path.join("cgroup.events");
        let mut events = File::open(&path)?;
        let end = Instant::now() + limit;
        loop {
            let mut text = String::new();
            // Reading through the polled descriptor is what arms the next POLLPRI.
            events.rewind()?;
            events.read_to_string(&mut text)?;
            if text.lines().any(|found| found == line) {
                return Ok(());
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let text = format!("{} did not say {line:?} within {limit:?}", path.display());
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            poll(&mut [PollFd::new(events.as_fd(), PollFlags::POLLPRI)], timeout)?;
        }
    }
}

fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open(2) takes no pointer.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: pidfd_open just made this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn absent_is_ok(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // What kernfs says of a group that was removed while its files were open.
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        other => other,
    }
}

fn children(path: &Path) -> io::Result<Vec<PathBuf>> {
    let mut directories = Vec::new();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            directories.push(entry.path());
        }
    }
    Ok(directories)
}

fn remove_tree(path: &Path) -> io::Result<()> {
    for child in children(path)? {
        remove_tree(&child)?;
    }
    fs::remove_dir(path)
}

fn collect_processes(path: &Path, pids: &mut Vec<u32>) -> io::Result<()> {
    let text = fs::read_to_string(path.join("cgroup.procs"))?;
    pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()).filter(|pid| *pid != 0));
    for child in children(path)? {
        absent_is_ok(collect_processes(&child, pids))?;
    }
    Ok(())
}
