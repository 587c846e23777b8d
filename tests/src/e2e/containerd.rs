//! containerd with our shim, by its own client: each case with each version that the lab has.

use std::path::Path;

use anyhow::Result;
use serde_json::json;

use super::agent::whole_rootfs;
use super::cri::image;
use super::leftovers::Traces;
use super::shell::{expect, script};
use super::{Context, Row, Table, Verdict, run};

/// With Debian 12's what may differ with the version.
pub const BEFORE: Table = (
    "containerd-1.6",
    &[
        ("runs_and_looks_after_a_container", container::<0>),
        ("tells_each_event_once_and_in_order", events::<0>),
        ("containerd_may_be_killed_and_start_again", killed_containerd::<0>),
    ],
);
/// With Debian 13's everything.
pub const OWN: Table = ("containerd-1.7", &rows::<1>());
/// With Debian 14's what may differ with the version.
pub const AFTER: Table = (
    "containerd-2",
    &[
        ("takes_the_root_file_system_of_each_snapshotter", snapshotters::<2>),
        ("tells_each_event_once_and_in_order", events::<2>),
        ("a_pod_is_one_sandbox", pod::<2>),
        ("agrees_on_the_task_api_and_learns_what_the_runtime_can_do", agreement::<2>),
    ],
);
/// Everything with the others, too, and an image of some hundred MiB.
pub const LONG: [Table; 3] = [
    ("containerd-1.6-all", &rows::<0>()),
    ("containerd-2-all", &rows::<2>()),
    ("containerd-debian", &[("runs_by_1.6", debian::<0>), ("runs_by_1.7", debian::<1>), ("runs_by_2", debian::<2>)]),
];

/// A version of containerd in the lab.
struct Version {
    /// How its number begins.
    number: &'static str,
    /// The version of the Task API that it agrees on with the shim, as it writes that down; up to 1.7 there is no choice,
    /// and it writes down an address only.
    task_api: &'static str,
    /// What it has besides overlayfs, which all cases use.
    snapshotters: &'static [&'static str],
    /// Whether its client shows what `-info` says.
    shows_info: bool,
}

const VERSIONS: [Version; 3] = [
    Version { number: "1.6", task_api: "unix://", snapshotters: &["native"], shows_info: false },
    Version { number: "1.7", task_api: "unix://", snapshotters: &["native", "blockfile"], shows_info: false },
    Version { number: "2", task_api: "3", snapshotters: &["native", "blockfile", "erofs"], shows_info: true },
];

const fn rows<const V: usize>() -> [Row; 8] {
    [
        ("runs_and_looks_after_a_container", container::<V>),
        ("takes_the_root_file_system_of_each_snapshotter", snapshotters::<V>),
        ("tells_each_event_once_and_in_order", events::<V>),
        ("tells_each_event_once_under_kills", events_under_kills::<V>),
        ("a_pod_is_one_sandbox", pod::<V>),
        ("agrees_on_the_task_api_and_learns_what_the_runtime_can_do", agreement::<V>),
        ("a_killed_shim_is_noticed_and_nothing_stays", killed_shim::<V>),
        ("containerd_may_be_killed_and_start_again", killed_containerd::<V>),
    ]
}

/// containerd of version `V` for one case, with an image of the case's root file system. In a script, `run` runs containers
/// of it by our shim, `status` is that of a task, and `server` starts containerd once more.
pub(super) fn containerd<const V: usize>(context: &Context, text: &str) -> Result<String> {
    let archive = context.scratch().join("bb.tar");
    image::archive("localhost/bb:latest", &whole_rootfs(context)?, &json!({ "Env": ["PATH=/bin"] }), &archive)?;
    let number = VERSIONS[V].number;
    let prelude = format!(
        r#"for folder in /opt/containerd-{number}*; do PATH=$folder:$PATH; done
        containerd --version | grep -q ' v\?{number}\.'
        truncate -s 64M empty; mkfs.ext4 -q -m 0 empty
        cat >containerd.toml <<END
version = 2
root = "/var/lib/containerd/{number}"
[plugins."io.containerd.snapshotter.v1.blockfile"]
  root_path = "/var/lib/containerd/{number}/blockfile"
  scratch_file = "$PWD/empty"
  fs_type = "ext4"
  mount_options = []
END
        server() {{ containerd --config containerd.toml >>containerd.log 2>&1 & server=$!; until ctr version >p 2>&1; do kill -0 $server; sleep 0.2; done; }}
        status() {{ ctr task ls | awk -v id=$1 '$1 == id {{ print $3 }}'; }}
        stop() {{ ctr task kill -s KILL $1; until [ $(status $1) = STOPPED ]; do sleep 0.1; done; ctr task rm $1 >p 2>&1 || true; }}
        run() {{ ctr run --runtime io.containerd.katavm.v2 "$@"; }}
        left() {{ pgrep -xa 'katavm-(sandbox|standin|watcher)'; find /run/containerd/s /run/katavm-containerd/default -mindepth 1 ! -name '.*'; }}
        # containerd forgets a task before it tells its end, so the last events of task and container come in any order.
        told() {{ grep -q /containers/delete events && grep -q /tasks/delete events; }}
        gone() {{ for n in $(seq 300); do [ -n "$(left)" ] || return 0; sleep 0.1; done; left; }}
        end() {{ for id in $(ctr task ls -q); do ctr task rm -f $id; done >p 2>&1; ctr containers rm $(ctr containers ls -q) >p 2>&1 || true; kill $server; wait $server || true; grep -v 'loading plugin\|skip loading' containerd.log | tail -n 60 >&2; }}
        trap end EXIT
        server; ctr image import bb.tar >p 2>&1; image=localhost/bb:latest
        "#
    );
    script(context, &format!("{prelude}{text}"))
}

fn container<const V: usize>(context: &Context) -> Result<Verdict> {
    let traces = Traces::of(Path::new("/nonexistent"));
    let output = containerd::<V>(
        context,
        "run --rm $image c1 uname -r
         run --rm $image c1 sh -c 'echo written >/etc/new; cat /etc/new; echo err >&2; exit 7' 2>err || echo code $?; cat err
         seq 200000 | run --rm $image c1 sha256sum | cut -c 1-8; seq 200000 | sha256sum | cut -c 1-8
         run --rm $image c1 nosuch 2>&1 | grep -o 'exec: \"nosuch\".*PATH'
         run -d $image c2 sh -c 'trap \"exit 3\" TERM; while :; do sleep 1; done' </dev/null; status c2
         echo typed | ctr task exec --exec-id e1 c2 cat
         ctr task exec --exec-id e2 c2 sh -c 'exit 4' </dev/null || echo code $?
         python3 -c 'import pty; pty.spawn([\"ctr\", \"task\", \"exec\", \"-t\", \"--exec-id\", \"e3\", \"c2\", \"sh\", \"-c\", \"test -t 0 && echo on a terminal\"])' </dev/null | grep -o 'on a terminal' # ctr may tell that it came too late to set the size
         ctr task exec -d --exec-id e4 c2 sleep 1000 </dev/null
         ctr task ps c2 | awk 'NR > 1 && $1 > 1' | wc -l | sed 's/^[1-9]/some/'; ctr task ps c2 | grep -o 'e4'
         ctr task pause c2; status c2; ctr task resume c2; status c2
         ctr task checkpoint c2 2>&1 | grep -o 'checkpoints of containers are not implemented'; status c2
         ctr task metrics c2 | grep -c memory.usage_limit
         katavm --root /run/katavm-containerd/default exec c2 hostname
         ctr task kill c2; until [ $(status c2) = STOPPED ]; do sleep 0.1; done; ctr task rm c2 2>&1 | grep -o 'exit code 3'
         run -d $image c3 sh -c 'until [ -e /go ]; do sleep 0.1; done; echo for whom it attaches; exit 9' </dev/null
         ctr task attach c3 </dev/null >attached & client=$!
         ctr task exec --exec-id e1 c3 touch /go </dev/null; wait $client || echo code $?; cat attached
         ctr task rm c3 >p 2>&1 || true; ctr container rm c2 c3; gone",
    )?;
    let kernel = context.kernel_release()?;
    let lines: Vec<_> = output.lines().collect();
    let sum = lines.get(4).copied().unwrap_or_default();
    let expected = [
        kernel.as_str(),
        "written",
        "code 7",
        "err",
        sum,
        sum,
        "exec: \"nosuch\": executable file not found in $PATH",
        "RUNNING",
        "typed",
        "code 4",
        "on a terminal",
        "some",
        "e4",
        "PAUSED",
        "RUNNING",
        "checkpoints of containers are not implemented",
        "RUNNING",
        "1",
        "katavm",
        "exit code 3",
        "code 9",
        "for whom it attaches",
    ];
    expect(&output, &expected)?;
    traces.expect_nothing_of_katavm()?;
    Ok(Verdict::Passed)
}

/// An image of the Debian that `katavm run` is tried with.
fn debian<const V: usize>(context: &Context) -> Result<Verdict> {
    let Some(bundle) = run::debian::bundle() else { return Ok(run::debian::no_bundle()) };
    let config = json!({ "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"], "Cmd": ["bash"] });
    image::archive("localhost/debian:12", &bundle.join("rootfs"), &config, &context.scratch().join("debian.tar"))?;
    let output = containerd::<V>(
        context,
        r#"debian=localhost/debian:12; ctr image import debian.tar >p 2>&1; rm debian.tar
         run --rm $debian c1 sh -euc '
             . /etc/os-release; echo $ID $VERSION_ID
             echo "int main(void) { return 42; }" >/tmp/a.c; gcc -o /tmp/a /tmp/a.c; /tmp/a || echo code $?
             python3 -c "import sqlite3, ssl; print(sum(range(10**6)))"'
         run -d $debian c2 redis-server </dev/null
         n=0; until ctr task exec --exec-id e$n c2 redis-cli ping </dev/null 2>p; do n=$((n + 1)); sleep 1; done
         ctr task exec --exec-id set c2 redis-cli set key value </dev/null; ctr task exec --exec-id get c2 redis-cli get key </dev/null
         ctr task kill c2; until [ $(status c2) = STOPPED ]; do sleep 0.1; done; ctr task rm c2; ctr container rm c2; ctr image rm $debian >p; gone"#,
    )?;
    expect(&output, &["debian 12", "code 42", "499999500000", "PONG", "OK", "value"])?;
    Ok(Verdict::Passed)
}

fn snapshotters<const V: usize>(context: &Context) -> Result<Verdict> {
    let names = VERSIONS[V].snapshotters;
    let text = format!(
        "for snapshotter in {}; do
             run --rm --snapshotter $snapshotter $image c1 sh -c \"echo $snapshotter >/etc/new; cat /etc/new; ls /bin | wc -l\"
             run -d --snapshotter $snapshotter $image c1 sleep 1000 </dev/null
             ctr task exec --exec-id e1 c1 awk '$2 == \"/\" {{ print $1, $3 }}' /proc/mounts </dev/null
             losetup -a | grep -c /blockfile/ || true; ctr task rm -f c1 >p 2>&1; ctr container rm c1
         done; ls rootfs/bin | wc -l; gone",
        names.join(" ")
    );
    let output = containerd::<V>(context, &text)?;
    let count = output.lines().last().unwrap_or_default();
    // What is in images of file systems, the guest has as disks.
    let root = |name: &str| match name {
        "blockfile" => "/dev/vda ext4",
        "erofs" => "overlay overlay",
        _ => "none virtiofs",
    };
    let mut expected: Vec<_> = names.iter().flat_map(|name| [name, count, root(name), "0"]).collect();
    expected.push(count);
    expect(&output, &expected)?;
    Ok(Verdict::Passed)
}

/// The events of the same life of a container by runc's shim and by ours, as `ctr events` records them.
fn events<const V: usize>(context: &Context) -> Result<Verdict> {
    let output = containerd::<V>(
        context,
        "life() {
             rm -f events; ctr events >events 2>&1 & listener=$!
             until [ -s events ]; do ctr namespace label default probe=$RANDOM; sleep 0.2; done
             ctr run --runtime $1 -d --memory-limit 67108864 $image c1 sleep 1000 </dev/null
             ctr task exec --exec-id e1 c1 true </dev/null
             ctr task exec --exec-id e2 c1 sh -c 'head -c 100000000 /dev/zero | tail -c 90000000 >/dev/null' </dev/null >p 2>&1 || echo code $?
             ctr task pause c1; ctr task resume c1
             ctr task kill -s KILL c1; until [ $(status c1) = STOPPED ]; do sleep 0.1; done
             ctr task rm c1 >p 2>&1; ctr container rm c1; until told; do sleep 0.1; done; kill $listener
             awk '$6 ~ /tasks/ { print $6 }' events
         }
         life io.containerd.runc.v2 >runc; life io.containerd.katavm.v2; gone
         diff <(grep -v -x -e 'code.*' -e /tasks/oom runc) <(awk '$6 ~ /tasks/ && $6 !~ /oom/ { print $6 }' events) && echo as runc",
    )?;
    let expected = [
        "code 137",
        "/tasks/create",
        "/tasks/start",
        "/tasks/exec-added",
        "/tasks/exec-started",
        "/tasks/exit",
        "/tasks/exec-added",
        "/tasks/exec-started",
        "/tasks/oom",
        "/tasks/exit",
        "/tasks/paused",
        "/tasks/resumed",
        "/tasks/exit",
        "/tasks/delete",
        "as runc",
    ];
    expect(&output, &expected)?;
    Ok(Verdict::Passed)
}

/// The server is killed, with runc's beside it; and the guest's kernel.
fn events_under_kills<const V: usize>(context: &Context) -> Result<Verdict> {
    let output = containerd::<V>(
        context,
        "life() {
             rm -f events; ctr events >events 2>&1 & listener=$!
             until [ -s events ]; do ctr namespace label default probe=$RANDOM; sleep 0.2; done
             ctr run --runtime io.containerd.$1.v2 -d --privileged $image c1 sh -c \"$2\" </dev/null; $3
             until [ \"$(status c1)\" != RUNNING ]; do sleep 0.1; done
             ctr task rm c1 >p 2>&1 || true; ctr container rm c1; until told; do sleep 0.1; done; kill $listener
             awk '$6 ~ /tasks/ { print $6 }' events
         }
         life runc 'sleep 1000' 'pkill -KILL -x containerd-shim' >runc
         life katavm 'sleep 1000' 'pkill -KILL -x katavm-sandbox'; cmp runc <(awk '$6 ~ /tasks/ { print $6 }' events) && echo as runc
         life katavm 'sleep 2; echo c >/proc/sysrq-trigger' true; gone",
    )?;
    let told = ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"];
    expect(&output, &[&told[..], &["as runc"], &told].concat())?;
    Ok(Verdict::Passed)
}

fn agreement<const V: usize>(context: &Context) -> Result<Verdict> {
    let Version { task_api, shows_info, .. } = VERSIONS[V];
    let inspect = "ctr plugins inspect-runtime --runtime io.containerd.katavm.v2 | jq -r .Name,.Features.ociVersionMax";
    let text = format!(
        "for id in c1 c2; do
             run -d --annotation io.kubernetes.cri.sandbox-id=c1 $image $id sleep 1000 </dev/null
             bundle=/run/containerd/io.containerd.runtime.v2.task/default/$id
             if [ -e $bundle/bootstrap.json ]; then jq -r .version $bundle/bootstrap.json; else cut -c1-7 $bundle/address; fi
         done
         {}
         for id in c2 c1; do ctr task rm -f $id >p 2>&1; ctr container rm $id; done; gone",
        if shows_info { inspect } else { "" }
    );
    let output = containerd::<V>(context, &text)?;
    let info: &[_] = if shows_info { &["io.containerd.katavm.v2", "1.2.0"] } else { &[] };
    expect(&output, &[&[task_api, task_api], info].concat())?;
    Ok(Verdict::Passed)
}

fn pod<const V: usize>(context: &Context) -> Result<Verdict> {
    let output = containerd::<V>(
        context,
        "pod='--annotation io.kubernetes.cri.sandbox-id=c1'
         run -d $pod $image c1 sleep 1000 </dev/null
         run -d $pod $image c2 sh -c 'echo hello >/tmp/index.html; exec httpd -f -p 80 -h /tmp' </dev/null
         pgrep -xc katavm-sandbox
         run --rm $pod $image c3 sh -c 'until wget -qO- http://127.0.0.1/; do sleep 1; done; ls -d /tmp/index.html' </dev/null 2>err || echo code $?
         ctr task ls -q | sort | tr '\\n' ' '; echo
         for id in c2 c1; do ctr task rm -f $id >p 2>&1; ctr container rm $id; done; gone",
    )?;
    expect(&output, &["1", "hello", "code 1", "c1 c2 "])?;
    Ok(Verdict::Passed)
}

fn killed_shim<const V: usize>(context: &Context) -> Result<Verdict> {
    let traces = Traces::of(Path::new("/nonexistent"));
    let output = containerd::<V>(
        context,
        "ctr events >events 2>&1 & listener=$!; trap 'kill $listener; end' EXIT
         until [ -s events ]; do ctr namespace label default probe=$RANDOM; sleep 0.2; done
         for id in c1 c2; do run -d $image $id sleep 1000 </dev/null; done
         pkill -KILL -o -x katavm-sandbox; until [ -z \"$(status c1)\" ]; do sleep 0.1; done
         status c2; ctr task exec --exec-id e1 c2 echo in the other </dev/null; ctr container rm c1
         pkill -KILL -x 'katavm-sandbox|katavm-watcher'; until [ -z \"$(status c2)\" ]; do sleep 0.1; done
         ctr container rm c2; ctr task ls -q; gone
         ends() { grep -c '/tasks/exit.*\"exit_status\":137' events; }; until [ $(ends) -ge 2 ]; do sleep 0.1; done; ends",
    )?;
    expect(&output, &["RUNNING", "in the other", "2"])?;
    traces.expect_nothing_of_katavm()?;
    Ok(Verdict::Passed)
}

fn killed_containerd<const V: usize>(context: &Context) -> Result<Verdict> {
    let output = containerd::<V>(
        context,
        "run -d --log-uri file://$PWD/log $image c1 sh -c 'n=0; until [ -e /end ]; do n=$((n + 1)); echo line $n; sleep 0.1; done; echo last; exit 5' </dev/null
         until grep -q 'line 3' log; do sleep 0.1; done
         kill -KILL $server; wait $server || true; server; status c1
         ctr task exec --exec-id e1 c1 touch /end </dev/null
         until [ $(status c1) = STOPPED ]; do sleep 0.1; done; tail -n 1 log
         grep -c line log >count; seq 1 $(cat count) | sed 's/^/line /' | cmp - <(grep line log) && echo none is missing
         ctr task rm c1 2>&1 | grep -o 'exit code 5'; ctr container rm c1; gone",
    )?;
    expect(&output, &["RUNNING", "last", "none is missing", "exit code 5"])?;
    Ok(Verdict::Passed)
}
