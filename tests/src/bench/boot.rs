//! `bench boot`: from the start of the process to the guest, katavm beside its peers.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;

use super::bundle;
use super::clock::{milliseconds, now};
use super::guest;
use super::measure::{Measure, Table};
use super::moments::{Moments, Station};
use super::monitor::{Monitor, Setup, katavm};
use super::plot;
use super::process::{Tree, await_readable};
use super::syscalls;
use crate::e2e::Context;

// Of every monitor, on one kernel and initramfs with the serial console on:
/// To the first entry of a vCPU into the guest.
const FIRST_RUN: Measure = Measure::new("first_run", "ms");
/// To the first instruction in user mode.
const USERSPACE: Measure = Measure::new("userspace", "ms");
/// To the first line of user mode on the serial console.
const USERSPACE_LINE: Measure = Measure::aim("userspace_line", "ms", 450.0);
/// Exits by KVM's own count, up to that line.
const EXITS: Measure = Measure::new("exits", "");
/// System calls of all processes, up to that line.
const SYSCALLS: Measure = Measure::new("syscalls", "");
/// Memory of all processes beside the guest's RAM, at that line.
const MEMORY: Measure = Measure::new("memory", "KiB");
// Of katavm alone, on its own image with the serial console quiet, as `katavm run` is used:
/// To the start of the agent: the first program of user mode.
const QUIET_USERSPACE: Measure = Measure::aim("quiet_userspace", "ms", 250.0);
/// To the agent's report that it is ready.
const AGENT_READY: Measure = Measure::new("agent_ready", "ms");
/// Exits up to that report.
const AGENT_READY_EXITS: Measure = Measure::new("agent_ready_exits", "");
/// System calls up to that report.
const AGENT_READY_SYSCALLS: Measure = Measure::new("agent_ready_syscalls", "");
/// To the end of `katavm run` of /bin/true in a busybox bundle.
const RUN_TRUE: Measure = Measure::new("run_true", "ms");
/// Memory beside the guest's RAM while a container uses its root over virtio-fs.
const RUN_MEMORY: Measure = Measure::aim("run_memory", "KiB", 5120.0);

const MEASURES: [Measure; 12] = [
    FIRST_RUN,
    USERSPACE,
    USERSPACE_LINE,
    EXITS,
    SYSCALLS,
    MEMORY,
    QUIET_USERSPACE,
    AGENT_READY,
    AGENT_READY_EXITS,
    AGENT_READY_SYSCALLS,
    RUN_TRUE,
    RUN_MEMORY,
];

/// Boots every monitor `runs` times, in turn, `traced` of them once more under strace, and prints medians and ratios.
///
/// # Errors
/// When a monitor fails to boot the guest.
pub fn run(runs: u32, traced: u32, out: &mut impl Write) -> Result<()> {
    let bench = Bench::new()?;
    let monitors = Monitor::available();
    let ours = Monitor::Katavm.name();
    // Once for nothing: files come into the page cache, and katavm probes this machine's KVM.
    for monitor in &monitors {
        bench.boot(*monitor)?;
    }
    bench.run_true()?;
    let mut table = Table::default();
    for round in 0..runs {
        for monitor in &monitors {
            say(round, monitor.name());
            let boot = bench.boot(*monitor)?;
            for (measure, value) in boot {
                table.add(&measure, monitor.name(), value);
            }
            if round < traced {
                say(round, "strace");
                let calls = bench.syscalls(*monitor)?;
                table.add(&SYSCALLS, monitor.name(), calls);
            }
        }
        say(round, "katavm run /bin/true");
        for (measure, value) in bench.run_true()? {
            table.add(&measure, ours, value);
        }
        say(round, "katavm run of a busy container");
        table.add(&RUN_MEMORY, ours, bench.run_memory()?);
        if round < traced {
            say(round, "strace katavm run /bin/true");
            let calls = bench.agent_ready_syscalls()?;
            table.add(&AGENT_READY_SYSCALLS, ours, calls);
        }
    }
    table.print("boot", &MEASURES, out)?;
    writeln!(out, "boot plot {}", plot::draw("boot", &table.medians(&MEASURES))?.display())?;
    Ok(())
}

/// Progress, for who waits.
fn say(round: u32, what: &str) {
    eprintln!("round {}: {what}", round + 1);
}

/// What all runs share.
struct Bench {
    setup: Setup,
    /// Runs /bin/true.
    run_true: PathBuf,
    /// Reads all of its root, writes to it, and then says so and waits.
    run_busy: PathBuf,
    /// `uname -r` of the guest.
    kernel_release: String,
    _scratch: TempDir,
}

/// What the busy container runs.
const BUSY: &str = "find / -xdev -type f -exec cat {} + >/dev/null; \
                    dd if=/dev/zero of=/written bs=64k count=64 2>/dev/null; rm /written; echo busy; read -r _";

impl Bench {
    fn new() -> Result<Self> {
        let scratch = TempDir::with_prefix("katavm-bench-")?;
        let image = bundle::image(scratch.path())?;
        let initramfs = scratch.path().join("initramfs");
        fs::write(&initramfs, guest::initramfs()?)?;
        let bundle = bundle::busybox(scratch.path())?;
        Ok(Self {
            run_true: bundle::with(&bundle, "true", &["/bin/true"])?,
            run_busy: bundle::with(&bundle, "busy", &["/bin/sh", "-c", BUSY])?,
            kernel_release: Context::new("bench-boot")?.kernel_release()?,
            setup: Setup { kernel: image.join("vmlinux"), initramfs, bundle, scratch: scratch.path().into() },
            _scratch: scratch,
        })
    }

    /// Boots the common guest until it has printed its line.
    fn boot(&self, monitor: Monitor) -> Result<[(Measure, f64); 5]> {
        let mut command = monitor.command(&self.setup)?;
        let mut moments = Moments::watch()?;
        let start = now()?;
        let (tree, printed) = self.until_printed(&mut command, &mut moments, monitor)?;
        Ok([
            (FIRST_RUN, milliseconds(moments.wait(Station::FirstRun)? - start)),
            (USERSPACE, milliseconds(moments.wait(Station::Userspace)? - start)),
            (USERSPACE_LINE, milliseconds(printed - start)),
            (EXITS, tree.exits()? as f64),
            (MEMORY, tree.memory_kib()? as f64),
        ])
    }

    /// System calls of the same.
    fn syscalls(&self, monitor: Monitor) -> Result<f64> {
        let log = self.setup.scratch.join("strace");
        let mut command = syscalls::traced(&monitor.command(&self.setup)?, &log);
        let mut moments = Moments::watch()?;
        drop(self.until_printed(&mut command, &mut moments, monitor)?);
        Ok(syscalls::count(&log, None)? as f64)
    }

    /// Starts `command` and waits for the line, which must be on the console then.
    ///
    /// The console is a file: a reader of a pipe would be woken up for each byte, and that be counted, too.
    fn until_printed(
        &self,
        command: &mut Command,
        moments: &mut Moments,
        monitor: Monitor,
    ) -> Result<(Tree, Duration)> {
        let path = self.setup.scratch.join("console");
        let console = File::create(&path)?;
        command.stdin(Stdio::null()).stdout(console.try_clone()?).stderr(console);
        let tree = Tree::spawn(command)?;
        let printed = moments.wait(Station::Printed);
        let console = String::from_utf8_lossy(&fs::read(&path)?).into_owned();
        let printed = printed.with_context(|| format!("{} does not boot; its console:\n{console}", monitor.name()))?;
        ensure!(
            console.contains(guest::LINE.trim_end()),
            "{} printed no line; its console:\n{console}",
            monitor.name()
        );
        Ok((tree, printed))
    }

    /// Runs /bin/true on the image as users do.
    fn run_true(&self) -> Result<[(Measure, f64); 4]> {
        let mut moments = Moments::watch()?;
        let start = now()?;
        let output = output(self.katavm(&self.run_true).arg("--timings=json"))?;
        let end = now()?;
        let text = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "katavm run /bin/true: {}: {text}", output.status);
        let timings: Value = text.lines().find_map(|line| serde_json::from_str(line).ok()).context("no timings")?;
        let fact = |name: &str| timings["timings"][name].as_f64().with_context(|| format!("no {name} in {text}"));
        // katavm's own clock starts in steps of 10 ms; the first entry is in both, so what follows is exact.
        let first_run = milliseconds(moments.wait(Station::FirstRun)? - start);
        let since_first_run = |name: &str| anyhow::Ok((fact(name)? - fact("first_kvm_run_ns")?) / 1e6);
        let at = |name: &str| since_first_run(name).map(|more| first_run + more);
        anyhow::Ok([
            (QUIET_USERSPACE, at("agent_main_ns")?),
            (AGENT_READY, at("agent_ready_ns")?),
            (AGENT_READY_EXITS, fact("agent_ready_exits")?),
            (RUN_TRUE, milliseconds(end - start)),
        ])
    }

    /// Memory of all of katavm's processes while a container has just used its root and waits.
    fn run_memory(&self) -> Result<f64> {
        let mut command = self.katavm(&self.run_busy);
        let mut tree = Tree::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()))?;
        let stdout = tree.child().stdout.take().context("no stdout")?;
        await_readable(&stdout)?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        ensure!(line == "busy\n", "the container says {line:?}");
        Ok(tree.memory_kib()? as f64)
    }

    /// System calls until the agent's report, which carries the guest kernel's release, arrives.
    fn agent_ready_syscalls(&self) -> Result<f64> {
        let log = self.setup.scratch.join("strace");
        let output = output(&mut syscalls::traced(&self.katavm(&self.run_true), &log))?;
        ensure!(output.status.success(), "strace katavm: {}", String::from_utf8_lossy(&output.stderr));
        Ok(syscalls::count(&log, Some(&self.kernel_release))? as f64)
    }

    /// `katavm run` of `bundle` on its own image.
    fn katavm(&self, bundle: &Path) -> Command {
        let mut command = katavm(&self.setup.scratch, bundle);
        if let Some(image) = self.setup.kernel.parent() {
            command.env("KATAVM_GUEST_IMAGE", image);
        }
        command
    }
}

/// Runs a command to its end.
fn output(command: &mut Command) -> Result<Output> {
    Tree::spawn(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()))?.output()
}
