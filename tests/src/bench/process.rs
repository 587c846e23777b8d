//! A monitor's processes: starting, counting and ending them.

use std::fs;
use std::io::Read;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Output};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::process::PidfdFlags;

use super::monitor::MEMORY_MIB;

/// How long a guest may take for what it does within a second, by the clock of the counting lab: long enough to tell
/// that it never will.
pub const PATIENCE: Duration = Duration::from_secs(4);

/// Waits until a descriptor can be read, for as long as [`PATIENCE`].
///
/// # Errors
/// When it cannot be.
pub fn await_readable(fd: impl AsFd) -> Result<()> {
    let patience = PollTimeout::try_from(PATIENCE)?;
    ensure!(poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], patience)? > 0, "the guest hangs");
    Ok(())
}

/// A process with all its children, killed when it goes out of sight.
pub struct Tree(Child);

impl Tree {
    /// Starts `command`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(command: &mut Command) -> Result<Self> {
        let child = command.spawn();
        child.map(Self).with_context(|| format!("cannot run {}", command.get_program().display()))
    }

    /// Waits for the end of the first process, whose output is no more than a pipe holds.
    ///
    /// # Errors
    /// When it does not end within [`PATIENCE`].
    pub fn output(mut self) -> Result<Output> {
        let pid = rustix::process::Pid::from_child(&self.0);
        await_readable(rustix::process::pidfd_open(pid, PidfdFlags::empty())?)?;
        let mut output = Output { status: self.0.wait()?, stdout: Vec::new(), stderr: Vec::new() };
        if let Some(mut stdout) = self.0.stdout.take() {
            stdout.read_to_end(&mut output.stdout)?;
        }
        if let Some(mut stderr) = self.0.stderr.take() {
            stderr.read_to_end(&mut output.stderr)?;
        }
        Ok(output)
    }

    /// The first process of it.
    pub fn child(&mut self) -> &mut Child {
        &mut self.0
    }

    /// All its processes, the first one first.
    fn pids(&self) -> Vec<u32> {
        let mut pids = vec![self.0.id()];
        let mut next = 0;
        while let Some(pid) = pids.get(next) {
            let children = threads(*pid).into_iter().filter_map(|tid| {
                let path = format!("/proc/{pid}/task/{tid}/children");
                fs::read_to_string(path).ok()
            });
            let found: Vec<u32> = children.flat_map(|text| numbers(&text)).collect();
            pids.extend(found);
            next += 1;
        }
        pids
    }

    /// All threads of all its processes.
    pub fn threads(&self) -> Vec<u32> {
        self.pids().into_iter().flat_map(threads).collect()
    }

    /// Proportional memory of all its processes in KiB, without the guest's RAM.
    ///
    /// # Errors
    /// When a process cannot be read.
    pub fn memory_kib(&self) -> Result<u64> {
        self.pids().into_iter().map(memory_kib).sum()
    }

    /// How often its virtual machine's vCPUs left the guest, by KVM's own count in debugfs.
    ///
    /// # Errors
    /// When it has none, or debugfs cannot be read.
    pub fn exits(&self) -> Result<u64> {
        let folder = Path::new("/sys/kernel/debug/kvm");
        let entries = fs::read_dir(folder).context("exits are counted in debugfs: it takes root, and it mounted")?;
        let threads = self.threads();
        for entry in entries {
            // Named by the thread that made it and its descriptor.
            let name = entry?.file_name().to_string_lossy().into_owned();
            let thread = name.split('-').next().and_then(|tid| tid.parse().ok());
            if thread.is_some_and(|tid| threads.contains(&tid)) {
                return Ok(fs::read_to_string(folder.join(name).join("exits"))?.trim().parse()?);
            }
        }
        anyhow::bail!("process {} has no virtual machine", self.0.id())
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        // Some may have ended by themselves.
        for pid in self.pids() {
            let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL);
        }
        let _ = self.0.wait();
    }
}

fn numbers(text: &str) -> Vec<u32> {
    text.split_whitespace().filter_map(|word| word.parse().ok()).collect()
}

fn threads(pid: u32) -> Vec<u32> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

fn memory_kib(pid: u32) -> Result<u64> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let (total, ram) = without_ram(&smaps);
    // A child that is forked before the guest's RAM exists has none.
    ensure!(ram <= 1, "process {pid} has {ram} mappings as large as the guest's RAM");
    Ok(total)
}

/// Proportional memory of a process in KiB: all of it, and what is no guest's RAM.
///
/// # Errors
/// When it cannot be read.
pub fn all_memory_kib(pid: u32) -> Result<(u64, u64)> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let all =
        smaps.lines().filter_map(|line| line.strip_prefix("Pss:")).filter_map(|text| numbers(text).first().copied());
    Ok((all.map(u64::from).sum(), without_ram(&smaps).0))
}

/// KiB of all mappings but those that can hold the guest's whole RAM, and how many those are.
fn without_ram(smaps: &str) -> (u64, u32) {
    let (mut total, mut ram, mut is_ram) = (0, 0, false);
    for line in smaps.lines() {
        let kib = line.split_whitespace().nth(1).and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
        if line.starts_with("Size:") {
            is_ram = kib >= u64::from(MEMORY_MIB) << 10;
            ram += u32::from(is_ram);
        } else if line.starts_with("Pss:") && !is_ram {
            total += kib;
        }
    }
    (total, ram)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_ram_is_not_counted() {
        let smaps = "1000-2000 rw-p 0 00:00 0\nSize:  4 kB\nPss:  3 kB\nPss_Dirty: 1 kB\n\
                     2000-3000 rw-p 0 00:00 0\nSize:  262144 kB\nPss:  70000 kB\n\
                     3000-4000 rw-p 0 00:00 0\nSize:  262140 kB\nPss:  20 kB\n";
        assert_eq!(without_ram(smaps), (23, 1));
    }
}
