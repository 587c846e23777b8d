//! `bench boot`: from the start of the process to the guest, katavm beside its peers.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use katavm_guest_image::cpio::Archive;
use tempfile::TempDir;

use super::measure::Series;
use super::monitor::{Monitor, process};
use crate::e2e::{Context, Guest};

/// What the guest's first program says.
const USERSPACE: &str = "first line of userspace";

type Table = BTreeMap<(&'static str, &'static str), Series>;

/// Boots every monitor `runs` times, in turn, and prints medians and ratios.
///
/// # Errors
/// When a monitor fails to boot the guest.
pub fn run(runs: u32, out: &mut impl Write) -> Result<()> {
    let context = Context::new("bench-boot")?;
    let scratch = TempDir::new()?;
    let kernel = context.image("vmlinux")?;
    let initramfs = initramfs(scratch.path())?;
    let monitors = Monitor::available();
    let mut table = Table::new();
    for round in 0..runs {
        for monitor in &monitors {
            let command = monitor.command(&kernel, &initramfs, scratch.path())?;
            let mut add = |measure, value| table.entry((measure, monitor.name())).or_default().push(value);
            let boot = boot(&command).with_context(|| format!("{} did not boot", monitor.name()))?;
            add("userspace_ms", boot.userspace.as_secs_f64() * 1e3);
            add("exits", boot.exits as f64);
            add("pss_kib", boot.pss_kib as f64);
            // Traced runs are slow, and what they count hardly varies.
            if round < 3 {
                let traced = traced(&command, scratch.path())?;
                add("first_run_ms", traced.first_run.as_secs_f64() * 1e3);
                add("syscalls", traced.syscalls as f64);
            }
        }
        let start = Instant::now();
        let guest = Guest::boot(&context, |_| ())?;
        table.entry(("agent_ready_ms", "katavm")).or_default().push(start.elapsed().as_secs_f64() * 1e3);
        table.entry(("agent_ready_exits", "katavm")).or_default().push(guest.vm.exits() as f64);
        guest.end()?;
    }
    print(&table, out)
}

fn print(table: &Table, out: &mut impl Write) -> Result<()> {
    for ((measure, monitor), series) in table {
        let Some((min, median, max)) = series.summary() else { continue };
        writeln!(out, "boot {measure} {monitor} median {median:.2} (min {min:.2}, max {max:.2})")?;
    }
    for ((measure, monitor), series) in table {
        let ours = table.get(&(measure, "katavm")).and_then(Series::summary);
        if let (Some((_, ours, _)), Some((_, theirs, _)), true) = (ours, series.summary(), *monitor != "katavm") {
            let measure = measure.trim_end_matches("_ms").trim_end_matches("_kib");
            writeln!(out, "boot {measure} katavm/{monitor} ratio {:.2}", ours / theirs)?;
        }
    }
    Ok(())
}

/// An init of busybox that says its line and waits to be killed.
fn initramfs(scratch: &Path) -> Result<PathBuf> {
    let mut archive = Archive::new();
    archive.directory("dev", 0o755)?;
    archive.character_device("dev/console", 0o600, (5, 1))?;
    archive.directory("bin", 0o755)?;
    archive.file("bin/busybox", 0o755, &fs::read("/bin/busybox").context("this needs busybox-static")?)?;
    let script = format!("#!/bin/busybox sh\necho {USERSPACE}\nexec /bin/busybox sleep 1000\n");
    archive.file("init", 0o755, script.as_bytes())?;
    let path = scratch.join("initramfs");
    fs::write(&path, archive.finish())?;
    Ok(path)
}

/// A process that is killed when it goes out of sight.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Boot {
    userspace: Duration,
    exits: u64,
    pss_kib: u64,
}

/// Runs `command` until the guest's first line.
fn boot(command: &[OsString]) -> Result<Boot> {
    let start = Instant::now();
    let mut child = spawn(process(command)?)?;
    wait_for_userspace(&mut child)?;
    let userspace = start.elapsed();
    let pid = child.0.id();
    Ok(Boot { userspace, exits: exits(pid)?, pss_kib: pss_without_ram(pid)? })
}

fn spawn(mut command: Command) -> Result<Killed> {
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
    Ok(Killed(child.with_context(|| format!("cannot run {}", command.get_program().display()))?))
}

fn wait_for_userspace(child: &mut Killed) -> Result<()> {
    let mut console = Vec::new();
    let mut lines = BufReader::new(child.0.stdout.take().context("no console")?);
    let mut seen = 0;
    while lines.read_until(b'\n', &mut console)? > 0 {
        if String::from_utf8_lossy(&console[seen..]).contains(USERSPACE) {
            // The pipe stays open: a monitor must not die of a closed console.
            child.0.stdout = Some(lines.into_inner());
            return Ok(());
        }
        seen = console.len();
    }
    anyhow::bail!("the console ended before userspace:\n{}", String::from_utf8_lossy(&console))
}

/// KVM's own count, from debugfs, where it is for every monitor.
fn exits(pid: u32) -> Result<u64> {
    const KVM: &str = "/sys/kernel/debug/kvm";
    if !Path::new(KVM).exists() {
        let mounted = Command::new("mount").args(["-t", "debugfs", "debugfs", "/sys/kernel/debug"]).status()?;
        ensure!(mounted.success(), "cannot mount debugfs: this counts exits as root");
    }
    for entry in fs::read_dir(KVM)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.split('-').next() == Some(&pid.to_string()) {
            return Ok(fs::read_to_string(path.join("exits"))?.trim().parse()?);
        }
    }
    anyhow::bail!("process {pid} has no virtual machine")
}

/// Proportional memory of the process in KiB, without mappings as large as guest RAM.
fn pss_without_ram(pid: u32) -> Result<u64> {
    let (mut total, mut size) = (0, 0);
    for line in fs::read_to_string(format!("/proc/{pid}/smaps"))?.lines() {
        let kib = || line.split_whitespace().nth(1).and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
        if line.starts_with("Size:") {
            size = kib();
        } else if line.starts_with("Pss:") && size < 200 << 10 {
            total += kib();
        }
    }
    Ok(total)
}

struct Traced {
    first_run: Duration,
    syscalls: u64,
}

/// Runs `command` under strace until the guest's first line: when KVM_RUN first came, and how many system calls there were.
fn traced(command: &[OsString], scratch: &Path) -> Result<Traced> {
    let log = scratch.join("strace");
    let mut strace = Command::new("strace");
    strace.args(["-f", "-ttt", "-o"]).arg(&log).args(command);
    let mut child = spawn(strace)?;
    wait_for_userspace(&mut child)?;
    drop(child);
    let text = fs::read_to_string(&log)?;
    let time = |line: &str| line.split_whitespace().nth(1).and_then(|word| word.parse::<f64>().ok());
    let start = text.lines().find_map(time).context("an empty trace")?;
    let run = text.lines().find(|line| line.contains("KVM_RUN")).and_then(time).context("no KVM_RUN in the trace")?;
    let calls = text.lines().filter(|line| !line.contains("resumed>") && line.contains('('));
    Ok(Traced { first_run: Duration::from_secs_f64((run - start).max(0.0)), syscalls: calls.count() as u64 })
}
