//! What the containers of a pod share, and what they do not.

use anyhow::{Result, ensure};
use serde_json::json;

use super::{Context, Pod, Verdict, on_node};

/// The namespaces of a process, one a line; of the guest's kernel, so they can be compared within a pod.
const NAMESPACES: &str = "for ns in net ipc uts pid mnt cgroup; do readlink /proc/self/ns/$ns; done";

pub fn localhost(context: &Context) -> Result<Verdict> {
    on_node(context, |node| {
        let pod = Pod::run(node, "together", |_| ())?;
        let serve = "echo hello >/tmp/index.html; echo shared >/dev/shm/file; exec httpd -f -p 127.0.0.1:80 -h /tmp";
        let server = pod.start("server", &["sh", "-c", serve], |_| ())?;
        let client = pod.idle("client")?;
        let asked = pod.sh(&client, "until wget -qO- http://127.0.0.1/; do sleep 0.2; done")?;
        ensure!(asked == "hello", "{asked:?}");
        let seen = pod.sh(&client, "cat /dev/shm/file; ls /tmp; ps -o args | grep -c '[h]ttpd' || true; hostname")?;
        ensure!(seen == "shared\n0\ntogether", "{seen:?}");
        let size = pod.sh(&client, "df -k /dev/shm | tail -n 1 | tr -s ' ' | cut -d' ' -f1,2; stat -c %a /dev/shm")?;
        ensure!(size == "shm 65536\n1777" || size == "tmpfs 65536\n1777", "{size:?}");
        let (ours, theirs) = (pod.sh(&client, NAMESPACES)?, pod.sh(&server, NAMESPACES)?);
        let same: Vec<_> = ours.lines().zip(theirs.lines()).map(|(a, b)| a == b).collect();
        ensure!(same == [true, true, true, false, false, false], "{ours}\n{theirs}");
        pod.remove()
    })
}

pub fn pids(context: &Context) -> Result<Verdict> {
    on_node(context, |node| {
        let shared = json!({ "pid": "POD" });
        let pod = Pod::run(node, "pids", |config| {
            config["linux"]["security_context"]["namespace_options"] = shared.clone();
        })?;
        let of_pod = |config: &mut serde_json::Value| {
            config["linux"]["security_context"]["namespace_options"] = json!({ "pid": "POD" });
        };
        let script = "trap 'exit 9' TERM; while :; do sleep 0.2; done";
        let one = pod.start("one", &["sh", "-c", script, "target"], of_pod)?;
        let two = pod.start("two", &["sleep", "100000"], of_pod)?;
        let (ours, theirs) = (pod.sh(&two, NAMESPACES)?, pod.sh(&one, NAMESPACES)?);
        let same: Vec<_> = ours.lines().zip(theirs.lines()).map(|(a, b)| a == b).collect();
        ensure!(same == [true, true, true, true, false, false], "{ours}\n{theirs}");
        let first = pod.sh(&two, "tr '\\0' ' ' </proc/1/cmdline")?;
        ensure!(first == "/pause", "{first:?}");
        // An orphan is reaped by the first container.
        pod.sh(&two, "(sleep 0.2 &)")?;
        pod.sh(&two, "kill -TERM $(ps -o pid,args | awk '/[t]arget/ { print $1; exit }')")?;
        let ended = pod.ended(&one)?;
        ensure!(ended.exit_code == 9, "{ended:?}");
        pod.sh(&two, "until ! ps -o stat | grep -q Z; do sleep 0.1; done")?;
        pod.remove()
    })
}
