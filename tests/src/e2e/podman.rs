//! Podman with katavm as its runtime.

use std::fs;
use std::path::Path;

use anyhow::Result;

use super::leftovers::Traces;
use super::shell::{expect, script};
use super::{Context, Table, Verdict};

/// The table.
pub const CASES: Table = (
    "podman",
    &[
        ("runs_a_container", podman_run),
        ("execs_copies_pauses_and_stops", podman_container),
        ("networks_and_publishes_ports", networks),
        ("options_have_their_effects", options),
        ("looks_after_a_container", looks_after),
        ("a_pod_is_one_sandbox", pod),
    ],
);

/// Podman with an image of the case's root file system; `podman` in a script runs containers by katavm.
pub(super) fn podman(context: &Context, text: &str) -> Result<String> {
    super::agent::whole_rootfs(context)?;
    let prelude = "podman() { command podman --runtime $(command -v katavm) \"$@\"; }
        echo root:x:0:0:root:/root:/bin/sh >rootfs/etc/passwd
        tar -C rootfs -c . | podman import - bb >import 2>&1\n";
    script(context, &format!("{prelude}{text}"))
}

fn podman_run(context: &Context) -> Result<Verdict> {
    fs::write(context.scratch().join("file"), "volume\n")?;
    let output = podman(
        context,
        "podman run --rm --network none bb uname -r
         podman run --rm --network none bb sh -c 'exit 7' || echo code $?
         echo typed | podman run --rm -i --network none bb cat
         podman run --rm --network none -v $PWD:/mnt:ro --user 1000:1000 --memory 100m --pids-limit 50 --cpus 1 \\
             --cap-drop=all bb sh -c 'id -u; cat /mnt/file; echo x 2>/dev/null >/mnt/file || echo read only'
         podman ps -aq",
    )?;
    let kernel = context.kernel_release()?;
    expect(&output, &[&kernel, "code 7", "typed", "1000", "volume", "read only"])?;
    Ok(Verdict::Passed)
}

fn podman_container(context: &Context) -> Result<Verdict> {
    let traces = Traces::of(Path::new("/nonexistent"));
    let output = podman(
        context,
        "podman run -d --name w --network none bb sh -c 'trap \"exit 3\" TERM; echo a line; while :; do sleep 1; done' >id
         until podman logs w | grep -q line; do :; done; podman logs w
         podman exec w sh -c 'echo in exec; exit 4' || echo code $?
         echo data >f; podman cp f w:/etc/f; podman exec w cat /etc/f; podman exec w sh -c 'echo back >/etc/g'; podman cp w:/etc/g g; cat g
         podman inspect w --format '{{.State.Status}}'
         podman pause w >p; podman inspect w --format '{{.State.Status}}'; podman unpause w >p
         podman stop -t 20 w >p; podman wait w; podman rm w >p; podman ps -aq",
    )?;
    expect(&output, &["a line", "in exec", "code 4", "data", "back", "running", "paused", "3"])?;
    traces.expect_nothing_of_katavm()?;
    Ok(Verdict::Passed)
}

/// On the engine's default bridge and on one of its own with names, reached from another machine by a published port.
fn networks(context: &Context) -> Result<Verdict> {
    let traces = Traces::of(Path::new("/nonexistent"));
    let output = podman(
        context,
        "trap 'ip netns del outside; podman rm -fa -t 0 >p; podman network rm n1 >p; podman rmi -fa >p' EXIT
         [ -e /etc/resolv.conf ] || echo 'nameserver 192.0.2.1' >/etc/resolv.conf # the names' server wants one
         ip netns add outside; ip link add far netns outside type veth peer name near
         ip addr add 10.99.0.1/24 dev near; ip link set near up
         ip -n outside addr add 10.99.0.2/24 dev far; ip -n outside link set far up; ip -n outside route add default via 10.99.0.1
         serve='echo hello from the guest >/tmp/index.html; exec httpd -f -p 80 -h /tmp'
         podman run -d --name web -p 8080:80 bb sh -c \"$serve\" >id
         until curl -fsS -o page -m 20 http://127.0.0.1:8080/ 2>err; do sleep 1; done; cat page
         ip netns exec outside curl -sS -m 60 http://10.99.0.1:8080/
         podman run --rm bb sh -c 'cd /sys/class/net; echo *'
         podman rm -f -t 0 web >p
         podman network create n1 >p; podman run -d --name named --network n1 bb sh -c \"$serve\" >id
         podman run --rm --network n1 bb sh -c 'until wget -qO- http://named/; do sleep 1; done'
         podman run --rm --network none bb sh -c 'cd /sys/class/net; echo *'
         podman run --rm --network host bb true 2>&1 | grep -o \"the host's network: a guest cannot share it\"",
    )?;
    let page = "hello from the guest";
    expect(&output, &[page, page, "eth0 lo", page, "lo", "the host's network: a guest cannot share it"])?;
    traces.expect_nothing_of_katavm()?;
    Ok(Verdict::Passed)
}

fn options(context: &Context) -> Result<Verdict> {
    fs::write(
        context.scratch().join("seccomp.json"),
        r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO"}]}"#,
    )?;
    let output = podman(
        context,
        "run() { podman run --rm --network none \"$@\"; }
         run --tmpfs /etc:size=1m bb sh -c 'cat /etc/passwd; echo x >/etc/new; cat /etc/new'
         run --read-only bb sh -c 'echo x >/tmp/f && cat /tmp/f; echo x >/f || echo refused' 2>err
         run --init bb sh -c 'tr \"\\0\" \" \" </proc/1/cmdline | cut -c1-16'
         run --security-opt seccomp=seccomp.json bb mkdir /tmp/d 2>/dev/null || echo code $?
         run -v $PWD/seccomp.json:/single:ro bb sh -c 'wc -c </single'
         run --hostname hh --env A=b --workdir /tmp --ulimit nofile=77:88 bb sh -c 'hostname; echo $A; pwd; ulimit -n'
         run --device /dev/null:/dev/mynull bb sh -c 'echo gone >/dev/mynull; [ -c /dev/mynull ] && echo device'
         run --sysctl net.core.somaxconn=77 bb cat /proc/sys/net/core/somaxconn
         run --privileged bb sh -c 'mount -t tmpfs none /tmp && echo mounted'",
    )?;
    let passwd = "root:x:0:0:root:/root:/bin/sh";
    let expected = [
        passwd,
        "x",
        "x",
        "refused",
        "/run/podman-init",
        "code 1",
        "103",
        "hh",
        "b",
        "/tmp",
        "77",
        "device",
        "77",
        "mounted",
    ];
    expect(&output, &expected)?;
    Ok(Verdict::Passed)
}

fn looks_after(context: &Context) -> Result<Verdict> {
    let output = podman(
        context,
        "podman run -d --name h --network none --health-cmd 'cat /etc/passwd' --health-interval 1s bb sleep 1000 >id
         podman healthcheck run h; podman inspect h --format '{{.State.Health.Status}}'
         podman stats --no-stream --no-reset --format '{{.Name}}' h
         podman top h >top; grep -q katavm top && echo stand-in
         podman update --memory 200m h >p; podman exec h cat /sys/fs/cgroup/memory.max
         podman restart -t 0 h; podman exec h echo after; podman kill -s KILL h; podman wait h; podman rm h; podman ps -aq",
    )?;
    expect(&output, &["healthy", "h", "stand-in", "209715200", "h", "after", "h", "137", "h"])?;
    Ok(Verdict::Passed)
}

/// Containers of a pod reach each other by the loopback, share what they are to share, and come and go.
fn pod(context: &Context) -> Result<Verdict> {
    let traces = Traces::of(Path::new("/nonexistent"));
    let output = podman(
        context,
        "trap 'podman pod rm -fa -t 0 >p; podman rm -fa -t 0 >p' EXIT
         said='while :; do echo from p1 | nc -l -p 80; done'
         podman pod create --name pp --share net,ipc,uts,pid -p 8080:80 >id
         podman run -d --pod pp --name p1 bb sh -c \"$said\" >id
         podman run --rm --pod pp bb sh -c 'until nc 127.0.0.1 80 2>/dev/null; do sleep 1; done; hostname; ps' >seen
         head -2 seen; grep -c catatonit seen
         [ $(pgrep -cx katavm-sandbox) = 1 ] && echo one sandbox; katavm list -q | wc -l
         podman stop -t 0 p1; podman start p1; podman exec p1 echo again
         podman pod stop -t 0 pp; pgrep -cx katavm-sandbox || true; podman pod start pp; podman exec p1 echo once more
         podman pod rm -f -t 0 pp >id
         podman run -d --name c1 --network none bb sleep 1000 >id
         podman run --rm --network container:c1 bb cat /sys/class/net/lo/operstate; podman rm -f -t 0 c1; katavm list -q",
    )?;
    let expected =
        ["from p1", "pp", "1", "one sandbox", "2", "p1", "p1", "again", "pp", "0", "pp", "once more", "unknown", "c1"];
    expect(&output, &expected)?;
    traces.expect_nothing_of_katavm()?;
    Ok(Verdict::Passed)
}
