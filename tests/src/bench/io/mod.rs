//! `bench io`: what a guest's requests of its devices cost, katavm beside its peers.

mod exchange;
mod host;
mod kinds;
mod monitors;
mod worker;

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tempfile::TempDir;

use self::host::Host;
pub use self::kinds::Kind;
use self::kinds::{DONE, Workload, marks};
use self::monitors::Setup;
use super::bundle;
use super::measure::{Measure, Table};
use super::monitor::Monitor;
use super::plot;
use super::process::Tree;
use super::trace::{Trace, time_of};

/// Names of system calls' counts by process, in a trace.
const SYSCALLS: &str = "events/raw_syscalls/sys_enter";

/// How often a guest's patience may be tried in the first round. Programs come from the disk then, and while all of the machine
/// waits for that, a counting clock jumps from one timer to the next.
const FIRST_TRIES: u32 = 50;

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
    let kind = Kind::of(args.next()?.to_str()?)?;
    let mut path = || args.next().map(PathBuf::from);
    let setup = Setup { kernel: path()?, initramfs: path()?, scratch: path()? };
    Some(monitors::run(kind, &setup))
}

/// What is measured of a workload.
struct Measures {
    /// Time of a request, the host's and the guest's.
    time: Measure,
    /// How often the vCPU left the guest, a request.
    exits: Measure,
    /// System calls of the monitor's processes and of the other end of connections, a request.
    syscalls: Measure,
}

impl Measures {
    fn of(workload: &Workload) -> Self {
        // Some dozen names, once.
        let name = |of: &str| -> &'static str { Box::leak(format!("{}_{of}", workload.name).into_boxed_str()) };
        Self {
            time: Measure::new(workload.name, "us"),
            exits: Measure::new(name("exits"), ""),
            syscalls: Measure::new(name("syscalls"), ""),
        }
    }
}

/// Boots every monitor `runs` times with each kind of device, in turn, and prints medians and ratios.
///
/// # Errors
/// When a monitor fails.
pub fn run(kinds: &[Kind], runs: u32, out: &mut impl Write) -> Result<()> {
    keep_time();
    let scratch = TempDir::with_prefix("katavm-bench-")?;
    let initramfs = scratch.path().join("initramfs");
    fs::write(&initramfs, worker::initramfs()?)?;
    let kernel = bundle::image(scratch.path())?.join("vmlinux");
    let setup = Setup { kernel, initramfs, scratch: scratch.path().into() };
    kinds.iter().try_for_each(|kind| measure(*kind, &setup, runs, out))
}

fn measure(kind: Kind, setup: &Setup, runs: u32, out: &mut impl Write) -> Result<()> {
    let _host = Host::new(kind, &setup.scratch)?;
    let workloads = kind.workloads();
    let measures: Vec<Measures> = workloads.iter().map(Measures::of).collect();
    let mut table = Table::default();
    for round in 0..=runs {
        for monitor in Monitor::available() {
            eprintln!("{}, round {round}: {}", kind.name(), monitor.name());
            let count_syscalls = round == 0;
            let Some(found) = once(monitor, kind, setup, count_syscalls)? else { continue };
            for (measures, found) in measures.iter().zip(found) {
                // The first round brings files into the page cache, and counting takes its time: it is for nothing else.
                if count_syscalls {
                    table.add(&measures.syscalls, monitor.name(), found.syscalls);
                } else {
                    table.add(&measures.time, monitor.name(), found.time_us);
                    table.add(&measures.exits, monitor.name(), found.exits);
                }
            }
        }
    }
    let name = format!("io {}", kind.name());
    let times: Vec<Measure> = measures.iter().map(|measures| measures.time).collect();
    let counts = measures.iter().flat_map(|measures| [measures.exits, measures.syscalls]);
    let all: Vec<Measure> = times.iter().copied().chain(counts).collect();
    table.print(&name, &all, out)?;
    let plot = plot::draw(&format!("io-{}", kind.name()), &table.medians(&times))?;
    writeln!(out, "{name} plot {}", plot.display())?;
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

/// What one request cost.
struct Found {
    time_us: f64,
    exits: f64,
    syscalls: f64,
}

/// What is counted while a guest runs.
struct Counts {
    exits: u64,
    syscalls: u64,
}

/// One boot with all workloads.
fn once(monitor: Monitor, kind: Kind, setup: &Setup, count_syscalls: bool) -> Result<Option<Vec<Found>>> {
    let workloads = kind.workloads();
    let filter = format!("function >= {DONE} && function <= {}", marks(workloads.len()).0);
    let mut settings = vec![("events/kvm/kvm_cpuid/filter", &*filter), ("events/kvm/kvm_cpuid/enable", "1")];
    let histogram = format!("{SYSCALLS}/trigger");
    if count_syscalls {
        settings.push((&histogram, "hist:keys=common_pid:size=4096"));
    }
    let Some(mut command) = monitors::command(monitor, kind, setup)? else { return Ok(None) };
    let mut trace = Trace::new(&settings)?;
    let path = setup.scratch.join("console");
    let console = File::create(&path)?;
    command.stdin(Stdio::null()).stdout(console.try_clone()?).stderr(console);
    let tree = Tree::spawn(&mut command)?;
    let look = |trace: &Trace| -> Result<Counts> {
        let syscalls = if count_syscalls { syscalls(&trace.file(&format!("{SYSCALLS}/hist"))?, &tree) } else { 0 };
        Ok(Counts { exits: tree.exits()?, syscalls })
    };
    let tries = if count_syscalls { FIRST_TRIES } else { 1 };
    let mut counts = Vec::new();
    for index in 0..workloads.len() {
        let (begin, end) = marks(index);
        await_mark(&mut trace, begin, tries).with_context(|| said(&path))?;
        let before = look(&trace)?;
        await_mark(&mut trace, end, tries).with_context(|| said(&path))?;
        let after = look(&trace)?;
        counts.push(Counts { exits: after.exits - before.exits, syscalls: after.syscalls - before.syscalls });
    }
    await_mark(&mut trace, DONE, tries).with_context(|| said(&path))?;
    let console = said(&path);
    let found = workloads.iter().zip(counts).map(|(workload, counts)| {
        let line =
            console.lines().find_map(|line| line.strip_prefix("io ")?.strip_prefix(workload.name)?.strip_prefix(' '));
        let ns: f64 = line.with_context(|| console.clone())?.trim().parse()?;
        let count = workload.count as f64;
        let (exits, syscalls) = (counts.exits as f64 / count, counts.syscalls as f64 / count);
        Ok(Found { time_us: ns / 1000.0 / count, exits, syscalls })
    });
    found.collect::<Result<_>>().map(Some)
}

/// System calls of the threads of `tree` and of our ends of connections, out of a histogram of the kernel's.
fn syscalls(histogram: &str, tree: &Tree) -> u64 {
    let ours =
        fs::read_dir("/proc/self/task").into_iter().flatten().flatten().filter(|task| {
            fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.trim() == exchange::THREAD)
        });
    let ours = ours.filter_map(|task| task.file_name().to_str()?.parse().ok());
    let threads: Vec<u32> = tree.threads().into_iter().chain(ours).collect();
    let hits = histogram.lines().filter_map(hits).filter(|(thread, _)| threads.contains(thread));
    hits.map(|(_, hits)| hits).sum()
}

/// Who made how many calls: `{ common_pid:       1234 } hitcount:         56`.
fn hits(line: &str) -> Option<(u32, u64)> {
    let (pid, count) = line.strip_prefix("{ common_pid:")?.split_once("} hitcount:")?;
    Some((pid.trim().parse().ok()?, count.trim().parse().ok()?))
}

fn await_mark(trace: &mut Trace, leaf: u32, mut tries: u32) -> Result<()> {
    while time_of(trace.text(), &format!(": kvm_cpuid: func {leaf:x} ")).is_none() {
        if let Err(error) = trace.read() {
            tries -= 1;
            if tries == 0 {
                return Err(error);
            }
        }
    }
    Ok(())
}

fn said(console: &Path) -> String {
    String::from_utf8_lossy(&fs::read(console).unwrap_or_default()).replace('\r', "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_has_a_line_for_each_process() {
        assert_eq!(hits("{ common_pid:       1234 } hitcount:         56"), Some((1234, 56)));
        assert_eq!(hits("# trigger info: hist:keys=common_pid:vals=hitcount [active]"), None);
        assert_eq!(hits("    Hits: 56"), None);
    }
}
