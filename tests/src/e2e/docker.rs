//! Docker with katavm as its runtime.

use std::path::Path;

use anyhow::Result;

use super::leftovers::Traces;
use super::shell::{expect, script};
use super::{Context, Table, Verdict};

/// The table.
pub const CASES: Table = ("docker", &[("runs_and_looks_after_containers", containers), ("networks", networks)]);

/// Docker's own daemon for one case, with an image of the case's root file system; `run` in a script runs containers by
/// katavm.
fn docker(context: &Context, text: &str) -> Result<String> {
    super::agent::whole_rootfs(context)?;
    let prelude = "echo root:x:0:0:root:/root:/bin/sh >rootfs/etc/passwd
        [ -e /etc/resolv.conf ] || echo 'nameserver 192.0.2.1' >/etc/resolv.conf
        mkdir -p /var/lib/docker; mount -t tmpfs none /var/lib/docker
        dockerd --add-runtime katavm=$(command -v katavm) >dockerd.log 2>&1 & daemon=$!
        end() { docker rm -f $(docker ps -aq) >p 2>&1 || true; kill $daemon; wait $daemon || true; umount -l /var/lib/docker; }
        trap end EXIT
        until docker info >info 2>&1; do kill -0 $daemon; sleep 0.2; done
        run() { docker run --runtime katavm \"$@\"; }
        tar -C rootfs -c . | docker import - bb >import 2>&1\n";
    script(context, &format!("{prelude}{text}"))
}

fn containers(context: &Context) -> Result<Verdict> {
    let traces = Traces::of(Path::new("/nonexistent"));
    let output = docker(
        context,
        "run --rm bb uname -r
         run --rm bb sh -c 'exit 7' || echo code $?
         echo typed | run --rm -i bb cat
         run -d --name first --health-cmd true bb sh -c 'trap \"exit 3\" TERM; echo a line; while :; do sleep 1; done' >id
         until docker logs first 2>&1 | grep -q line; do :; done; docker logs first
         docker exec first sh -c 'echo in exec; exit 4' || echo code $?
         docker exec -t first sh -c 'test -t 0 && echo on a terminal' | tr -d '\\r'
         echo data >f; docker cp -q f first:/etc/f; docker exec first cat /etc/f; docker cp -q first:/etc/passwd g; cat g
         docker stats --no-stream --format '{{.Name}}' first
         docker top first | grep -c katavm
         docker pause first >p; docker inspect -f '{{.State.Status}}' first; docker unpause first >p
         docker update --memory 200m --memory-swap 200m first >p; docker exec first cat /sys/fs/cgroup/memory.max
         docker stop -t 20 first >p; docker wait first; docker rm first >p
         chmod 711 .; run --rm -v $PWD/f:/f:ro --user 1000:1000 --memory 100m --pids-limit 50 --cpus 1 --cap-drop=all bb \\
             sh -c 'id -u; cat /f; echo x 2>/dev/null >/f || echo read only' 2>err
         run --rm --tmpfs /data bb sh -c 'echo x >/data/f && cat /data/f'
         run --rm --read-only bb touch /f 2>/dev/null || echo code $?
         run --rm --init bb sh -c 'tr \"\\0\" \" \" </proc/1/cmdline | cut -c1-17'
         docker ps -aq",
    )?;
    let kernel = context.kernel_release()?;
    let passwd = "root:x:0:0:root:/root:/bin/sh";
    let expected = [
        kernel.as_str(),
        "code 7",
        "typed",
        "a line",
        "in exec",
        "code 4",
        "on a terminal",
        "data",
        passwd,
        "first",
        "1",
        "paused",
        "209715200",
        "3",
        "1000",
        "data",
        "read only",
        "x",
        "code 1",
        "/sbin/docker-init",
    ];
    expect(&output, &expected)?;
    traces.expect_nothing_of_katavm()?;
    Ok(Verdict::Passed)
}

/// Interfaces come between create and start, and to a container that runs.
fn networks(context: &Context) -> Result<Verdict> {
    let traces = Traces::of(Path::new("/nonexistent"));
    let output = docker(
        context,
        "serve='echo hello from the guest >/tmp/index.html; exec httpd -f -p 80 -h /tmp'
         run -d --name web -p 8080:80 bb sh -c \"$serve\" >id
         until curl -fsS -o page -m 20 http://127.0.0.1:8080/ 2>err; do sleep 1; done; cat page
         docker network create n1 >p; docker network create n2 >p
         run -d --name named --network n1 bb sh -c \"$serve\" >id
         ip=$(docker inspect -f '{{.NetworkSettings.Networks.n1.IPAddress}}' named)
         run --rm --network n1 bb sh -c \"until wget -qO- http://$ip/; do sleep 1; done\"
         interfaces() { docker exec named sh -c 'cd /sys/class/net; echo *'; }
         wait_for() { until [ \"$(interfaces)\" = \"$1\" ]; do sleep 1; done; interfaces; }
         docker network connect n2 named; wait_for 'eth0 eth1 lo'
         docker exec named ip -o -4 addr show eth1 | grep -c 'inet 172'
         docker network disconnect n2 named; wait_for 'eth0 lo'
         run --rm --network none bb sh -c 'cd /sys/class/net; echo *'
         run --rm --network host bb true 2>&1 | grep -o \"the host's network: a guest cannot share it\"",
    )?;
    let page = "hello from the guest";
    let host = "the host's network: a guest cannot share it";
    expect(&output, &[page, page, "eth0 eth1 lo", "1", "eth0 lo", "lo", host])?;
    traces.expect_nothing_of_katavm()?;
    Ok(Verdict::Passed)
}
