//! The agent's network configuration, in a network namespace that the test has to itself. Takes root and `ip`.

use std::io::{self, Write as _};
use std::process::Command;

use katavm_agent::network::configure;
use katavm_protocol::agent::{Address, ConfigureNetworkRequest, Hop, Interface, Neighbour, Route, Rule};

const DEVICE: [u8; 6] = [2, 0, 0, 0, 0, 7];

/// Runs `test` on a thread in a namespace of its own with an interface, or says why it cannot.
fn in_namespace(name: &str, test: fn()) {
    let run = move || {
        // SAFETY: unshare takes no memory; only this thread, which ends with the test, changes its namespace.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            return Err(format!("no network namespace can be made: {}", io::Error::last_os_error()));
        }
        for line in ["link add v0 type veth peer name v1", "link set v0 address 02:00:00:00:00:07", "link set v1 up"] {
            let done = Command::new("ip").args(line.split(' ')).output().map_err(|error| format!("ip: {error}"))?;
            if !done.status.success() {
                return Err(format!("ip {line}: {}", String::from_utf8_lossy(&done.stderr)));
            }
        }
        test();
        Ok(())
    };
    if let Err(why) = std::thread::spawn(run).join().unwrap() {
        // Past the harness' capture, so that it is seen.
        let _ = writeln!(io::stderr(), "SKIPPED {name}: {why}");
    }
}

fn ip(arguments: &str) -> String {
    let done = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(done.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8_lossy(&done.stdout).split_whitespace().collect::<Vec<_>>().join(" ")
}

fn v4(text: &str) -> Vec<u8> {
    text.parse::<std::net::Ipv4Addr>().unwrap().octets().to_vec()
}

fn v6(text: &str) -> Vec<u8> {
    text.parse::<std::net::Ipv6Addr>().unwrap().octets().to_vec()
}

fn address(ip: Vec<u8>, prefix: u32) -> Address {
    Address { ip, prefix, ..Default::default() }
}

fn route(ip_version: u32, destination: Vec<u8>, prefix: u32, gateway: Vec<u8>) -> Route {
    let hop = Hop { interface: "eth0".into(), gateway, weight: 1, ..Default::default() };
    Route { ip_version, destination, prefix, table: 254, kind: 1, protocol: 3, hops: vec![hop], ..Default::default() }
}

fn request() -> ConfigureNetworkRequest {
    let interface = Interface {
        device_mac: DEVICE.to_vec(),
        name: "eth0".into(),
        mac: vec![2, 0, 0, 0, 0, 8],
        mtu: 1400,
        addresses: vec![
            Address { broadcast: v4("10.1.255.255"), ..address(v4("10.1.0.2"), 16) },
            Address { no_prefix_route: true, ..address(v4("10.5.0.2"), 16) },
            Address { peer: v4("10.9.0.2"), ..address(v4("10.9.0.1"), 32) },
            address(v6("fd00::2"), 64),
        ],
        up: true,
        ipv6: true,
        ..Default::default()
    };
    let mut onlink = route(4, v4("192.0.2.0"), 24, v4("169.254.1.1"));
    onlink.hops[0].onlink = true;
    onlink.mtu = 1300;
    let mut spread = route(4, v4("198.51.100.0"), 24, v4("10.1.0.1"));
    spread.hops.push(Hop { gateway: v4("10.1.0.7"), weight: 3, ..spread.hops[0].clone() });
    let elsewhere =
        Route { table: 1077, metric: 5, scope: 253, source: v4("10.1.0.2"), ..route(4, v4("10.2.0.0"), 16, vec![]) };
    let nowhere = Route { kind: 6, hops: vec![], ..route(4, v4("203.0.113.0"), 24, vec![]) };
    let neighbour = |ip| Neighbour { interface: "eth0".into(), ip, mac: vec![2, 0, 0, 0, 0, 9], ..Default::default() };
    let from = Rule {
        ip_version: 4,
        priority: 100,
        action: 1,
        table: 1077,
        source: v4("10.1.0.2"),
        source_prefix: 32,
        ..Default::default()
    };
    let others = Rule {
        ip_version: 6,
        priority: 200,
        action: 8,
        invert: true,
        destination: v6("fd00::"),
        destination_prefix: 8,
        mark: 0x10,
        mark_mask: 0xf0,
        incoming: "eth0".into(),
        ..Default::default()
    };
    ConfigureNetworkRequest {
        rules: vec![from, others],
        interfaces: vec![interface],
        routes: vec![
            elsewhere,
            nowhere,
            route(6, v6("fd01::"), 64, vec![]),
            route(4, vec![], 0, v4("10.1.0.1")),
            onlink,
            spread,
            route(4, v4("100.64.0.0"), 16, v6("fd00::1")),
            Route { metric: 1024, ..route(6, vec![], 0, v6("fd00::1")) },
        ],
        neighbours: vec![neighbour(v4("10.1.0.1")), neighbour(v6("fd00::1"))],
        ..Default::default()
    }
}

fn state() -> String {
    // Without what comes and goes by itself.
    [
        "-o -4 addr show dev eth0",
        "-o -6 addr show dev eth0 scope global",
        "route show table all proto boot",
        "-6 route show table all proto boot",
        "neigh show nud permanent",
        "rule",
        "-6 rule",
    ]
    .map(ip)
    .join("\n")
}

fn all_of_it() {
    configure(&request()).unwrap();
    let link = ip("-o link show eth0");
    assert!(link.contains("mtu 1400") && link.contains("02:00:00:00:00:08") && link.contains(",UP"), "{link}");
    let addresses = ip("-o addr show dev eth0");
    for words in [
        "inet 10.1.0.2/16 brd 10.1.255.255 scope global eth0",
        "inet 10.5.0.2/16 scope global noprefixroute eth0",
        "inet 10.9.0.1 peer 10.9.0.2/32 scope global eth0",
        "inet6 fd00::2/64 scope global nodad",
    ] {
        assert!(addresses.contains(words), "{words:?} is not in {addresses}");
    }
    let routes = ip("route show table all");
    for words in [
        "default via 10.1.0.1 dev eth0",
        "10.2.0.0/16 dev eth0 table 1077 scope link src 10.1.0.2 metric 5",
        "192.0.2.0/24 via 169.254.1.1 dev eth0 onlink mtu 1300",
        "nexthop via 10.1.0.1 dev eth0 weight 1 nexthop via 10.1.0.7 dev eth0 weight 3",
        "blackhole 203.0.113.0/24",
        "100.64.0.0/16 via inet6 fd00::1 dev eth0",
        "10.1.0.0/16 dev eth0 proto kernel",
    ] {
        assert!(routes.contains(words), "{words:?} is not in {routes}");
    }
    assert!(!routes.contains("10.5.0.0/16"), "{routes}");
    let routes = ip("-6 route show");
    assert!(routes.contains("default via fd00::1 dev eth0 metric 1024"), "{routes}");
    assert!(routes.contains("fd01::/64 dev eth0"), "{routes}");
    let rules = ip("rule") + &ip("-6 rule");
    assert!(rules.contains("100: from 10.1.0.2 lookup 1077"), "{rules}");
    assert!(rules.contains("200: not from all to fd00::/8 fwmark 0x10/0xf0 iif eth0 prohibit"), "{rules}");
    let neighbours = ip("neigh show nud permanent");
    assert!(neighbours.contains("10.1.0.1 dev eth0 lladdr 02:00:00:00:00:09 PERMANENT"), "{neighbours}");
    assert!(neighbours.contains("fd00::1 dev eth0 lladdr 02:00:00:00:00:09 PERMANENT"), "{neighbours}");
}

#[test]
fn everything_is_as_it_was_asked_for() {
    in_namespace("everything_is_as_it_was_asked_for", all_of_it);
}

/// This kind of interface has no permanent address, so it is found by its current one.
fn again(change: impl Fn(&mut ConfigureNetworkRequest)) {
    let mut request = request();
    request.interfaces[0].mac = DEVICE.to_vec();
    configure(&request).unwrap();
    change(&mut request);
    configure(&request).unwrap();
    let once = state();
    configure(&request).unwrap();
    assert_eq!(state(), once);
}

#[test]
fn the_same_again_changes_nothing() {
    in_namespace("the_same_again_changes_nothing", || again(|_| ()));
}

fn something_else() {
    again(|request| {
        let interface = &mut request.interfaces[0];
        interface.mtu = 1500;
        interface.addresses = vec![address(v4("10.1.0.3"), 16), address(v6("fd00::3"), 64)];
        request.routes = vec![route(4, vec![], 0, v4("10.1.0.254"))];
        request.neighbours[0].mac = vec![2, 0, 0, 0, 0, 0x10];
    });
    let addresses = ip("-o addr show dev eth0 scope global");
    let told: Vec<&str> = addresses.split(' ').filter(|word| word.contains('/')).collect();
    assert_eq!(told, ["10.1.0.3/16", "fd00::3/64"]);
    assert!(ip("route show").contains("default via 10.1.0.254 dev eth0"));
    assert!(ip("neigh show nud permanent").contains("10.1.0.1 dev eth0 lladdr 02:00:00:00:00:10"));
    assert!(ip("-o link show eth0").contains("mtu 1500"));
    // Another one in the same network, before and after.
    let mut both = request();
    both.interfaces[0].mac = DEVICE.to_vec();
    both.interfaces[0].addresses = vec![address(v4("10.1.0.4"), 16), address(v4("10.1.0.3"), 16)];
    both.routes.clear();
    both.neighbours.clear();
    configure(&both).unwrap();
    both.interfaces[0].addresses.reverse();
    both.interfaces[0].addresses.truncate(1);
    configure(&both).unwrap();
    both.interfaces[0].addresses.push(address(v4("10.1.0.5"), 16));
    configure(&both).unwrap();
    let addresses = ip("-o -4 addr show dev eth0");
    let told: Vec<&str> = addresses.split(' ').filter(|word| word.contains('/')).collect();
    assert_eq!(told, ["10.1.0.3/16", "10.1.0.5/16"]);
}

#[test]
fn what_changed_is_changed() {
    in_namespace("what_changed_is_changed", something_else);
}

fn renamed() {
    ip("link add eth0 type veth peer name far");
    ip("link set eth0 up");
    configure(&request()).unwrap();
    let links = ip("-o link show");
    assert!(links.contains("eth0@v1") && links.contains("unused"), "{links}");
}

#[test]
fn a_name_that_is_in_use_is_taken() {
    in_namespace("a_name_that_is_in_use_is_taken", renamed);
}

fn without_ipv6() {
    let mut request = request();
    request.interfaces[0].ipv6 = false;
    request.interfaces[0].addresses.truncate(1);
    request.routes.clear();
    request.neighbours.truncate(1);
    configure(&request).unwrap();
    assert!(!ip("-o addr show dev eth0").contains("inet6"));
}

#[test]
fn ipv6_can_be_off() {
    in_namespace("ipv6_can_be_off", without_ipv6);
}

fn refused() {
    let error = |change: fn(&mut ConfigureNetworkRequest)| {
        let mut request = request();
        change(&mut request);
        configure(&request).unwrap_err().to_string()
    };
    assert_eq!(
        error(|request| request.interfaces[0].device_mac = vec![2, 1, 1, 1, 1, 1]),
        "no network device has the address 02:01:01:01:01:01"
    );
    ip("link set v0 address 02:00:00:00:00:07");
    let text = error(|request| request.routes[0].hops[0].interface = "eth7".into());
    assert_eq!(text, "there is no interface eth7 in the request");
    ip("link set eth0 address 02:00:00:00:00:07");
    let text = error(|request| request.routes = vec![route(4, vec![], 0, v4("172.31.0.1"))]);
    assert!(text.starts_with("cannot add the route default/0 of table 254: Network is unreachable"), "{text}");
    ip("link set eth0 address 02:00:00:00:00:07");
    assert_eq!(error(|request| request.interfaces[0].addresses[0].ip = vec![1]), "[1] is no IP address");
}

#[test]
fn what_cannot_be_done_is_named() {
    in_namespace("what_cannot_be_done_is_named", refused);
}
