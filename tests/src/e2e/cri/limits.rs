//! Sizes, limits and what is used of them.

use anyhow::{Result, ensure};
use protobuf::MessageField;
use serde_json::json;

use super::node::{DEFAULT_MIB, Node, until};
use super::{Context, Pod, Verdict, on_node};
use crate::cri::messages::UInt64Value;

fn value(field: &MessageField<UInt64Value>) -> u64 {
    field.as_ref().map(|field| field.value).unwrap_or_default()
}

pub fn size(context: &Context) -> Result<Verdict> {
    on_node(context, |node| {
        let pod = Pod::run(node, "size", |config| {
            config["linux"]["resources"] = json!({
                "cpu_quota": 150_000, "cpu_period": 100_000, "cpu_shares": 1536, "memory_limit_in_bytes": 300 << 20,
            });
        })?;
        let id = pod.idle("main")?;
        let seen = pod.sh(&id, "nproc; awk '/MemTotal/ { print int($2 / 1024 / 50) * 50 }' /proc/meminfo")?;
        // What the kernel keeps for itself is not in its total.
        ensure!(seen == "2\n350" || seen == "2\n300", "{seen:?}");
        let group = std::path::Path::new("/sys/fs/cgroup/kubepods/size").join(&pod.id);
        let limit: u64 = std::fs::read_to_string(group.join("memory.max"))?.trim().parse()?;
        ensure!(((300 << 20)..(600 << 20)).contains(&limit), "{limit}");
        let processes = std::fs::read_to_string(group.join("cgroup.procs"))?;
        ensure!(processes.lines().count() >= 2, "{processes:?}: the sandbox is not in the pod's control group");
        pod.remove()
    })
}

/// Without limits it is what the configuration says that containerd's names.
pub fn default_size(context: &Context) -> Result<Verdict> {
    on_node(context, |node| {
        let pod = Pod::run(node, "default", |_| ())?;
        let id = pod.idle("main")?;
        let seen: u64 = pod.sh(&id, "awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo")?.parse()?;
        // What the kernel keeps for itself is not in its total; 512 would be katavm's own default.
        ensure!((DEFAULT_MIB - 60..DEFAULT_MIB).contains(&seen), "{seen} MiB");
        pod.remove()
    })
}

pub fn update(context: &Context) -> Result<Verdict> {
    on_node(context, |node| {
        let pod = Pod::run(node, "update", |_| ())?;
        let id = pod.start("main", &["sleep", "100000"], |config| {
            config["linux"]["resources"] =
                json!({ "memory_limit_in_bytes": 64 << 20, "cpu_quota": 50_000, "cpu_period": 100_000 });
        })?;
        let show = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max";
        let before = pod.sh(&id, show)?;
        ensure!(before == format!("{}\n50000 100000", 64 << 20), "{before:?}");
        node.cri.update_container(
            &id,
            &json!({ "memory_limit_in_bytes": 96 << 20, "cpu_quota": 20_000, "cpu_period": 100_000 }),
        )?;
        let after = pod.sh(&id, show)?;
        ensure!(after == format!("{}\n20000 100000", 96 << 20), "{after:?}");
        let told = node.cri.container_status(&id)?.resources.unwrap_or_default().linux.unwrap_or_default();
        ensure!(told.memory_limit_in_bytes == 96 << 20 && told.cpu_quota == 20_000, "{told:?}");
        cpusets(node, &pod, &id)?;
        let killed = pod.start("killed", &["sh", "-c", "x=$(head -c 200000000 /dev/zero | tr '\\0' x)"], |config| {
            config["linux"]["resources"] = json!({ "memory_limit_in_bytes": 32 << 20 });
        })?;
        let ended = pod.ended(&killed)?;
        ensure!(ended.reason == "OOMKilled" && ended.exit_code != 0, "{ended:?}");
        pod.remove()
    })
}

/// As a kubelet with the static policy of its CPU manager does it: the sandbox runs on what its containers name.
fn cpusets(node: &Node, pod: &Pod<'_>, id: &str) -> Result<()> {
    let group = std::path::Path::new("/sys/fs/cgroup/kubepods/update").join(&pod.id);
    let expect = |wanted: &str| {
        let cpus = std::fs::read_to_string(group.join("cpuset.cpus"))?;
        ensure!(cpus.trim() == wanted, "{cpus:?} instead of {wanted:?}");
        Ok(())
    };
    let start = |name: &str, program: &[&str]| {
        pod.start(name, program, |config| config["linux"]["resources"] = json!({ "cpuset_cpus": "0" }))
    };
    let ends = |wanted: &str| until("the CPUs of a container that has ended stay", || Ok(expect(wanted).is_ok()));
    let only = start("only", &["sleep", "100000"])?;
    expect("0")?;
    node.cri.stop_container(&only, 0)?;
    ends("0-1")?;
    node.cri.update_container(id, &json!({ "cpuset_cpus": "1" }))?;
    expect("1")?;
    let other = start("other", &["sleep", "100000"])?;
    expect("0-1")?;
    let refused = node.cri.update_container(&other, &json!({ "cpuset_cpus": "4096" }));
    ensure!(refused.is_err(), "there is a CPU 4096");
    expect("0-1")?;
    node.cri.stop_container(&other, 0)?;
    ends("1")?;
    ensure!(start("failing", &["/nosuch"]).is_err(), "there is a program /nosuch");
    ends("1")
}

pub fn stats(context: &Context) -> Result<Verdict> {
    on_node(context, |node| {
        let pod = Pod::run(node, "stats", |_| ())?;
        let work = "dd if=/dev/zero of=/tmp/file bs=1M count=4 2>/dev/null; while :; do :; done";
        let id = pod.start("main", &["sh", "-c", work], |_| ())?;
        let cpu = || {
            Ok::<_, anyhow::Error>(value(
                &node.cri.container_stats(&id)?.cpu.unwrap_or_default().usage_core_nano_seconds,
            ))
        };
        let before = cpu()?;
        until("the container uses no CPU time", || Ok(cpu()? > before + 200_000_000))?;
        let stats = node.cri.container_stats(&id)?;
        ensure!(stats.attributes.id == id, "{stats:?}");
        ensure!(value(&stats.memory.working_set_bytes) > 0, "{stats:?}");
        until("the written layer is not seen", || {
            Ok(value(&node.cri.container_stats(&id)?.writable_layer.unwrap_or_default().used_bytes) >= 4 << 20)
        })?;
        let pod_stats = node.cri.pod_stats(&pod.id)?.linux.unwrap_or_default();
        ensure!(pod_stats.containers.len() == 1, "{pod_stats:?}");
        ensure!(value(&pod_stats.memory.working_set_bytes) > 0, "{pod_stats:?}");
        ensure!(pod_stats.network.default_interface.name == "eth0", "{pod_stats:?}");
        pod.remove()
    })
}

/// Limits that nobody has told of beforehand: of a container that joins later.
pub fn grown(context: &Context) -> Result<Verdict> {
    on_node(context, |node| {
        let pod = Pod::run(node, "grown", |_| ())?;
        let first = pod.idle("first")?;
        let size = || {
            let seen = pod.sh(
                &first,
                "awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo; grep -c ^processor /proc/cpuinfo",
            )?;
            let numbers = seen.lines().map(str::parse).collect::<Result<Vec<u64>, _>>()?;
            Ok::<_, anyhow::Error>((
                numbers.first().copied().unwrap_or_default(),
                numbers.last().copied().unwrap_or_default(),
            ))
        };
        let (before, cpus) = size()?;
        ensure!(cpus == 1, "{cpus} CPUs");
        let limits =
            json!({ "memory_limit_in_bytes": 2 * (DEFAULT_MIB << 20), "cpu_quota": 200_000, "cpu_period": 100_000 });
        let work = "dd if=/dev/zero of=/dev/shm/file bs=1M count=$1 2>/dev/null; rm /dev/shm/file; sleep 100000";
        let large =
            pod.start("large", &["sh", "-c", work, "sh", "32"], |config| config["linux"]["resources"] = limits)?;
        let (grown, cpus) = size()?;
        ensure!(grown >= before + DEFAULT_MIB && cpus == 2, "{before} MiB became {grown}, {cpus} CPUs");
        node.cri.stop_container(&large, 0)?;
        // The first one has no limit: what it may use already stays.
        let (after, cpus) = size()?;
        ensure!(after == grown && cpus == 2, "{grown} MiB became {after}, {cpus} CPUs");
        pod.remove()
    })
}
