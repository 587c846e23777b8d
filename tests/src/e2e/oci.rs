//! The OCI runtime command line, as engines and people use it.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::leftovers::Traces;
use super::run::bundle;
use super::shell::{expect, script};
use super::{Context, Table, Verdict};

/// The table.
pub const CASES: Table = (
    "oci",
    &[
        ("a_container_lives_through_every_command", lifecycle),
        ("execs_have_streams_codes_and_stand_ins", execs),
        ("fifty_execs_at_once_lose_nothing", parallel),
        ("an_exec_outlives_its_client", outliving),
        ("a_stand_in_is_what_an_engine_takes_for_the_process", stand_in),
        ("hooks_run_in_order_with_the_state", hooks),
        ("a_killed_sandbox_process_is_a_stopped_container", killed),
        ("what_cannot_be_done_is_refused", refusals),
        ("events_tell_of_each_process_that_is_killed_for_want_of_memory", out_of_memory),
        ("limits_of_the_host_hold_there_and_can_be_changed", host_limits),
    ],
);

fn sleeping(context: &Context) -> Result<()> {
    bundle(context, &["sh", "-c", "echo started; sleep 1000"], |_| ())?;
    Ok(())
}

fn lifecycle(context: &Context) -> Result<Verdict> {
    sleeping(context)?;
    let traces = Traces::of(context.scratch());
    let output = script(
        context,
        "state() { katavm state c1 | grep -o '\"status\": \"[a-z]*\"'; }
         katavm create --pid-file pid c1 </dev/null >out 2>&1; state; cat out
         katavm list | awk 'NR == 2 { print $1, $3 }'
         katavm start c1; state
         katavm exec c1 uname -r
         katavm ps c1 | awk 'NR == 2 { print $1, $7, $8 }'
         katavm ps --format json c1 | grep -c '^\\[[0-9]*\\]$'
         katavm pause c1; state; katavm exec c1 true || echo no exec
         katavm resume c1; state
         katavm update --pids-limit 77 c1; katavm events --stats c1 | grep -o '\"limit\":77'
         katavm delete c1 || echo not deleted
         katavm kill c1 KILL; until [ \"$(state)\" = '\"status\": \"stopped\"' ]; do :; done; state
         katavm delete c1; katavm state c1 || echo gone; cat out",
    )?;
    let kernel = context.kernel_release()?;
    let lines = [
        "\"status\": \"created\"",
        "c1 created",
        "\"status\": \"running\"",
        &kernel,
        "0 sleep 1000",
        "1",
        "\"status\": \"paused\"",
        "no exec",
        "\"status\": \"running\"",
        "\"limit\":77",
        "not deleted",
        "\"status\": \"stopped\"",
        "gone",
        "started",
    ];
    expect(&output, &lines)?;
    traces.expect_nothing_new()?;
    Ok(Verdict::Passed)
}

fn execs(context: &Context) -> Result<Verdict> {
    sleeping(context)?;
    let traces = Traces::of(context.scratch());
    let output = script(
        context,
        "katavm run -d c1 </dev/null >out 2>&1
         seq 1 100000 | katavm exec c1 cat | sha256sum | cut -c 1-8; seq 1 100000 | sha256sum | cut -c 1-8
         katavm exec c1 sh -c 'echo out; echo err >&2; exit 5' 2>err || echo code $?; cat err
         katavm exec c1 sh -c 'kill -9 $$' || echo code $?
         katavm exec --user 12:34 --cwd /tmp --env A=b c1 sh -c 'id -u; id -g; pwd; echo $A'
         katavm exec c1 nosuch 2>&1 | grep -o 'exec: .*'
         katavm exec -d --pid-file pid c1 sh -c 'echo later; exec sleep 500' >later 2>&1
         kill -0 $(cat pid); katavm ps c1 | grep -c 'sleep 500'
         kill -TERM $(cat pid); while [ -e /proc/$(cat pid) ]; do :; done; katavm ps c1 | grep -c 'sleep 500' || echo ended
         for n in 1 2 3 4 5; do katavm exec c1 sh -c \"head -c 1000000 /dev/zero | tr '\\\\0' $n\" >x$n & done; wait
         for n in 1 2 3 4 5; do tr -d $n <x$n | wc -c; wc -c <x$n; done | sort -u
         katavm delete --force c1; cat later",
    )?;
    let sum = output.lines().next().context("no output")?.to_owned();
    let lines = [
        sum.as_str(),
        &sum,
        "out",
        "code 5",
        "err",
        "code 137",
        "12",
        "34",
        "/tmp",
        "b",
        "exec: \"nosuch\": executable file not found in $PATH",
        "1",
        "0",
        "ended",
        "0",
        "1000000",
        "later",
    ];
    expect(&output, &lines)?;
    traces.expect_nothing_new()?;
    Ok(Verdict::Passed)
}

fn parallel(context: &Context) -> Result<Verdict> {
    sleeping(context)?;
    let traces = Traces::of(context.scratch());
    let output = script(
        context,
        "katavm run -d c1 </dev/null >out 2>&1
         head -c 60M /dev/urandom >rootfs/data
         part() { echo if=$2/data bs=1M skip=$1 count=10 status=none; }
         for n in $(seq 50); do katavm exec c1 /bin/busybox dd $(part $n '') | cmp - <(dd $(part $n rootfs)) && echo whole $n & done >whole; wait
         sort -u whole | wc -l; katavm delete --force c1",
    )?;
    expect(&output, &["50"])?;
    traces.expect_nothing_new()?;
    Ok(Verdict::Passed)
}

fn outliving(context: &Context) -> Result<Verdict> {
    sleeping(context)?;
    let traces = Traces::of(context.scratch());
    let output = script(
        context,
        "katavm run -d c1 </dev/null >out 2>&1
         katavm exec c1 sh -c 'echo begun; until [ -e /go ]; do sleep 0.1; done; echo ended >/end; exec sleep 500' >said 2>&1 & client=$!
         until grep -q begun said; do sleep 0.1; done; kill -9 $client; wait $client || echo code $?
         touch rootfs/go; until [ -s rootfs/end ]; do sleep 0.1; done; cat rootfs/end; katavm ps c1 | grep -c 'sleep 500'
         katavm exec c1 echo another
         katavm delete --force c1",
    )?;
    expect(&output, &["code 137", "ended", "1", "another"])?;
    traces.expect_nothing_new()?;
    Ok(Verdict::Passed)
}

fn stand_in(context: &Context) -> Result<Verdict> {
    let folder = bundle(context, &["sleep", "1000"], |config| {
        config["linux"]["cgroupsPath"] = json!("/engine/c1");
        config["mounts"].as_array_mut().into_iter().for_each(|mounts| {
            mounts.push(json!({"destination": "/data", "type": "bind", "source": "data", "options": ["rbind", "ro"]}));
        });
    })?;
    fs::create_dir(folder.join("data"))?;
    fs::write(folder.join("data/file"), "shared\n")?;
    let output = script(
        context,
        "katavm create --pid-file pid c1 </dev/null >out 2>&1; pid=$(cat pid)
         cat /proc/$pid/cgroup; cat /proc/$pid/root/data/file
         nsenter -t $pid -m -p sh -c 'echo $$; ls /proc | grep -c ^1$; echo x >/data/file || echo read only; echo host >/etc/motd'
         katavm start c1; katavm exec c1 cat /etc/motd
         for ns in net ipc uts pid mnt; do [ $(readlink /proc/$pid/ns/$ns) != $(readlink /proc/self/ns/$ns) ]; done
         kill -KILL $pid; until katavm state c1 | grep -q stopped; do :; done; katavm delete c1; find /sys/fs/cgroup/engine -mindepth 1 -type d",
    )?;
    let lines: Vec<_> = output.lines().collect();
    ensure!(lines.first() == Some(&"0::/engine/c1"), "{lines:?}");
    ensure!(lines.get(1) == Some(&"shared") && lines.get(3..) == Some(&["1", "read only", "host"]), "{lines:?}");
    fs::remove_dir("/sys/fs/cgroup/engine")?;
    Ok(Verdict::Passed)
}

fn hooks(context: &Context) -> Result<Verdict> {
    let hook = |name: &str, script: &str| {
        let text =
            format!("echo {name} $(grep -o '\"status\":\"[a-z]*\"') >>{}/order; {script}", context.scratch().display());
        json!([{ "path": "/bin/sh", "args": ["sh", "-c", text], "env": ["PATH=/usr/bin:/bin"] }])
    };
    bundle(context, &["sleep", "1000"], |config| {
        config["hooks"] = json!({
            "prestart": hook("prestart", ""),
            "createRuntime": hook("createRuntime", ""),
            "createContainer": hook("createContainer", ""),
            "poststart": hook("poststart", ""),
            "poststop": hook("poststop", ""),
        });
    })?;
    let output =
        script(context, "katavm create c1 </dev/null >out 2>&1; katavm start c1; katavm delete --force c1; cat order")?;
    let lines = [
        "prestart \"status\":\"creating\"",
        "createRuntime \"status\":\"creating\"",
        "createContainer \"status\":\"creating\"",
        "poststart \"status\":\"running\"",
        "poststop \"status\":\"stopped\"",
    ];
    expect(&output, &lines)?;
    bundle_with_failing_hook(context)?;
    let traces = Traces::of(context.scratch());
    let told = script(context, "katavm create c2 </dev/null 2>&1 || echo code $?")?;
    ensure!(told.contains("error running createRuntime hook #0") && told.contains("no luck"), "{told}");
    ensure!(told.ends_with("code 1\n"), "{told}");
    traces.expect_nothing_new()?;
    Ok(Verdict::Passed)
}

fn bundle_with_failing_hook(context: &Context) -> Result<()> {
    let path = context.scratch().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path)?)?;
    config["hooks"] = json!({ "createRuntime": [{ "path": "/bin/sh", "args": ["sh", "-c", "echo no luck; exit 3"] }] });
    Ok(fs::write(path, config.to_string())?)
}

fn killed(context: &Context) -> Result<Verdict> {
    sleeping(context)?;
    let traces = Traces::of(context.scratch());
    let output = script(
        context,
        "katavm run -d --pid-file pid c1 </dev/null >out 2>&1
         pkill -KILL -x katavm-sandbox; while [ -e /proc/$(cat pid) ]; do :; done
         katavm state c1 | grep -o '\"status\": \"[a-z]*\"'; katavm start c1 2>&1 || true
         katavm create c1 2>&1 || true; katavm delete c1; katavm list -q
         katavm run -d c2 </dev/null >out 2>&1; pkill -KILL -x 'katavm-sandbox|katavm-watcher'; katavm delete --force c2",
    )?;
    let lines = [
        "\"status\": \"stopped\"",
        "katavm: cannot start a container that has stopped",
        "katavm: container with id c1 exists already: delete it first",
    ];
    expect(&output, &lines)?;
    traces.expect_nothing_new()?;
    Ok(Verdict::Passed)
}

fn refusals(context: &Context) -> Result<Verdict> {
    sleeping(context)?;
    let output = script(
        context,
        "katavm start nosuch 2>&1 || echo code $?
         katavm delete --force nosuch; katavm delete nosuch 2>&1 || echo code $?
         katavm create c1 </dev/null >out 2>&1
         katavm create c1 2>&1 || true; katavm exec c1 true 2>&1 || true; katavm kill c1 NOSIG 2>&1 | grep -o 'unknown signal.*'
         katavm start c1; katavm start c1 2>&1 || true; katavm resume c1 2>&1 || true
         katavm exec --preserve-fds 2 c1 true 2>&1 || true
         katavm delete --force c1",
    )?;
    let lines = [
        "katavm: container nosuch does not exist",
        "code 1",
        "katavm: container nosuch does not exist",
        "code 1",
        "katavm: container with id c1 is already in use",
        "katavm: cannot exec in a created container",
        "unknown signal \"NOSIG\"",
        "katavm: cannot start an already running container",
        "katavm: container not paused",
        "katavm: --preserve-fds: descriptors of the host mean nothing in a guest with a kernel of its own",
    ];
    expect(&output, &lines)?;
    Ok(Verdict::Passed)
}

/// CPUs and memory nodes of the host, by cpuset, and the weight of I/O: for every thread of the sandbox process.
fn host_limits(context: &Context) -> Result<Verdict> {
    bundle(context, &["sleep", "1000"], |config| {
        config["linux"]["cgroupsPath"] = json!("/engine/c1");
        let io = json!({"weight": 100, "leafWeight": 5});
        let unified = json!({"cpuset.cpus.partition": "member", "memory.high": "99999744"});
        let cgroup = json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup"});
        config["mounts"].as_array_mut().into_iter().for_each(|mounts| {
            mounts.push(json!({"destination": "/sys", "type": "sysfs", "source": "sysfs"}));
            mounts.push(cgroup.clone());
        });
        config["linux"]["resources"] = json!({"cpu": {"cpus": "1", "mems": "0"}, "blockIO": io, "unified": unified});
    })?;
    let traces = Traces::of(context.scratch());
    let output = script(
        context,
        "katavm run -d --pid-file pid c1 </dev/null >out 2>&1; group=/sys/fs/cgroup/engine/c1
         sandbox=$(pgrep -x katavm-sandbox)
         allowed() { grep -h \"^$1\" /proc/$sandbox/task/*/status | sort -u | tr -d '\\t'; }
         grep -h '^vcpu0$' /proc/$sandbox/task/*/comm; allowed Cpus_allowed_list; allowed Mems_allowed_list
         cat $group/cpuset.cpus $group/cpuset.mems $group/io.weight
         katavm exec c1 cat /sys/fs/cgroup/memory.high /sys/fs/cgroup/cpuset.cpus
         katavm update --cpuset-cpus 0 --blkio-weight 10 --pids-limit 55 c1; allowed Cpus_allowed_list; cat $group/io.weight
         echo '{\"cpu\": {\"cpus\": \"0-1\"}}' | katavm update -r - c1; allowed Cpus_allowed_list
         katavm update --cpuset-cpus 99 c1 2>&1 | grep -o 'cannot limit the control group /engine/c1' || true; allowed Cpus_allowed_list
         katavm events --stats c1 | grep -o '\"limit\":55'
         katavm delete --force c1; rmdir /sys/fs/cgroup/engine; cat out",
    )?;
    let lines = [
        "vcpu0",
        "Cpus_allowed_list:1",
        "Mems_allowed_list:0",
        "1",
        "0",
        "default 910",
        "99999744",
        // The guest knows nothing of it.
        "",
        "Cpus_allowed_list:0",
        "default 1",
        "Cpus_allowed_list:0-1",
        "cannot limit the control group /engine/c1",
        "Cpus_allowed_list:0-1",
        "\"limit\":55",
        "katavm: warning: config.json: linux.resources.blockIO.leafWeight is not honoured: the guest has cgroup v2 only, \
         which has no such setting",
    ];
    expect(&output, &lines)?;
    traces.expect_nothing_new()?;
    Ok(Verdict::Passed)
}

/// Of a further process, which the container survives, and of its first, with which it ends.
fn out_of_memory(context: &Context) -> Result<Verdict> {
    bundle(context, &["sh", "-c", "read go; exec busybox tail /dev/zero"], |config| {
        config["linux"]["resources"] = json!({"memory": {"limit": 32 << 20, "swap": 32 << 20}});
    })?;
    let traces = Traces::of(context.scratch());
    let output = script(
        context,
        "mkfifo go; exec 4<>go
         katavm run --bundle . c1 <go >out 2>&1 & run=$!
         until katavm state c1 2>/dev/null | grep -q '\"running\"'; do kill -0 $run || { cat out >&2; exit 1; }; sleep 0.2; done
         exec 3< <(katavm events --interval 300ms c1; echo events $?)
         read -r line <&3; echo \"${line%%:\\{*}\"
         katavm exec c1 busybox tail /dev/zero || echo exec $?
         while read -r line <&3; do case $line in *oom\\\"*) echo \"$line\"; break; esac; done
         echo go >&4; wait $run || echo run $?
         grep -v '^{\"type\":\"stats\"' <&3",
    )?;
    let lines = [
        "{\"type\":\"stats\",\"id\":\"c1\",\"data\"",
        "exec 137",
        "{\"type\":\"oom\",\"id\":\"c1\"}",
        "run 137",
        "{\"type\":\"oom\",\"id\":\"c1\"}",
        "events 0",
    ];
    expect(&output, &lines)?;
    traces.expect_nothing_new()?;
    Ok(Verdict::Passed)
}
