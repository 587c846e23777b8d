//! What CRI-O does with its runtime: it is driven here by Debian's conmon, with the configurations that CRI-O writes.

use std::fs;
use std::os::unix::fs::symlink;
use std::process::Command;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::leftovers::Traces;
use super::run::bundle;
use super::shell::{expect, script};
use super::{Context, Table, Verdict};

/// The table.
pub const CASES: Table = ("crio", &[("a_pod_is_one_sandbox_by_its_annotations", pod)]);

/// Where the pod's namespaces are pinned, each kind in a folder of its own.
const PINNED: [(&str, &str); 3] = [("network", "/run/netns/pod"), ("ipc", "/run/ipcns/pod"), ("uts", "/run/utsns/pod")];

/// The pod's namespaces are there before its first container, with the network already plugged; conmon creates
/// each container, and CRI-O starts it. At the end the containers are stopped first, then the network is taken down,
/// and the sandbox goes last.
fn pod(context: &Context) -> Result<Verdict> {
    let answer = "while :; do echo from a | nc -l -p 8080; done";
    let ask = "trap 'exit 3' TERM; until nc 127.0.0.1 8080; do sleep 1; done; hostname; ip -o addr show eth0 | grep -c 10.85.0.2; \
               echo asked; while :; do sleep 1; done";
    for (id, kind, args) in [
        ("infra", "sandbox", &["sleep", "100000"][..]),
        ("a", "container", &["sh", "-c", answer]),
        ("b", "container", &["sh", "-c", ask]),
    ] {
        container(context, id, kind, args)?;
    }
    let traces = Traces::of(context.scratch());
    let output = script(
        context,
        "pin() { mkdir -p /run/$1ns; touch /run/$1ns/pod; unshare --$1=/run/$1ns/pod ${2:-true} ${3:-}; }
         unpin() { for pinned in /run/ipcns/pod /run/utsns/pod; do umount $pinned; rm $pinned; rmdir ${pinned%/pod}; done; ip netns del pod; umount /run/netns; }
         pin ipc; pin uts hostname podname; ip netns add pod; ip -n pod link set lo up
         ip link add pod0 type veth peer name eth0 netns pod; ip -n pod addr add 10.85.0.2/24 dev eth0; ip -n pod link set eth0 up
         conmon() { command conmon --syslog -c $1 -u $1 -n $1 -r $(command -v katavm) -b $PWD/$1 -p $PWD/$1.pid -P $PWD/$1.conmon \\
             --exit-dir $PWD/exits --persist-dir $PWD/$1 --socket-dir-path $PWD/sockets -l k8s-file:$PWD/$1.log \"${@:2}\"; }
         create() { conmon $1; until [ -s $1.pid ]; do sleep 0.1; done; katavm state $1 | jq -r .status; katavm start $1; }
         stop() { katavm kill $1 TERM; until [ -e exits/$1 ]; do sleep 0.1; done; echo $1 $(cat exits/$1); katavm state $1 | jq -r .status; }
         mkdir exits sockets; create infra; create a; create b
         timeout 90 sh -c 'until grep -q asked b.log; do sleep 0.1; done' || { tail -n 5 ./*.log >&2; exit 1; }; cut -d' ' -f4- b.log
         pgrep -cx katavm-sandbox; katavm list -q
         for id in infra a b; do cut -d: -f3 /proc/$(cat $id.pid)/cgroup; done
         echo '{\"args\":[\"sh\",\"-c\",\"uname -r; hostname; exit 5\"],\"cwd\":\"/\",\"env\":[\"PATH=/bin\"],\"user\":{\"uid\":0,\"gid\":0}}' >process
         katavm exec --process process --pid-file exec.pid b || echo code $?
         stop b; katavm kill a KILL; until [ -e exits/a ]; do sleep 0.1; done; cat exits/a; echo
         katavm delete a; katavm delete b; ip link del pod0
         katavm kill infra KILL; until [ -e exits/infra ]; do sleep 0.1; done; katavm delete --force infra; unpin
         katavm list -q; pgrep -cx katavm-sandbox || true; rmdir /sys/fs/cgroup/kubepods/pod1 /sys/fs/cgroup/kubepods",
    )?;
    let kernel = context.kernel_release()?;
    let lines = [
        "created",
        "created",
        "created",
        "from a",
        "podname",
        "1",
        "asked",
        "1",
        "a",
        "b",
        "infra",
        "/kubepods/pod1/crio-infra",
        "/kubepods/pod1/crio-a",
        "/kubepods/pod1/crio-b",
        &kernel,
        "podname",
        "code 5",
        "b 3",
        "stopped",
        "137",
        "0",
    ];
    expect(&output, &lines)?;
    traces.expect_nothing_new()?;
    Ok(Verdict::Passed)
}

/// A bundle of the case's folder, named as its container.
fn container(context: &Context, id: &str, kind: &str, args: &[&str]) -> Result<()> {
    bundle(context, args, |config| {
        config["annotations"] = json!({
            "io.kubernetes.cri-o.ContainerType": kind, "io.kubernetes.cri-o.SandboxID": "infra",
            "io.kubernetes.cri-o.ContainerID": id, "io.container.manager": "cri-o",
        });
        config["hostname"] = json!("podname");
        config["linux"]["cgroupsPath"] = json!(format!("/kubepods/pod1/crio-{id}"));
        let pinned = PINNED.iter().map(|(kind, path)| json!({ "type": kind, "path": path }));
        let own = ["pid", "mount", "cgroup"].iter().map(|kind| json!({ "type": kind }));
        config["linux"]["namespaces"] = Value::Array(pinned.chain(own).collect());
    })?;
    let scratch = context.scratch();
    let folder = scratch.join(id);
    fs::create_dir(&folder)?;
    fs::rename(scratch.join("config.json"), folder.join("config.json"))?;
    let copied = Command::new("cp").arg("-a").arg(scratch.join("rootfs")).arg(&folder).status()?;
    ensure!(copied.success(), "cp: {copied}");
    for applet in ["nc", "hostname", "ip", "grep"] {
        symlink("busybox", folder.join("rootfs/bin").join(applet))?;
    }
    Ok(())
}
