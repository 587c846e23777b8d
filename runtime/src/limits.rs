//! Where the limits of `linux.resources` hold: what names things of the host in the sandbox' control group there,
//! everything else in the container's own group in the guest.

use std::collections::HashMap;

use oci_spec::runtime::{LinuxCpu, LinuxResources};

/// Memory of a sandbox beside the guest's RAM: the process itself and what the host's kernel keeps for it.
pub const SANDBOX_OVERHEAD: i64 = 128 << 20;

/// The files of cgroup v2 with these beginnings name CPUs, memory nodes and devices of the host.
const OF_HOST: [&str; 2] = ["cpuset.", "io."];

/// What of a container's limits the sandbox' control group on the host is given.
#[must_use]
pub fn of_host(resources: &LinuxResources) -> LinuxResources {
    let mut host = LinuxResources::default();
    if let Some(cpu) = resources.cpu() {
        let mut limits = LinuxCpu::default();
        limits.set_shares(cpu.shares()).set_cpus(cpu.cpus().clone()).set_mems(cpu.mems().clone());
        host.set_cpu(Some(limits));
    }
    if let Some(io) = resources.block_io() {
        let mut io = io.clone();
        // cgroup v2 has none.
        io.set_leaf_weight(None);
        host.set_block_io(Some(io));
    }
    host.set_unified(unified(resources, true));
    host
}

/// Takes out of a container's limits what means nothing in the guest.
pub fn keep_guests(resources: &mut LinuxResources) {
    let unified = unified(resources, false);
    resources.set_unified(unified);
    resources.set_block_io(None);
    resources.set_network(None);
    resources.set_rdma(None);
    if let Some(cpu) = resources.cpu_mut() {
        cpu.set_cpus(None);
        cpu.set_mems(None);
        cpu.set_realtime_runtime(None);
        cpu.set_realtime_period(None);
    }
    if let Some(memory) = resources.memory_mut() {
        memory.set_kernel(None);
        memory.set_kernel_tcp(None);
        memory.set_swappiness(None);
        memory.set_disable_oom_killer(None);
    }
}

/// The names of those limits that hold on the host alone.
#[must_use]
pub fn only_on_host(resources: &LinuxResources) -> Vec<String> {
    let (cpu, unified) = (resources.cpu().as_ref(), unified(resources, true));
    let given = |text: Option<&String>| text.is_some_and(|text| !text.is_empty());
    let fields = [
        ("cpu.cpus", given(cpu.and_then(|cpu| cpu.cpus().as_ref()))),
        ("cpu.mems", given(cpu.and_then(|cpu| cpu.mems().as_ref()))),
        ("blockIO", resources.block_io().as_ref().is_some_and(|io| *io != Default::default())),
    ];
    let fields = fields.into_iter().filter(|(_, given)| *given).map(|(name, _)| name.to_owned());
    let mut files: Vec<_> = unified.into_iter().flatten().map(|(file, _)| format!("unified.{file}")).collect();
    files.sort_unstable();
    fields.chain(files).collect()
}

fn unified(resources: &LinuxResources, host: bool) -> Option<HashMap<String, String>> {
    let is_hosts = |file: &str| OF_HOST.iter().any(|beginning| file.starts_with(beginning));
    let files = resources.unified().clone()?.into_iter().filter(|(file, _)| is_hosts(file) == host);
    Some(files.collect())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn resources(json: Value) -> LinuxResources {
        serde_json::from_value(json).unwrap()
    }

    fn all() -> LinuxResources {
        resources(json!({
            "cpu": { "shares": 7, "quota": 1, "cpus": "1", "mems": "0", "realtimePeriod": 3 },
            "memory": { "limit": 5, "kernel": 6 },
            "blockIO": { "weight": 10, "leafWeight": 20 },
            "unified": { "io.max": "8:0 rbps=1", "cpuset.cpus": "1", "memory.high": "9" },
            "pids": { "limit": 3 },
        }))
    }

    #[test]
    fn each_limit_goes_where_it_means_something() {
        let expected = json!({
            "cpu": { "shares": 7, "cpus": "1", "mems": "0" },
            "blockIO": { "weight": 10 },
            "unified": { "io.max": "8:0 rbps=1", "cpuset.cpus": "1" },
        });
        assert_eq!(of_host(&all()), resources(expected));
        let mut guest = all();
        keep_guests(&mut guest);
        let expected = json!({
            "cpu": { "shares": 7, "quota": 1 },
            "memory": { "limit": 5 },
            "unified": { "memory.high": "9" },
            "pids": { "limit": 3 },
        });
        assert_eq!(guest, resources(expected));
    }

    #[test]
    fn what_has_no_effect_in_a_guest_is_named() {
        assert_eq!(only_on_host(&all()), ["cpu.cpus", "cpu.mems", "blockIO", "unified.cpuset.cpus", "unified.io.max"]);
        let none = json!({ "cpu": { "shares": 7, "cpus": "" }, "blockIO": {}, "unified": { "memory.high": "9" } });
        assert_eq!(only_on_host(&resources(none)), Vec::<String>::new());
    }
}
