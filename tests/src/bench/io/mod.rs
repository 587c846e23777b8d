//! `bench io`: what requests of a disk cost, katavm beside its peers.

mod monitors;
mod worker;
mod workloads;

use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tempfile::TempDir;

use self::monitors::Setup;
use self::workloads::{DISK, DONE, MARKS, WORKLOADS, Workload, marks};
use super::bundle;
use super::hangs::Hangs;
use super::measure::{Measure, Table};
use super::monitor::Monitor;
use super::plot;
use super::process::Tree;
use super::trace::{Trace, time_of};

/// This program as a guest's init, or as our monitor; nothing if it is neither.
///
/// # Errors
/// Those of our monitor.
pub fn enter() -> Option<Result<()>> {
    if std::process::id() == 1 {
        worker::run();
        return Some(Ok(()));
    }
    let mut args = std::env::args_os().skip(1);
    if args.next()? != monitors::OURS {
        return None;
    }
    let paths: Vec<PathBuf> = args.map(PathBuf::from).collect();
    let [kernel, initramfs, disk] = &*paths else { return None };
    Some(monitors::run(kernel, initramfs, disk))
}

/// What is measured of a workload.
struct Measures {
    /// Time of a request, the host's and the guest's.
    time: Measure,
    /// How often the vCPU left the guest, a request.
    exits: Measure,
}

impl Measures {
    fn of(workload: &Workload) -> Self {
        // A dozen names, once.
        let exits: &'static str = Box::leak(format!("{}_exits", workload.name).into_boxed_str());
        Self { time: Measure::new(workload.name, "us"), exits: Measure::new(exits, "") }
    }
}

/// Boots every monitor `runs` times, in turn, and prints medians and ratios.
///
/// # Errors
/// When a monitor fails.
pub fn run(runs: u32, out: &mut impl Write) -> Result<()> {
    keep_time();
    let scratch = TempDir::with_prefix("katavm-bench-")?;
    let setup = setup(&scratch)?;
    let (hangs, monitors) = (Hangs::default(), Monitor::available());
    let measures: Vec<Measures> = WORKLOADS.iter().map(Measures::of).collect();
    let mut table = Table::default();
    for round in 0..=runs {
        for monitor in &monitors {
            eprintln!("round {round}: {}", monitor.name());
            let found = hangs.again(monitor.name(), || once(*monitor, &setup))?;
            // Once for nothing: files come into the page cache.
            if round == 0 {
                continue;
            }
            for (measures, found) in measures.iter().zip(found) {
                table.add(&measures.time, monitor.name(), found.time_us);
                table.add(&measures.exits, monitor.name(), found.exits);
            }
        }
    }
    let times: Vec<Measure> = measures.iter().map(|measures| measures.time).collect();
    let exits = measures.iter().map(|measures| measures.exits);
    let all: Vec<Measure> = times.iter().copied().chain(exits).collect();
    table.print("io", &all, out)?;
    hangs.print("io", out)?;
    writeln!(out, "io plot {}", plot::draw("io", &table.medians(&times))?.display())?;
    Ok(())
}

/// Wakes the machine up now and then, for as long as this process lives: in the counting lab nobody does while all of it
/// waits for a grace period of RCU, as at the end of a virtual machine.
fn keep_time() {
    const TICK: Duration = Duration::from_millis(20);
    std::thread::spawn(|| {
        loop {
            std::thread::sleep(TICK);
        }
    });
}

fn setup(scratch: &TempDir) -> Result<Setup> {
    let (initramfs, disk) = (scratch.path().join("initramfs"), scratch.path().join("disk"));
    fs::write(&initramfs, worker::initramfs()?)?;
    // No holes: all of it is there.
    fs::write(&disk, vec![0x5a; DISK])?;
    let kernel = bundle::image(scratch.path())?.join("vmlinux");
    Ok(Setup { kernel, initramfs, disk, scratch: scratch.path().into() })
}

/// What one request cost.
struct Found {
    time_us: f64,
    exits: f64,
}

/// One boot with all workloads.
fn once(monitor: Monitor, setup: &Setup) -> Result<Vec<Found>> {
    let filter = format!("function >= {MARKS} && function <= {DONE}");
    let settings = [("events/kvm/kvm_cpuid/filter", &*filter), ("events/kvm/kvm_cpuid/enable", "1")];
    let mut trace = Trace::new(&settings)?;
    let path = setup.scratch.join("console");
    let console = File::create(&path)?;
    let mut command = monitors::command(monitor, setup)?;
    command.stdin(Stdio::null()).stdout(console.try_clone()?).stderr(console);
    let tree = Tree::spawn(&mut command)?;
    let mut counts = Vec::new();
    for index in 0..WORKLOADS.len() {
        let (begin, end) = marks(index);
        await_mark(&mut trace, begin).with_context(|| said(&path))?;
        let before = tree.exits()?;
        await_mark(&mut trace, end).with_context(|| said(&path))?;
        counts.push(tree.exits()? - before);
    }
    await_mark(&mut trace, DONE).with_context(|| said(&path))?;
    let console = said(&path);
    let found = WORKLOADS.iter().zip(counts).map(|(workload, exits)| {
        let line =
            console.lines().find_map(|line| line.strip_prefix("io ")?.strip_prefix(workload.name)?.strip_prefix(' '));
        let ns: f64 = line.with_context(|| console.clone())?.trim().parse()?;
        let count = workload.count as f64;
        Ok(Found { time_us: ns / 1000.0 / count, exits: exits as f64 / count })
    });
    found.collect()
}

fn await_mark(trace: &mut Trace, leaf: u32) -> Result<()> {
    while time_of(trace.text(), &format!(": kvm_cpuid: func {leaf:x} ")).is_none() {
        trace.read()?;
    }
    Ok(())
}

fn said(console: &std::path::Path) -> String {
    String::from_utf8_lossy(&fs::read(console).unwrap_or_default()).replace('\r', "")
}
