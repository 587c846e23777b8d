//! `bench pod`: a pod's life through containerd's CRI plugin, katavm beside runc.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;

use anyhow::Result;

use super::clock::{milliseconds, now};
use super::measure::{Measure, Table};
use super::plot;
use super::process::all_memory_kib;
use crate::e2e::Context;
use crate::e2e::cri::{Flavour, Node, Pod};

/// RunPodSandbox, with the pod's network by CNI.
const SANDBOX: Measure = Measure::new("sandbox", "ms");
/// CreateContainer and StartContainer of one that sleeps.
const CONTAINER: Measure = Measure::new("container", "ms");
/// Both: from nothing to a running container.
const RUNNING: Measure = Measure::new("running", "ms");
/// A further container of the pod.
const FURTHER: Measure = Measure::new("further_container", "ms");
/// ExecSync of /bin/true, the second one.
const EXEC: Measure = Measure::new("exec", "ms");
/// StopPodSandbox and RemovePodSandbox with both containers.
const REMOVE: Measure = Measure::new("remove", "ms");
/// PSS of all processes of the pod with both containers, the guest's RAM as far as it is used among it.
const MEMORY: Measure = Measure::new("memory", "KiB");
/// The same without the guest's RAM.
const OVERHEAD: Measure = Measure::new("memory_without_ram", "KiB");

const MEASURES: [Measure; 8] = [SANDBOX, CONTAINER, RUNNING, FURTHER, EXEC, REMOVE, MEMORY, OVERHEAD];
const RUNTIMES: [&str; 2] = ["katavm", "runc"];

/// Pods `runs` times with each runtime, in turn; prints medians and ratios, and draws them.
///
/// # Errors
/// When containerd or a runtime fails.
pub fn run(runs: u32, out: &mut impl Write) -> Result<()> {
    let context = Context::new("bench")?;
    let node = Node::start(&context, Flavour::Pause)?;
    // Once for nothing: files come into the page cache, and katavm probes this machine's KVM.
    for runtime in RUNTIMES {
        life(&node, runtime)?;
    }
    let mut table = Table::default();
    for round in 0..runs {
        for runtime in RUNTIMES {
            eprintln!("round {}: {runtime}", round + 1);
            for (measure, value) in life(&node, runtime)? {
                table.add(&measure, runtime, value);
            }
        }
    }
    table.print("pod", &MEASURES, out)?;
    let drawn = plot::draw("pod", &table.medians(&MEASURES))?;
    writeln!(out, "pod plot {}", drawn.display())?;
    Ok(())
}

/// From RunPodSandbox to RemovePodSandbox.
fn life(node: &Node, runtime: &str) -> Result<[(Measure, f64); 8]> {
    let others = processes()?;
    let start = now()?;
    let pod = Pod::run_with(node, "measured", runtime, |_| ())?;
    let sandbox = now()?;
    let id = pod.idle("first")?;
    let running = now()?;
    pod.idle("second")?;
    let further = now()?;
    pod.sh(&id, "true")?;
    let warm = now()?;
    pod.sh(&id, "true")?;
    let executed = now()?;
    let (mut all, mut overhead) = (0, 0);
    for pid in processes()?.difference(&others) {
        // The kernel's own have none, and containerd's helpers come and go.
        let (whole, without_ram) = all_memory_kib(*pid).unwrap_or_default();
        all += whole;
        overhead += without_ram;
    }
    let measured = now()?;
    pod.remove()?;
    let end = now()?;
    let memory = |kib: u64| u32::try_from(kib).map(f64::from);
    Ok([
        (SANDBOX, milliseconds(sandbox - start)),
        (CONTAINER, milliseconds(running - sandbox)),
        (RUNNING, milliseconds(running - start)),
        (FURTHER, milliseconds(further - running)),
        (EXEC, milliseconds(executed - warm)),
        (REMOVE, milliseconds(end - measured)),
        (MEMORY, memory(all)?),
        (OVERHEAD, memory(overhead)?),
    ])
}

fn processes() -> Result<BTreeSet<u32>> {
    let entries = fs::read_dir("/proc")?.collect::<Result<Vec<_>, _>>()?;
    Ok(entries.into_iter().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}
