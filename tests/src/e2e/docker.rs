//! Docker with katavm as its runtime.

use std::fs;
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
        # As Debian's units have it: the containerd that dockerd starts by itself has 15 s to get ready.
        containerd --root /var/lib/docker/containerd --state /run/docker-containerd -a /run/docker-containerd.sock >containerd.log 2>&1 & containerd=$!
        until ctr -a /run/docker-containerd.sock version >p 2>&1; do kill -0 $containerd; sleep 0.2; done
        dockerd --containerd /run/docker-containerd.sock --add-runtime katavm=$(command -v katavm) >dockerd.log 2>&1 & daemon=$!
        end() {
            docker rm -f $(docker ps -aq) >p 2>&1 || true; kill $daemon || tail -n 50 dockerd.log >&2; wait $daemon || true
            kill $containerd; wait $containerd || true; rm -rf --one-file-system /run/docker-containerd*; umount -l /var/lib/docker
        }
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

/// A name server for which every name has one IPv4 address.
const NAMES: &str = r#"
import socket, sys
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind((sys.argv[1], 53))
while True:
    query, client = server.recvfrom(512)
    end = query.index(b"\0", 12) + 5
    address = query[end - 4:end - 2] == b"\0\1"
    answer = b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4" + bytes([192, 0, 2, 7]) if address else b""
    head = query[:2] + b"\x81\x80\0\1\0" + bytes([address]) + b"\0\0\0\0"
    server.sendto(head + query[12:end] + answer, client)
"#;

/// Interfaces come between create and start, and to a container that runs.
fn networks(context: &Context) -> Result<Verdict> {
    fs::write(context.scratch().join("names.py"), NAMES)?;
    let traces = Traces::of(Path::new("/nonexistent"));
    let output = docker(
        context,
        "serve='echo hello from the guest >/tmp/index.html; exec httpd -f -p 80 -h /tmp'
         run -d --name web -p 8080:80 bb sh -c \"$serve\" >id
         until curl -fsS -o page -m 20 http://127.0.0.1:8080/ 2>err; do sleep 1; done; cat page
         docker network create n1 >p; docker network create n2 >p
         run -d --name named --network n1 bb sh -c \"$serve\" >id
         run --rm --network n1 bb sh -c 'until wget -qO- http://named/; do sleep 1; done'
         # A server of the container may have the name server's port, as it may under other runtimes.
         docker exec named sh -c 'nc -ll -p 53 -e cat & sleep 1; echo mine | nc 127.0.0.1 53'
         nsenter -t $(docker inspect -f '{{.State.Pid}}' named) -n curl -fsS http://127.0.0.1/
         # Names that Docker does not know it asks others for, from within the namespace.
         ip addr add 10.98.0.1/32 dev lo; timeout 200 python3 names.py 10.98.0.1 & names=$!
         run --rm --network n1 --dns 10.98.0.1 bb nslookup -type=a outside.example | grep -o 192.0.2.7 | head -n 1
         kill $names; ip addr del 10.98.0.1/32 dev lo
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
    expect(&output, &[page, page, "mine", page, "192.0.2.7", "eth0 eth1 lo", "1", "eth0 lo", "lo", host])?;
    traces.expect_nothing_of_katavm()?;
    Ok(Verdict::Passed)
}
