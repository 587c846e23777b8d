//! What goes over the networks of guests: streams between two of them and to the host, and what may befall a link.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use anyhow::Result;
use serde_json::json;

use super::leftovers::Traces;
use super::shell::{expect, script};
use super::{Context, Row, Table, Verdict};

/// The table.
pub const CASES: (&str, &[Row]) = (
    "traffic",
    &[
        ("streams_pass_a_bridge_between_guests_and_to_the_host", streams),
        ("links_go_down_and_up_and_taps_may_be_lost", links),
    ],
);

/// For `katavm-e2e --long`.
pub const LONG: Table = ("traffic", &[("sixty_five_thousand_connections_are_held", crowd)]);

/// Both ends of many connections.
const PROGRAM: &str = include_str!("traffic.py");

/// What the scripts begin with: `connect` makes an interface on a bridge as a CNI plugin does; everything goes with the
/// script.
const PRELUDE: &str = "
bridge() {
    ip link add $1 type bridge; ip link set $1 mtu 9000
    ip addr add $2.1/24 dev $1; ip addr add $3::1/64 dev $1 nodad; ip link set $1 up
}
connect() { # namespace interface peer bridge IPv4-net IPv6-net number
    ip link add $2 netns $1 mtu 9000 type veth peer name $3 mtu 9000
    ip link set $3 master $4 up
    ip -n $1 addr add $5.$7/24 dev $2; ip -n $1 addr add $6::$7/64 dev $2 nodad
    ip -n $1 link set lo up; ip -n $1 link set $2 up
}
await() { for i in $(seq 300); do \"$@\" 2>/dev/null && return; sleep 0.2; done; echo \"not in a minute: $*\"; exit 1; }
clean() {
    set +e
    for id in $(katavm list -q); do katavm delete --force $id; done
    for line in 'netns del net-a' 'netns del net-b' 'link del bridge-a' 'link del bridge-b'; do ip $line 2>/dev/null; done
    kill $(jobs -p) 2>/dev/null
}
trap clean EXIT
";

/// A bundle in the folder `name` with the host's programs, in the namespace `netns`.
fn bundle(context: &Context, name: &str, netns: &str, args: &[&str]) -> Result<()> {
    let folder = context.scratch().join(name);
    let rootfs = folder.join("rootfs");
    for part in ["usr", "etc", "tmp", "proc", "dev", "sys", "run"] {
        fs::create_dir_all(rootfs.join(part))?;
    }
    for link in ["bin", "sbin", "lib", "lib64"] {
        symlink(Path::new("usr").join(link), rootfs.join(link))?;
    }
    let caps = json!(["CAP_NET_RAW", "CAP_NET_ADMIN", "CAP_DAC_OVERRIDE"]);
    let config = json!({
        "ociVersion": "1.2.0",
        "process": {
            "args": args, "cwd": "/tmp", "user": {"uid": 0, "gid": 0}, "env": ["PATH=/usr/sbin:/usr/bin"],
            "capabilities": {"bounding": caps, "effective": caps, "permitted": caps},
        },
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
            {"destination": "/usr", "type": "bind", "source": "/usr", "options": ["rbind", "ro"]},
        ],
        "linux": {"namespaces": [
            {"type": "pid"}, {"type": "mount"}, {"type": "network", "path": format!("/run/netns/{netns}")},
        ]},
    });
    Ok(fs::write(folder.join("config.json"), config.to_string())?)
}

/// What there is before. The first namespace of a host makes a mount, which stays.
fn before(context: &Context) -> Result<Traces> {
    script(context, "ip netns add net-a; ip netns del net-a")?;
    Ok(Traces::of(context.scratch()))
}

fn streams(context: &Context) -> Result<Verdict> {
    bundle(context, "a", "net-a", &["iperf3", "-s"])?;
    bundle(context, "b", "net-b", &["sleep", "1000"])?;
    let traces = before(context)?;
    let body = "
        ip netns add net-a; ip netns add net-b; bridge bridge-a 10.78.0 fd78
        connect net-a eth0 peer-a bridge-a 10.78.0 fd78 2; connect net-b eth0 peer-b bridge-a 10.78.0 fd78 3
        errors_before=$(nstat -asz | awk '/CsumErrors/ {n += $2} END {print n}')
        katavm run -d --cpus 2 --bundle a ga </dev/null >a.log 2>&1; katavm run -d --bundle b gb </dev/null >b.log 2>&1
        iperf3 -s >host.log 2>&1 &
        await nc -z 10.78.0.2 5201; await nc -z 10.78.0.1 5201
        cat /sys/class/net/peer-a/mtu; katavm exec ga cat /sys/class/net/eth0/mtu
        katavm exec ga ls -d /sys/class/net/eth0/queues/rx-1 /sys/class/net/eth0/queues/tx-1 | wc -l
        # As large as they may be, uncut, over both versions of IP.
        for to in 10.78.0.1 10.78.0.2; do katavm exec gb ping -c 2 -w 30 -M do -s 8972 $to | grep -o '2 received'; done
        for to in fd78::1 fd78::2; do katavm exec gb ping -c 2 -w 30 -M do -s 8952 $to | grep -o '2 received'; done
        # Streams: what was received, in MB. iperf3 counts what has arrived when the sender is done: what is in the buffers
        # of the two is not in it, and on a busy machine that is much. That nothing is lost is seen below.
        stream() {
            katavm exec gb iperf3 -J --connect-timeout 30000 \"$@\" >run.json || { cat run.json; return; }
            jq -r '.end | \"\\(.sum_received.bytes / 1000000 | floor) MB at \\(.sum_received.bits_per_second / 1000000 | floor) Mbit/s\"' run.json \\
                | sed \"s|^|$* |\" >>rates
            jq -r '.end | .sum_sent.bytes >= 8000000 and .sum_received.bytes >= 1000000' run.json
        }
        for to in 10.78.0.2 10.78.0.1; do
            stream -c $to -n 8M; stream -c $to -n 8M -R; stream -c $to -n 8M -P 8; stream -c $to -n 8M -P 8 -R
        done
        stream -c fd78::2 -n 8M; stream -c fd78::2 -n 8M -R
        # UDP at a rate that everything takes: next to nothing is lost on the way. What did reach the receiver's kernel and
        # found its socket full, as the program got no time, is one of its counters, RcvbufErrors.
        datagrams() { # receiver way
            katavm exec gb iperf3 -J -u -b 4M -l 1400 -t 2 -c 10.78.0.2 ${2:-} >run.json
            full=$(katavm exec $1 cat /proc/net/snmp | awk '/^Udp:/ { n = $6 } END { print n }')
            jq -r --argjson full $full '.end.sum | (.lost_packets - $full) * 50 < .packets' run.json
        }
        datagrams ga; datagrams gb -R
        # Every byte as it was sent, from guest to guest.
        katavm exec -d ga sh -c 'nc.openbsd -l -p 7000 -N </usr/bin/iperf3 >/tmp/got'
        listens() { katavm exec ga ss -Htln 'sport = 7000' | grep -q 7000; }; await listens
        katavm exec gb sh -c 'nc.openbsd -N 10.78.0.2 7000 </usr/bin/python3 | cmp - /usr/bin/iperf3 && echo same'
        katavm exec ga cmp /tmp/got /usr/bin/python3 && echo same
        errors() { awk '/CsumErrors/ {n += $2} END {print n - b}' b=${1:-0}; }
        nstat -asz | errors $errors_before
        for id in ga gb; do katavm exec $id cat /proc/net/snmp /proc/net/snmp6 | python3 -c '
import sys
lines = [line.split() for line in sys.stdin]
errors = sum(int(v) for name, value in zip(lines, lines[1:]) if len(name) > 2 and name[0] == value[0] for n, v in zip(name, value) if \"CsumErrors\" in n)
print(errors + sum(int(line[1]) for line in lines if len(line) == 2 and \"CsumErrors\" in line[0]))'; done";
    let output = script(context, &format!("{PRELUDE}{body}"))?;
    context.note("rates", fs::read(context.scratch().join("rates")).unwrap_or_default());
    let mut lines = vec!["9000", "9000", "2"];
    lines.extend(["2 received"; 4]);
    lines.extend(["true"; 12]);
    lines.extend(["same", "same", "0", "0", "0"]);
    expect(&output, &lines)?;
    traces.expect_nothing_new()?;
    Ok(Verdict::Passed)
}

fn links(context: &Context) -> Result<Verdict> {
    bundle(context, "a", "net-a", &["sleep", "1000"])?;
    let traces = before(context)?;
    let body = "
        ip netns add net-a; bridge bridge-a 10.78.0 fd78; bridge bridge-b 10.79.0 fd79
        connect net-a eth0 peer-a bridge-a 10.78.0 fd78 2; connect net-a eth1 peer-b bridge-b 10.79.0 fd79 2
        katavm --log a.log run -d --bundle a --memory 192M ga </dev/null >out 2>&1
        for to in 10.78.0.1 10.79.0.1; do katavm exec ga ping -c 2 -w 30 $to | grep -o '2 received'; done
        carrier() { katavm exec ga cat /sys/class/net/$1/carrier; }; has() { [ $(carrier $1) = $2 ]; }
        # The other end of the pair goes down and comes back: so does the guest's link.
        ip link set peer-a down; await has eth0 0; echo down; carrier eth1
        ip link set peer-a up; await has eth0 1; echo up
        katavm exec ga ping -c 2 -w 30 10.78.0.1 | grep -o '2 received'
        # A flood, over both, of what nobody in there listens to.
        pid=$(pgrep -x katavm-sandbox); 
        # Of everything but the guest's RAM.
        rss() { awk '/^Size/ {size = $2} /^Rss/ && size < 65536 {n += $2} END {print n}' /proc/$pid/smaps; }
        before=$(rss)
        python3 -c 'import socket, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); n = 0; end = time.time() + 8
while time.time() < end:
    for to in (\"10.78.0.2\", \"10.79.0.2\"):
        try: s.sendto(bytes(8000), (to, 9999)); n += 1
        except OSError: pass
print(n * 8000 > 64 << 20 or n)'
        [ $(($(rss) - before)) -lt 16384 ] && echo bounded || echo grew from $before to $(rss)
        katavm exec ga ping -c 2 -w 30 10.79.0.1 | grep -o '2 received'
        # Somebody deletes a tap.
        ip -n net-a link del katavm0; await has eth0 0; echo lost
        grep -c 'its link is down' a.log
        katavm exec ga ping -c 2 -w 30 10.79.0.1 | grep -o '2 received'
        katavm exec ga uname -s";
    let output = script(context, &format!("{PRELUDE}{body}"))?;
    let got = "2 received";
    let lines = [got, got, "down", "1", "up", got, "True", "bounded", got, "lost", "1", got, "Linux"];
    context.note("log", fs::read(context.scratch().join("a.log")).unwrap_or_default());
    expect(&output, &lines)?;
    traces.expect_nothing_new()?;
    Ok(Verdict::Passed)
}

fn crowd(context: &Context) -> Result<Verdict> {
    bundle(context, "a", "net-a", &["python3", "/tmp/traffic.py", "serve", "/tmp/open"])?;
    for folder in [context.scratch(), &context.scratch().join("a/rootfs/tmp")] {
        fs::write(folder.join("traffic.py"), PROGRAM)?;
    }
    let traces = before(context)?;
    // A kernel has room for a tenth of its memory in open files, each taken for 1 KiB: 512 MiB are too little for as many.
    let body = "
        jq '.process.rlimits = [{type: \"RLIMIT_NOFILE\", soft: 100000, hard: 100000}]' a/config.json >b; mv b a/config.json
        ip netns add net-a; bridge bridge-a 10.78.0 fd78; connect net-a eth0 peer-a bridge-a 10.78.0 fd78 2
        katavm run -d --memory 2048 --bundle a ga </dev/null >a.log 2>&1
        await nc -z 10.78.0.2 8007
        mkfifo go; ulimit -n 100000; python3 traffic.py hold 10.78.0.2 65536 <go >held 2>&1 & client=$!; exec 9>go
        until grep -q '^held 65536$' held; do kill -0 $client 2>/dev/null || { tail -n 3 held a.log >&2; exit 1; }; sleep 1; done
        open() { [ $(katavm exec ga cat /tmp/open) = $1 ]; }
        await open 65536; echo held
        katavm exec ga uname -s; nc -z 10.78.0.2 8000 && echo one more
        exec 9>&-; wait $client; await open 0; echo gone";
    let output = script(context, &format!("{PRELUDE}{body}"));
    context.note("log", fs::read(context.scratch().join("a.log")).unwrap_or_default());
    expect(&output?, &["held", "Linux", "one more", "gone"])?;
    traces.expect_nothing_new()?;
    Ok(Verdict::Passed)
}
