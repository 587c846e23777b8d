//! Guests on network namespaces of the host.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::{self, JoinHandle};

use anyhow::{Context as _, Result, ensure};
use katavm_devices::net::{Net, NetConfig, Offloads};
use katavm_runtime::network::{Interface, Plugged, Scan, Watch, plug, slot};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::json;

use super::agent::rootfs;
use super::leftovers::Traces;
use super::rebuild;
use super::run::bundle;
use super::shell::{expect, script};
use super::{Context, Guest, Row, Verdict};

/// The table.
pub const CASES: (&str, &[Row]) = (
    "network",
    &[
        ("a_namespace_becomes_the_guests_network", whole_network),
        ("an_interface_may_come_late", late),
        ("connections_made_in_the_namespace_reach_the_guest", from_within),
    ],
);

/// Where the namespace is mounted by `ip netns`.
const PLACE: &str = "/run/netns/katavm-e2e";
/// Pairs of queues of the guest's device.
const PAIRS: u16 = 2;
/// What goes over TCP, each way.
const BYTES: usize = 10 << 20;

fn said_outside(line: &str) -> Result<String> {
    let done = Command::new("sh").args(["-c", line]).output()?;
    ensure!(done.status.success(), "{line}: {}", String::from_utf8_lossy(&done.stderr));
    Ok(String::from_utf8(done.stdout)?)
}

fn ip(line: &str) -> Result<()> {
    said_outside(&format!("ip {line}")).map(drop)
}

/// Waits for something to happen in a namespace.
fn news(watch: &Watch) -> Result<()> {
    let mut fds = [PollFd::new(watch, PollFlags::IN)];
    ensure!(poll(&mut fds, Some(&Timespec { tv_sec: 120, tv_nsec: 0 }))? == 1, "no news of the namespace");
    ensure!(watch.take_news()?, "no news of the namespace");
    Ok(())
}

/// A namespace, with what was made for it in the host's own; gone with this.
struct Namespace {
    fd: OwnedFd,
}

impl Namespace {
    fn new() -> Result<Self> {
        ip("netns add katavm-e2e")?;
        Ok(Self { fd: File::open(PLACE)?.into() })
    }

    /// A pair of interfaces: `eth0` in the namespace and `host0` outside, as a network plugin of an engine makes them.
    fn connect(&self) -> Result<()> {
        for line in [
            "link add eth0 netns katavm-e2e mtu 1400 type veth peer name host0 mtu 1400",
            "addr add 10.77.0.1/24 dev host0",
            "addr add fd77::1/64 dev host0 nodad",
            "link set host0 up",
            "-n katavm-e2e link set lo up",
            "-n katavm-e2e addr add 10.77.0.2/24 brd + dev eth0",
            "-n katavm-e2e addr add fd77::2/64 dev eth0 nodad",
            "-n katavm-e2e link set eth0 up",
            "-n katavm-e2e route add default via 10.77.0.1",
            "-n katavm-e2e -6 route add default via fd77::1",
            "-n katavm-e2e route add 192.0.2.0/24 via 10.77.0.7 metric 9",
            "-n katavm-e2e route add default via 10.77.0.7 table 177",
            "-n katavm-e2e rule add from 10.77.0.0/24 to 203.0.113.0/24 priority 99 table 177",
            "-n katavm-e2e neigh add 10.77.0.7 lladdr 02:00:00:00:07:07 dev eth0 nud permanent",
        ] {
            ip(line)?;
        }
        // The kernel tells of the carrier in its own time.
        let watch = Watch::new(&self.fd)?;
        while !said_outside("ip -n katavm-e2e -o link show eth0")?.contains("state UP") {
            news(&watch)?;
        }
        Ok(())
    }

    fn scan(&self) -> Result<(Scan, Interface)> {
        let scan = Scan::of(&self.fd)?;
        let eth0 = scan.interfaces.iter().find(|interface| interface.name == "eth0").context("no eth0")?.clone();
        Ok((scan, eth0))
    }

    /// What must be the same after unplugging.
    fn state(&self) -> Result<String> {
        let mut state = String::new();
        for line in ["ip -o link", "ip -o addr", "tc qdisc", "ip route show table all"] {
            let text = said_outside(&format!("ip netns exec katavm-e2e {line}"))?;
            // Link-local addresses are given by the kernel, in its own time.
            state.extend(text.lines().filter(|line| !line.contains("fe80:")).map(|line| format!("{line}\n")));
        }
        Ok(state)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = ip("netns del katavm-e2e");
        let _ = ip("link del host0");
    }
}

/// Bytes that do not repeat: a generator by Marsaglia.
fn pattern() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut words = Vec::with_capacity(BYTES);
    while words.len() < BYTES {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        words.extend(state.to_le_bytes());
    }
    words
}

fn checksum(bytes: &[u8], at: &Path) -> Result<String> {
    std::fs::write(at, bytes)?;
    let done = Command::new("sha256sum").arg(at).output()?;
    let text = String::from_utf8(done.stdout)?;
    Ok(text.split_whitespace().next().context("no checksum")?.to_owned())
}

/// Serves one connection to `address`.
fn serve<T: Send + 'static>(
    address: &str,
    work: impl FnOnce(TcpStream) -> std::io::Result<T> + Send + 'static,
) -> Result<JoinHandle<std::io::Result<T>>> {
    let address: SocketAddr = address.parse()?;
    let listener = TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))?;
    Ok(thread::spawn(move || work(listener.accept()?.0)))
}

fn finished<T>(server: JoinHandle<std::io::Result<T>>) -> Result<T> {
    Ok(server.join().map_err(|_| anyhow::anyhow!("a server panicked"))??)
}

fn device(interface: &Interface) -> Result<Net> {
    let mtu = Some(u16::try_from(interface.mtu)?);
    let mac = interface.mac.context("eth0 has no address")?;
    Ok(Net::new(NetConfig {
        mac,
        mtu,
        offloads: Offloads::of_this_kernel(),
        pairs: PAIRS,
        limits: Default::default(),
    })?)
}

fn configure(guest: &Guest, scan: &Scan, plugged: &Plugged, mac: [u8; 6]) -> Result<()> {
    let request = scan.request(&[(plugged.interface(), mac)]);
    guest.ask(guest.agent.configure_network(Guest::soon(), &request)).map(drop)
}

fn root(context: &Context) -> Result<PathBuf> {
    let root = rootfs(context)?;
    for applet in ["grep", "ip", "nc", "ping", "ping6"] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(applet))?;
    }
    Ok(root)
}

/// What a shell script says, to its end.
fn said(guest: &Guest, id: &str, root: &Path, script: &str) -> Result<String> {
    let output = guest.run(id, root, &["/bin/sh", "-euc", script])?;
    let text = String::from_utf8_lossy(&output.stdout).split_whitespace().collect::<Vec<_>>().join(" ");
    ensure!(output.exit.status == 0, "status {} of {script:?}: {text}", output.exit.status);
    Ok(text)
}

fn says(text: &str, words: &[&str]) -> Result<()> {
    let missing: Vec<_> = words.iter().filter(|word| !text.contains(**word)).collect();
    ensure!(missing.is_empty(), "{missing:?} are not in: {text}");
    Ok(())
}

const PING: &str = "ping -c 2 -w 60 10.77.0.1; ping6 -c 2 -w 60 fd77::1;";

fn whole_network(context: &Context) -> Result<Verdict> {
    let namespace = Namespace::new()?;
    namespace.connect()?;
    let before = namespace.state()?;
    let (scan, eth0) = namespace.scan()?;
    let mac = eth0.mac.context("eth0 has no address")?;
    let mut net = device(&eth0)?;
    let plugged = plug(&namespace.fd, &eth0, PAIRS)?;
    net.attach_queues(plugged.taps()?)?;
    let guest = Guest::boot_with(context, vec![net], |_| ())?;
    guest.sandbox()?;
    // Once more is no harm.
    configure(&guest, &scan, &plugged, mac)?;
    configure(&guest, &scan, &plugged, mac)?;

    let root = root(context)?;
    let text = said(
        &guest,
        "c1",
        &root,
        "ip link; ip addr; ip route; ip -6 route; ip neigh; ip rule; ip route show table 177",
    )?;
    let own = mac.map(|byte| format!("{byte:02x}")).join(":");
    says(
        &text,
        &[
            "eth0: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1400",
            &own,
            "inet 10.77.0.2/24 brd 10.77.0.255",
            "inet6 fd77::2/64",
            "default via 10.77.0.1 dev eth0",
            "192.0.2.0/24 via 10.77.0.7 dev eth0 metric 9",
            "default via fd77::1 dev eth0",
            "99: from 10.77.0.0/24 to 203.0.113.0/24 lookup 177",
            "default via 10.77.0.7 dev eth0",
            "10.77.0.7 dev eth0 lladdr 02:00:00:00:07:07",
        ],
    )?;
    // And one that has to be cut in pieces.
    let text = said(&guest, "c2", &root, &format!("{PING} ping -c 1 -w 60 -s 5000 10.77.0.1"))?;
    says(&text, &["2 packets transmitted, 2 packets received", "5008 bytes from 10.77.0.1"])?;
    ensure!(text.matches("2 packets received, 0% packet loss").count() == 2, "{text}");

    let sent = pattern();
    let sum = checksum(&sent, &context.scratch().join("sent"))?;
    for (number, here) in ["10.77.0.1", "[fd77::1]"].into_iter().enumerate() {
        let copy = sent.clone();
        let server = serve(&format!("{here}:7001"), move |mut stream| stream.write_all(&copy))?;
        let receiver = serve(&format!("{here}:7002"), |mut stream| {
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes).map(|_| bytes)
        })?;
        let host = here.trim_matches(['[', ']']);
        let script = format!("nc {host} 7001 > /tmp/f; sha256sum < /tmp/f; nc {host} 7002 < /tmp/f");
        let text = said(&guest, &format!("t{number}"), &root, &script)?;
        finished(server)?;
        says(&text, &[&sum])?;
        ensure!(finished(receiver)? == sent, "other bytes came back over {here}");
    }
    let counters = said(&guest, "c4", &root, "grep eth0: /proc/net/dev")?;
    context.note("counters", counters.clone());
    let numbers: Vec<u64> = counters.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let [rx_bytes, rx_packets, .., tx_bytes, tx_packets, _, _, _, _, _, _] = numbers[..] else {
        anyhow::bail!("no counters: {counters}")
    };
    ensure!(
        rx_bytes / rx_packets > 2 * 1400 && tx_bytes / tx_packets > 2 * 1400,
        "TCP was cut by its sender: {counters}"
    );

    // A guest that goes on elsewhere finds its network when it gets its tap.
    let exports: Vec<(String, PathBuf)> =
        ["c1", "c2", "t0", "t1", "c4"].iter().map(|id| ((*id).to_owned(), root.clone())).collect();
    let exports: Vec<(&str, &Path)> = exports.iter().map(|(id, root)| (&**id, &**root)).collect();
    let guest = rebuild::here(context, guest, &exports, || Ok(Vec::new()))?;
    guest.vm.attach_net(0, plugged.taps()?)?;
    let text = said(&guest, "c3", &root, PING)?;
    ensure!(text.matches("2 packets received, 0% packet loss").count() == 2, "{text}");
    ensure!(guest.vm.exits() > 100, "KVM counted {} exits: no guest ran", guest.vm.exits());
    guest.end()?;
    plugged.unplug()?;
    let after = namespace.state()?;
    ensure!(after == before, "the namespace was\n{before}\nand is\n{after}");
    Ok(Verdict::Passed)
}

/// As dockerd does it: the guest runs already when the namespace gets its interface.
fn late(context: &Context) -> Result<Verdict> {
    let namespace = Namespace::new()?;
    let device = slot(PAIRS)?;
    let mac = device.mac();
    let guest = Guest::boot_with(context, vec![device], |_| ())?;
    guest.sandbox()?;
    let root = root(context)?;
    let interfaces = |id: &str| said(&guest, id, &root, "grep -o '^ *[a-z0-9]*:' /proc/net/dev");
    ensure!(interfaces("c1")? == "lo:", "a place without an interface is seen in the guest");

    let watch = Watch::new(&namespace.fd)?;
    ensure!(Scan::of(&namespace.fd)?.interfaces.is_empty(), "the namespace is not empty");
    namespace.connect()?;
    news(&watch)?;
    let (scan, eth0) = namespace.scan()?;
    let plugged = plug(&namespace.fd, &eth0, PAIRS)?;
    guest.vm.attach_net(0, plugged.taps()?)?;
    configure(&guest, &scan, &plugged, mac)?;
    let own = eth0.mac.context("eth0 has no address")?.map(|byte| format!("{byte:02x}")).join(":");
    let text = said(&guest, "c2", &root, &format!("ip link; {PING}"))?;
    says(&text, &["eth0: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1400", &own])?;
    ensure!(text.matches("2 packets received, 0% packet loss").count() == 2, "{text}");
    ensure!(guest.vm.attach_net(1, plugged.taps()?).is_err(), "there is no second interface");

    guest.vm.detach_net(0)?;
    plugged.unplug()?;
    let wait = "while ip link show eth0 | grep -q LOWER_UP; do :; done; ip link show eth0";
    let text = said(&guest, "c3", &root, wait)?;
    says(&text, &["eth0: <NO-CARRIER,BROADCAST,MULTICAST,UP>"])?;
    // When the agent hears of it as well, the interface goes; and it may come back.
    let nothing = Scan::default().request(&[]);
    guest.ask(guest.agent.configure_network(Guest::soon(), &nothing))?;
    ensure!(interfaces("c4")? == "lo:", "an interface that was unplugged is seen in the guest");
    let plugged = plug(&namespace.fd, &eth0, PAIRS)?;
    guest.vm.attach_net(0, plugged.taps()?)?;
    configure(&guest, &scan, &plugged, mac)?;
    let text = said(&guest, "c5", &root, PING)?;
    ensure!(text.matches("2 packets received, 0% packet loss").count() == 2, "{text}");
    ensure!(guest.vm.exits() > 100, "KVM counted {} exits: no guest ran", guest.vm.exits());
    guest.end()?;
    Ok(Verdict::Passed)
}

/// As rootless Podman's and containerd's helpers do it: they enter the namespace and connect to the loopback there.
fn from_within(context: &Context) -> Result<Verdict> {
    let namespace = Namespace::new()?;
    namespace.connect()?;
    let servers = "echo hello from the guest >/tmp/index.html; httpd -p 80 -h /tmp; httpd -p 127.0.0.1:81 -h /tmp
        nc -ll -p 82 -e cat & exec sleep 1000";
    bundle(context, &["sh", "-c", servers], |config| {
        config["linux"]["namespaces"][4]["path"] = json!(PLACE);
        for set in ["bounding", "effective", "permitted"] {
            let held = config["process"]["capabilities"][set].as_array_mut();
            held.into_iter().for_each(|held| held.push(json!("CAP_NET_BIND_SERVICE")));
        }
    })?;
    super::agent::whole_rootfs(context)?;
    std::fs::create_dir_all(context.scratch().join("rootfs/tmp"))?;
    let traces = Traces::of(context.scratch());
    let output = script(
        context,
        "inside() { nsenter --net=/run/netns/katavm-e2e \"$@\"; }
         get() { inside curl -fsS -m 60 \"$1\" || echo none at $1; }
         katavm run -d c1 </dev/null >out 2>&1
         until inside nc -z 127.0.0.1 82; do sleep 1; done
         get http://127.0.0.1/; get 'http://[::1]/'; get http://10.77.0.2/; get 'http://[fd77::2]/'; get http://127.0.0.1:81/
         for closed in 10.77.0.2:81 [::1]:81 127.0.0.1:83; do
             inside curl -sS -m 60 http://$closed/ 2>/dev/null || echo closed $?
         done
         # Each direction ends by itself, and nothing is lost.
         head -c 3000000 /dev/urandom >blob; inside nc -N 127.0.0.1 82 <blob | cmp - blob && echo whole
         for i in $(seq 40); do inside curl -fsS -m 100 http://127.0.0.1/ >>pages & done; wait; wc -l <pages
         katavm exec c1 sh -c 'nc -l -p 84 >/dev/null & sleep 1; nc -l -p 53 >/dev/null &'
         until inside nc -z 127.0.0.1 53; do sleep 0.2; done; echo late
         katavm exec c1 killall httpd; while inside nc -z 127.0.0.1 80; do sleep 0.2; done; echo gone
         # A connection that is open when the container is killed ends, as that of a server that is killed does.
         inside python3 -c 'import socket
s = socket.create_connection((\"127.0.0.1\", 82)); print(\"open\", flush=True)
try: print(s.recv(1))
except ConnectionResetError: print(\"reset\")' >client & client=$!
         until grep -q open client; do sleep 0.2; done
         katavm delete --force c1; wait $client; tail -n 1 client; inside ss -Htln | wc -l",
    )?;
    let page = "hello from the guest";
    let lines =
        [page, page, page, page, page, "closed 7", "closed 7", "closed 7", "whole", "40", "late", "gone", "b''", "0"];
    expect(&output, &lines)?;
    traces.expect_nothing_new()?;
    Ok(Verdict::Passed)
}
