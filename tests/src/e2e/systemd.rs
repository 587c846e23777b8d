//! What takes systemd as PID 1: control groups that it makes. `./just test-e2e` boots a lab of its own for these cases.

use std::fs;
use std::path::Path;

use anyhow::Result;
use serde_json::json;

use super::leftovers::Traces;
use super::podman::podman;
use super::run::bundle;
use super::shell::{expect, script};
use super::{Context, Table, Verdict};

/// The table.
pub const CASES: Table = (
    "systemd",
    &[("a_scope_holds_the_sandbox_and_goes_with_it", scope), ("podman_runs_containers_in_scopes", podman_scopes)],
);

/// Why these cases cannot be tried here.
fn missing() -> Option<Verdict> {
    let init = fs::read_to_string("/proc/1/comm").unwrap_or_default();
    let reason = format!("PID 1 is {}, not systemd", init.trim());
    (init.trim() != "systemd").then_some(Verdict::Skipped(reason))
}

/// Where a scope is, what is set in it, and whether it is there.
const HELPERS: &str = "
    in_scope() { for pid in $1 $(pgrep -x katavm-sandbox); do cut -d: -f3 /proc/$pid/cgroup; done | uniq; }
    limits() { (cd /sys/fs/cgroup$1; cat memory.max cpu.weight io.max cpuset.cpus cpuset.mems); }
    gone() { until ! systemctl is-active -q $1; do :; done; systemctl show -P LoadState $1; }\n";

fn scope(context: &Context) -> Result<Verdict> {
    if let Some(missing) = missing() {
        return Ok(missing);
    }
    let loop_device = json!([{ "major": 7, "minor": 0, "rate": 1_048_576 }]);
    bundle(context, &["sh", "-c", "trap 'exit 4' TERM; echo up; while :; do sleep 1; done"], |config| {
        config["linux"]["cgroupsPath"] = json!("machine.slice:katavm:c1");
        config["linux"]["resources"] = json!({
            "memory": { "limit": 128 << 20 }, "cpu": { "shares": 512, "cpus": "0", "mems": "0" },
            "blockIO": { "throttleWriteBpsDevice": loop_device },
        });
    })?;
    let traces = Traces::of(context.scratch());
    let output = script(
        context,
        &format!(
            "{HELPERS}
             katavm --systemd-cgroup create --pid-file pid c1 </dev/null >out 2>&1; katavm start c1
             in_scope $(cat pid); limits /machine.slice/katavm-c1.scope; katavm exec c1 uname -r
             katavm update --cpuset-cpus 0-1 c1; systemctl show -P AllowedCPUs katavm-c1.scope
             katavm delete --force c1; gone katavm-c1.scope
             katavm --systemd-cgroup run -d --pid-file pid c1 </dev/null >out 2>&1
             pkill -KILL -x 'katavm-sandbox|katavm-watcher'; while [ -e /proc/$(cat pid) ]; do :; done
             katavm delete c1; gone katavm-c1.scope
             katavm --systemd-cgroup run -d --pid-file pid c1 </dev/null >out 2>&1; until grep -q up out; do :; done
             systemctl stop katavm-c1.scope; while [ -e /proc/$(cat pid) ]; do :; done
             katavm delete c1; gone katavm-c1.scope
             jq 'del(.linux.cgroupsPath)' config.json >new; mv new config.json
             katavm --systemd-cgroup run --id c2 . >out & until grep -q up out 2>/dev/null; do :; done
             in_scope $(pgrep -x katavm-standin); katavm kill c2 TERM; wait $! || echo code $?; gone katavm-c2.scope; systemctl stop machine.slice"
        ),
    )?;
    let kernel = context.kernel_release()?;
    let lines = [
        "/machine.slice/katavm-c1.scope",
        "355467264",
        "59",
        "7:0 rbps=max wbps=1048576 riops=max wiops=max",
        "0",
        "0",
        &kernel,
        "0-1",
        "not-found",
        "not-found",
        "not-found",
        "/system.slice/katavm-c2.scope",
        "code 4",
        "not-found",
    ];
    expect(&output, &lines)?;
    traces.expect_nothing_new()?;
    Ok(Verdict::Passed)
}

fn podman_scopes(context: &Context) -> Result<Verdict> {
    if let Some(missing) = missing() {
        return Ok(missing);
    }
    let traces = Traces::of(Path::new("/nonexistent"));
    let output = podman(
        context,
        &format!(
            "{HELPERS}
             podman info --format '{{{{.Host.CgroupManager}}}}'
             podman run -d --name w --network none --memory 100m --cpus 1 --cpu-shares 512 --cpuset-cpus 1 bb \\
                 sh -c 'trap \"exit 3\" TERM; while :; do sleep 1; done' >id
             group=/machine.slice/libpod-$(cat id).scope; in_scope $(podman inspect w --format '{{{{.State.Pid}}}}') >group
             [ \"$(cat group)\" = $group ] && limits $group
             podman exec w sh -c 'uname -r; cat /sys/fs/cgroup/memory.max'
             podman stats --no-stream --format '{{{{.Name}}}}' w
             podman stop -t 60 w; podman wait w; gone libpod-$(cat id).scope; podman start w
             pkill -KILL -x katavm-sandbox; podman wait w; podman rm w; gone libpod-$(cat id).scope; katavm list -q"
        ),
    )?;
    let kernel = context.kernel_release()?;
    // No line of its own for io.max, an empty one for the memory nodes: nothing is set.
    let lines = [
        "systemd",
        "325058560",
        "59",
        "1",
        "",
        &kernel,
        "104857600",
        "w",
        "w",
        "3",
        "not-found",
        "w",
        "137",
        "w",
        "not-found",
    ];
    expect(&output, &lines)?;
    traces.expect_nothing_of_katavm()?;
    Ok(Verdict::Passed)
}
