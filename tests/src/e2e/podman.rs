//! Podman with katavm as its runtime.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};

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
    ],
);

/// Podman with an image of the case's root file system; `podman` in a script runs containers by katavm.
fn podman(context: &Context, text: &str) -> Result<String> {
    super::agent::rootfs(context)?;
    let prelude = "podman() { command podman --runtime $(command -v katavm) \"$@\"; }
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
    let left: Vec<_> = traces.new_ones().into_iter().filter(|trace| trace.contains("katavm")).collect();
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(Verdict::Passed)
}

/// On the engine's default bridge and on one of its own with names, reached from another machine by a published port.
fn networks(context: &Context) -> Result<Verdict> {
    let traces = Traces::of(Path::new("/nonexistent"));
    let output = podman(
        context,
        "ln -s busybox rootfs/bin/httpd; ln -s busybox rootfs/bin/wget; ln -s busybox rootfs/bin/ip
         tar -C rootfs -c . | command podman import - net >import 2>&1
         trap 'ip netns del outside; podman rm -fa -t 0 >p; podman network rm n1 >p; podman rmi -fa >p' EXIT
         [ -e /etc/resolv.conf ] || echo 'nameserver 192.0.2.1' >/etc/resolv.conf # the names' server wants one
         ip netns add outside; ip link add far netns outside type veth peer name near
         ip addr add 10.99.0.1/24 dev near; ip link set near up
         ip -n outside addr add 10.99.0.2/24 dev far; ip -n outside link set far up; ip -n outside route add default via 10.99.0.1
         serve='echo hello from the guest >/tmp/index.html; exec httpd -f -p 80 -h /tmp'
         podman run -d --name web -p 8080:80 net sh -c \"$serve\" >id
         until curl -fsS -o page -m 20 http://127.0.0.1:8080/ 2>err; do sleep 1; done; cat page
         ip netns exec outside curl -sS -m 60 http://10.99.0.1:8080/
         podman run --rm net sh -c 'cd /sys/class/net; echo *'
         podman rm -f -t 0 web >p
         podman network create n1 >p; podman run -d --name named --network n1 net sh -c \"$serve\" >id
         podman run --rm --network n1 net sh -c 'until wget -qO- http://named/; do sleep 1; done'
         podman run --rm --network none net sh -c 'cd /sys/class/net; echo *'
         podman run --rm --network host net true 2>&1 | grep -o \"the host's network: a guest cannot share it\"",
    )?;
    let page = "hello from the guest";
    expect(&output, &[page, page, "eth0 lo", page, "lo", "the host's network: a guest cannot share it"])?;
    let left: Vec<_> = traces.new_ones().into_iter().filter(|trace| trace.contains("katavm")).collect();
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(Verdict::Passed)
}
