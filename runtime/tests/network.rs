//! Scanning, plugging and watching, in network namespaces that each test has to itself. Takes root, `ip` and `tc`.

use std::fs::File;
use std::io::{self, Write as _};
use std::net::{IpAddr, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;
use std::time::Duration;

use katavm_runtime::host::in_network_namespace;
use katavm_runtime::network::{Listening, NetworkError, Plugged, Scan, Watch, listen_in, plug};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// A new namespace, or why there is none.
fn namespace() -> Result<OwnedFd, String> {
    let made = std::thread::spawn(|| {
        // SAFETY: unshare takes no memory; only this thread, which ends here, changes its namespace.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            return Err(format!("no network namespace can be made: {}", io::Error::last_os_error()));
        }
        File::open("/proc/thread-self/ns/net").map(OwnedFd::from).map_err(|error| error.to_string())
    });
    made.join().unwrap()
}

fn run(netns: &OwnedFd, line: &str) -> io::Result<String> {
    let mut words = line.split_whitespace();
    let mut command = Command::new(words.next().unwrap());
    command.args(words);
    let done = in_network_namespace(netns, || command.output()).unwrap()?;
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    if done.status.success() {
        Ok(text)
    } else {
        Err(io::Error::other(format!("{line}: {}", String::from_utf8_lossy(&done.stderr))))
    }
}

/// A namespace with `eth0`, one end of a pair of interfaces, and another one with its other end, `far`.
struct Pair {
    near: OwnedFd,
    far: OwnedFd,
}

impl Pair {
    /// Says SKIPPED and why, where the machine does not let us.
    fn new(test: &str) -> Option<Self> {
        let made = || -> Result<Self, String> {
            let (near, far) = (namespace()?, namespace()?);
            let place = format!("/proc/{}/fd/{}", std::process::id(), far.as_raw_fd());
            for line in [
                &*format!("ip link add eth0 type veth peer name far netns {place}"),
                "tc qdisc add dev eth0 ingress",
                "tc filter add dev eth0 parent ffff: protocol all u32 match u32 0 0 action mirred egress redirect dev lo",
                "tc qdisc del dev eth0 ingress",
                "ip link set lo up",
                // No link-local address, which would come in its own time.
                "ip link set eth0 addrgenmode none",
                "ip link set eth0 address 02:00:00:00:00:01 mtu 1400 up",
            ] {
                run(&near, line).map_err(|error| error.to_string())?;
            }
            run(&far, "ip link set far address 02:00:00:00:00:02 mtu 1400 up").map_err(|error| error.to_string())?;
            File::open("/dev/net/tun").map_err(|error| format!("/dev/net/tun: {error}"))?;
            // So does the carrier.
            let watch = Watch::new(&near).map_err(|error| error.to_string())?;
            while !run(&near, "ip -o link show eth0").map_err(|error| error.to_string())?.contains("state UP") {
                wait(&watch);
                watch.take_news().map_err(|error| error.to_string())?;
            }
            Ok(Self { near, far })
        };
        made()
            .map_err(|why| {
                // Past the harness' capture, so that it is seen.
                let _ = writeln!(io::stderr(), "SKIPPED {test}: {why}");
            })
            .ok()
    }

    fn near(&self, lines: &[&str]) {
        lines.iter().for_each(|line| drop(run(&self.near, line).unwrap()));
    }

    /// All that unplugging has to leave as it was.
    fn state(&self) -> String {
        let all = [
            "ip -d -o link",
            "ip -o addr",
            "tc qdisc show",
            "tc filter show dev eth0 ingress",
            "ip route show table all",
        ];
        all.map(|line| run(&self.near, line).unwrap()).concat()
    }

    fn plug(&self) -> Plugged {
        let scan = Scan::of(&self.near).unwrap();
        let eth0 = scan.interfaces.iter().find(|interface| interface.name == "eth0").unwrap();
        plug(&self.near, eth0, 1).unwrap()
    }

    /// Packets pass between the tap and the other namespace, both ways and nowhere else.
    fn assert_passes(&self, plugged: &Plugged) {
        let tap = plugged.taps().unwrap().remove(0);
        let far = packet_socket(&self.far, "far");
        let near = packet_socket(&self.near, "eth0");
        rustix::io::write(&tap, &[&[0; 12][..], &frame(1)].concat()).unwrap();
        assert_eq!(until(&far, &frame(1)), frame(1));
        rustix::io::write(&far, &frame(2)).unwrap();
        assert_eq!(until(&tap, &frame(2))[12..], frame(2));
        // The interface itself sees both on their way, once each.
        assert_eq!(until(&near, &frame(1)), frame(1));
        assert_eq!(until(&near, &frame(2)), frame(2));
    }
}

/// A frame of an EtherType that nobody speaks.
fn frame(seed: u8) -> Vec<u8> {
    [&[0xff; 6][..], &[2, 0, 0, 0, 0, 9, 0x88, 0xb5], &[seed; 50]].concat()
}

/// A packet socket on an interface.
fn packet_socket(netns: &OwnedFd, name: &str) -> OwnedFd {
    const ETH_P_ALL: u16 = 3;
    let name = std::ffi::CString::new(name).unwrap();
    let open = || {
        // SAFETY: socket takes numbers.
        let fd = unsafe {
            libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_NONBLOCK, i32::from(ETH_P_ALL.to_be()))
        };
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        // SAFETY: all zeroes is a valid sockaddr_ll.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = ETH_P_ALL.to_be();
        // SAFETY: the name is a C string.
        address.sll_ifindex = unsafe { libc::if_nametoindex(name.as_ptr()) }.cast_signed();
        let len = size_of::<libc::sockaddr_ll>() as u32;
        // SAFETY: the address lives throughout the call, and `len` is its size.
        assert_eq!(unsafe { libc::bind(fd, (&raw const address).cast(), len) }, 0);
        // SAFETY: the descriptor is new and nobody else's.
        unsafe { OwnedFd::from_raw_fd(fd) }
    };
    in_network_namespace(netns, open).unwrap()
}

fn wait(fd: impl AsFd) {
    let mut fds = [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)];
    let limit = Timespec { tv_sec: 60, tv_nsec: 0 };
    assert!(poll(&mut fds, Some(&limit)).unwrap() > 0, "nothing came");
}

/// Reads until a packet ends as `wanted` does: kernels say things by themselves.
fn until(fd: impl AsFd, wanted: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    loop {
        wait(&fd);
        match rustix::io::read(&fd, &mut bytes) {
            Ok(len) if bytes[..len].ends_with(wanted) => return bytes[..len].to_vec(),
            Ok(_) | Err(rustix::io::Errno::AGAIN) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn a_scan_tells_what_there_is() {
    let Some(pair) = Pair::new("a_scan_tells_what_there_is") else { return };
    pair.near(&[
        "ip addr add 10.1.0.2/16 brd + dev eth0",
        "ip addr add 10.9.0.1 peer 10.9.0.2/32 dev eth0",
        "ip addr add fd00::2/64 dev eth0 nodad noprefixroute",
        "ip route add default via 10.1.0.1",
        "ip route add 10.2.0.0/16 dev eth0 table 77 metric 5 src 10.1.0.2",
        "ip route add 192.0.2.0/24 via 169.254.1.1 dev eth0 onlink mtu 1300",
        "ip route add 198.51.100.0/24 nexthop via 10.1.0.1 dev eth0 weight 2 nexthop via 10.1.0.7 dev eth0",
        "ip route add blackhole 203.0.113.0/24",
        "ip route add fd00::1 dev eth0",
        "ip -6 route add default via fd00::1 dev eth0",
        "ip route add 10.3.0.0/16 dev lo",
        "ip rule add from 10.1.0.0/24 to 10.2.0.0/16 fwmark 0x1/0xff priority 100 table 77",
        "ip -6 rule add not iif eth0 priority 200 table 1078",
        "ip neigh add 10.1.0.1 lladdr 02:00:00:00:00:02 dev eth0 nud permanent",
        "ip neigh add fd00::1 lladdr 02:00:00:00:00:02 dev eth0 nud permanent",
        "ip neigh add 10.1.0.9 lladdr 02:00:00:00:00:03 dev eth0 nud reachable",
    ]);
    let scan = Scan::of(&pair.near).unwrap();
    let [eth0] = &scan.interfaces[..] else { panic!("{:?}", scan.interfaces) };
    assert_eq!((&*eth0.name, &*eth0.kind, eth0.mac, eth0.mtu), ("eth0", "veth", Some([2, 0, 0, 0, 0, 1]), 1400));
    assert!(eth0.up && eth0.ipv6);
    let ip = |text: &str| text.parse::<IpAddr>().unwrap();
    let addresses: Vec<_> = eth0.addresses.iter().filter(|address| address.scope == 0).collect();
    let told: Vec<_> = addresses.iter().map(|address| (address.ip, address.prefix, address.no_prefix_route)).collect();
    assert_eq!(told, [(ip("10.1.0.2"), 16, false), (ip("10.9.0.1"), 32, false), (ip("fd00::2"), 64, true)]);
    assert_eq!(addresses[0].broadcast, Some("10.1.255.255".parse().unwrap()));
    assert_eq!((addresses[0].peer, addresses[1].peer), (None, Some(ip("10.9.0.2"))));

    let text = |route: &katavm_runtime::network::Route| {
        let to = route.destination.map_or("default".into(), |ip| ip.to_string());
        let hops: Vec<_> = route
            .hops
            .iter()
            .map(|hop| {
                assert_eq!(hop.interface, eth0.index);
                format!(
                    "{}{}*{}",
                    hop.gateway.map_or("link".into(), |ip| ip.to_string()),
                    if hop.onlink { "!" } else { "" },
                    hop.weight
                )
            })
            .collect();
        format!(
            "{to}/{} {} [{}] kind {} metric {}",
            route.prefix,
            route.table,
            hops.join(" "),
            route.kind,
            route.metric
        )
    };
    let mut routes: Vec<String> = scan.routes.iter().map(text).collect();
    let with_gateway = |route: &String| route.contains("[10.") || route.contains("[169") || route.contains("[fd00");
    let first_gateway = routes.iter().position(with_gateway).unwrap();
    assert!(
        routes[first_gateway..].iter().all(with_gateway),
        "routers come after what they are reached by: {routes:?}"
    );
    routes.sort();
    let expected = [
        "10.2.0.0/16 77 [link*1] kind 1 metric 5",
        "192.0.2.0/24 254 [169.254.1.1!*1] kind 1 metric 0",
        "198.51.100.0/24 254 [10.1.0.1*2 10.1.0.7*1] kind 1 metric 0",
        "203.0.113.0/24 254 [] kind 6 metric 0",
        "default/0 254 [10.1.0.1*1] kind 1 metric 0",
        "default/0 254 [fd00::1*1] kind 1 metric 1024",
        "fd00::1/128 254 [link*1] kind 1 metric 1024",
    ];
    assert_eq!(routes, expected);
    let of = |to: &str| scan.routes.iter().find(|route| route.destination == Some(ip(to))).unwrap();
    assert_eq!((of("10.2.0.0").source, of("192.0.2.0").mtu), (Some(ip("10.1.0.2")), Some(1300)));

    let mut neighbours: Vec<_> = scan.neighbours.iter().map(|neighbour| neighbour.ip).collect();
    neighbours.sort();
    assert_eq!(neighbours, [ip("10.1.0.1"), ip("fd00::1")]);
    assert!(scan.neighbours.iter().all(|neighbour| neighbour.mac == [2, 0, 0, 0, 0, 2]));

    let [first, second] = &scan.rules[..] else { panic!("{:?}", scan.rules) };
    assert_eq!((first.ipv6, first.priority, first.action, first.table, first.invert), (false, 100, 1, 77, false));
    assert_eq!((first.source, first.destination), (Some((ip("10.1.0.0"), 24)), Some((ip("10.2.0.0"), 16))));
    assert_eq!((first.mark, &*first.incoming), ((1, 0xff), ""));
    assert_eq!((second.ipv6, second.priority, second.table, second.invert), (true, 200, 1078, true));
    assert_eq!((second.source, &*second.incoming, &*second.outgoing), (None, "eth0", ""));

    let request = scan.request(&[(eth0.index, [2, 9, 9, 9, 9, 9])]);
    assert_eq!((request.interfaces.len(), request.routes.len(), request.neighbours.len()), (1, 7, 2));
    assert_eq!(request.rules.len(), 2);
    assert_eq!(request.interfaces[0].device_mac, [2, 9, 9, 9, 9, 9]);
    let nothing = scan.request(&[]);
    let kinds: Vec<_> = nothing.routes.iter().map(|route| route.kind).collect();
    assert!(nothing.interfaces.is_empty() && nothing.neighbours.is_empty() && kinds == [6], "{nothing:?}");
}

#[test]
fn ipv6_may_be_off() {
    let Some(pair) = Pair::new("ipv6_may_be_off") else { return };
    let off = || std::fs::write("/proc/sys/net/ipv6/conf/eth0/disable_ipv6", "1");
    in_network_namespace(&pair.near, off).unwrap().unwrap();
    assert!(!Scan::of(&pair.near).unwrap().interfaces[0].ipv6);
}

#[test]
fn a_plugged_interface_passes_packets_and_is_left_as_it_was() {
    let Some(pair) = Pair::new("a_plugged_interface_passes_packets_and_is_left_as_it_was") else { return };
    pair.near(&["ip addr add 10.1.0.2/16 dev eth0", "ip route add default via 10.1.0.1"]);
    let before = pair.state();
    let plugged = pair.plug();
    pair.assert_passes(&plugged);
    let tap = run(&pair.near, "ip -o link show katavm0").unwrap();
    assert!(tap.contains("mtu 1400") && tap.contains(",UP"), "{tap}");
    let names: Vec<_> = Scan::of(&pair.near).unwrap().interfaces.into_iter().map(|found| found.name).collect();
    assert_eq!(names, ["eth0"], "the tap is nothing for a guest");
    assert!(run(&pair.near, "ip -o addr show dev eth0").unwrap().contains("10.1.0.2/16"), "addresses stay");
    plugged.unplug().unwrap();
    assert_eq!(pair.state(), before);
}

#[test]
fn what_a_killed_sandbox_left_is_replaced() {
    let Some(pair) = Pair::new("what_a_killed_sandbox_left_is_replaced") else { return };
    let before = pair.state();
    for _ in 0..3 {
        drop(pair.plug());
        assert_ne!(pair.state(), before, "the redirection is still there");
    }
    let plugged = pair.plug();
    pair.assert_passes(&plugged);
    plugged.unplug().unwrap();
    assert_eq!(pair.state(), before);
}

#[test]
fn filters_of_others_stay() {
    let Some(pair) = Pair::new("filters_of_others_stay") else { return };
    pair.near(&[
        "tc qdisc add dev eth0 clsact",
        "tc filter add dev eth0 ingress prio 200 protocol ip u32 match ip dst 192.0.2.77 action mirred egress redirect dev lo",
    ]);
    let before = pair.state();
    drop(pair.plug());
    let plugged = pair.plug();
    pair.assert_passes(&plugged);
    plugged.unplug().unwrap();
    assert_eq!(pair.state(), before);
}

#[test]
fn a_shared_interface_leaves_the_namespaces_own_answers_to_it() {
    let Some(pair) = Pair::new("a_shared_interface_leaves_the_namespaces_own_answers_to_it") else { return };
    pair.near(&["ip addr add 10.1.0.2/16 dev eth0"]);
    run(&pair.far, "ip addr add 10.1.0.1/16 dev far").unwrap();
    let before = pair.state();
    // What a killed sandbox has left is replaced here as well.
    let mut left = pair.plug();
    left.share().unwrap();
    drop(left);
    let mut plugged = pair.plug();
    plugged.share().unwrap();
    plugged.share().unwrap();
    let tap = plugged.taps().unwrap().remove(0);
    let server = in_network_namespace(&pair.far, || UdpSocket::bind("10.1.0.1:53")).unwrap().unwrap();
    server.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let ask = |port: u16| {
        let open = || UdpSocket::bind(("10.1.0.2", port));
        let asking = in_network_namespace(&pair.near, open).unwrap().unwrap();
        asking.send_to(b"who", "10.1.0.1:53").unwrap();
        let mut query = [0; 8];
        let (len, from) = server.recv_from(&mut query).unwrap();
        assert_eq!((&query[..len], from.port()), (&b"who"[..], port));
        server.send_to(b"me", from).unwrap();
        asking.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        asking
    };
    // Its neighbour is found, and the answer comes back.
    let own = ask(0xfe42);
    let mut answer = [0; 8];
    let (len, _) = own.recv_from(&mut answer).unwrap();
    assert_eq!(&answer[..len], b"me");
    // That to any other port goes to the guest, as everything else.
    let other = ask(40_000);
    until(&tap, b"me");
    other.set_nonblocking(true).unwrap();
    assert_eq!(other.recv(&mut answer).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    drop(tap);
    pair.assert_passes(&plugged);
    plugged.unplug().unwrap();
    pair.near(&["ip neigh flush all"]);
    assert_eq!(pair.state(), before);
}

#[test]
fn what_listens_in_the_namespace_can_be_connected_to_there_only() {
    let Some(pair) = Pair::new("what_listens_in_the_namespace_can_be_connected_to_there_only") else { return };
    let here = |ip: &str, port| Listening { ip: ip.parse().unwrap(), port, v6_only: false };
    let wanted = [here("0.0.0.0", 80), here("::", 81), here("127.0.0.1", 80), here("192.0.2.9", 82)];
    let opened = listen_in(&pair.near, &wanted).unwrap();
    let outcomes: Vec<_> = opened.iter().map(|one| one.as_ref().err().map(io::Error::kind)).collect();
    use io::ErrorKind::{AddrInUse, AddrNotAvailable};
    assert_eq!(outcomes, [None, None, Some(AddrInUse), Some(AddrNotAvailable)]);
    let connect = |netns, port| {
        in_network_namespace(netns, || TcpStream::connect(("127.0.0.1", port))).unwrap().map(drop).is_ok()
    };
    assert!(connect(&pair.near, 80) && connect(&pair.near, 81));
    assert!(!connect(&pair.near, 82) && !connect(&pair.far, 80));
}

#[test]
fn an_engines_name_server_is_found() {
    let Some(pair) = Pair::new("an_engines_name_server_is_found") else { return };
    assert_eq!(Scan::of(&pair.near).unwrap().name_servers, [] as [std::net::Ipv4Addr; 0]);
    let server = in_network_namespace(&pair.near, || UdpSocket::bind("127.0.0.11:0")).unwrap().unwrap();
    let found = Scan::of(&pair.near).unwrap();
    assert_eq!(found.name_servers, [std::net::Ipv4Addr::new(127, 0, 0, 11)]);
    assert_eq!(found.request(&[]).name_servers, [vec![127, 0, 0, 11]]);
    drop(server);
}

#[test]
fn a_namespace_that_lost_its_interface_is_unplugged_all_the_same() {
    let Some(pair) = Pair::new("a_namespace_that_lost_its_interface_is_unplugged_all_the_same") else { return };
    let plugged = pair.plug();
    pair.near(&["ip link del eth0"]);
    plugged.unplug().unwrap();
    let scan = Scan::of(&pair.near).unwrap();
    assert_eq!(scan.interfaces, []);
}

#[test]
fn a_failed_plug_leaves_nothing() {
    let Some(pair) = Pair::new("a_failed_plug_leaves_nothing") else { return };
    let before = pair.state();
    let scan = Scan::of(&pair.near).unwrap();
    let mut ghost = scan.interfaces[0].clone();
    ghost.index = 4711;
    let error = plug(&pair.near, &ghost, 1).unwrap_err().to_string();
    assert!(error.starts_with("cannot redirect eth0"), "{error}");
    ghost.mac = None;
    assert!(matches!(plug(&pair.near, &ghost, 1), Err(NetworkError::NoEthernet(_))));
    assert_eq!(pair.state(), before);
}

#[test]
fn no_thread_of_the_process_changes_its_namespace() {
    let Some(pair) = Pair::new("no_thread_of_the_process_changes_its_namespace") else { return };
    let here = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
    let inside = in_network_namespace(&pair.near, || std::fs::read_link("/proc/thread-self/ns/net")).unwrap().unwrap();
    assert_ne!(inside, here);
    let plugged = pair.plug();
    assert_eq!(std::fs::read_link("/proc/thread-self/ns/net").unwrap(), here);
    plugged.unplug().unwrap();
    // A panic in there ends the thread as well.
    let near = &pair.near;
    let panicked = std::panic::catch_unwind(|| in_network_namespace(near, || panic!("on purpose")));
    assert!(panicked.is_err());
    assert_eq!(std::fs::read_link("/proc/thread-self/ns/net").unwrap(), here);
}

#[test]
fn changes_are_heard_of() {
    let Some(pair) = Pair::new("changes_are_heard_of") else { return };
    let watch = Watch::new(&pair.near).unwrap();
    let mut last = Scan::of(&pair.near).unwrap();
    for line in [
        "ip addr add 10.1.0.2/16 dev eth0",
        "ip route add default via 10.1.0.1",
        "ip neigh add 10.1.0.1 lladdr 02:00:00:00:00:02 dev eth0 nud permanent",
        "ip link add eth1 type veth peer name eth2",
        "ip link set eth0 mtu 1300",
    ] {
        pair.near(&[line]);
        let changed = loop {
            wait(&watch);
            assert!(watch.take_news().unwrap());
            let scan = Scan::of(&pair.near).unwrap();
            if scan != last {
                break scan;
            }
        };
        last = changed;
    }
    let names: Vec<_> = last.interfaces.iter().map(|interface| &*interface.name).collect();
    assert_eq!((names, last.interfaces[0].mtu), (vec!["eth0", "eth2", "eth1"], 1300));
    // What was heard of is forgotten.
    while watch.take_news().unwrap() {}
    assert!(!watch.take_news().unwrap());
}
