//! A network for whoever has no right over any on the host: passt(1) carries what the guest sends to sockets of the host.
//!
//! It is a process of the same user, confined by itself (namespaces of its own, no file system, a seccomp filter), that
//! knows the guest by one end of a socket, whose other end is the guest's network device. It ends with that socket: so with
//! the sandbox process, however that ends.

use std::fmt;
use std::fs::Permissions;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU16;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;
use std::time::Duration;

use katavm_devices::net::{Net, NetConfig, NetError, NetLimits, Offloads, Stream};
use katavm_protocol::agent::ConfigureNetworkRequest;

use super::{Address, Hop, Interface, Route, Scan, random_mac};
use crate::host;

const PROGRAM: &str = "passt";
/// The guest's address, its router's and its name server's: a network that has no other use.
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const ROUTER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// At which the host's name server is asked.
const NAMES: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
const PREFIX: u8 = 24;
/// The same in a network of RFC 4193.
const GUEST6: Ipv6Addr = Ipv6Addr::new(0xfd6b, 0x6174, 0x6176, 0x6d00, 0, 0, 0, 0x15);
const ROUTER6: Ipv6Addr = Ipv6Addr::new(0xfd6b, 0x6174, 0x6176, 0x6d00, 0, 0, 0, 2);
const PREFIX6: u8 = 64;
/// The most that passt takes: the longer packets are, the fewer they are.
const MTU: u16 = 65520;
/// The name in the guest.
const INTERFACE: &str = "eth0";
/// Where passt writes down its process id.
const PID_FILE: &str = "passt.pid";
/// How long it may take to end.
const PATIENCE: Duration = Duration::from_secs(2);

/// Why a guest has no such network.
#[derive(Debug, thiserror::Error)]
pub enum UserNetworkError {
    /// Not installed.
    #[error("--net=user needs the program passt (Debian's package passt), and there is none in PATH")]
    Missing,
    /// It did not start.
    #[error("cannot start passt: {0}")]
    Start(#[source] io::Error),
    /// It refused.
    #[error("passt gave up: {0}")]
    GaveUp(String),
    /// The guest's device.
    #[error("cannot make the guest's network device: {0}")]
    Device(#[from] NetError),
}

/// A port of the host that leads to one of the guest: `[IP:]HOST:GUEST[/tcp|/udp]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortForward {
    /// At this address of the host only.
    pub address: Option<IpAddr>,
    /// The host's.
    pub host: NonZeroU16,
    /// The guest's.
    pub guest: NonZeroU16,
    /// UDP, not TCP.
    pub udp: bool,
}

/// Why a text is no such port.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "write HOST:GUEST as 8080:80, with an address of the host as 127.0.0.1:8080:80 or [::1]:8080:80, UDP as 53:53/udp"
)]
pub struct PortForwardError;

impl FromStr for PortForward {
    type Err = PortForwardError;

    fn from_str(text: &str) -> Result<Self, PortForwardError> {
        let (ports, udp) = match text.rsplit_once('/') {
            None => (text, false),
            Some((ports, "tcp")) => (ports, false),
            Some((ports, "udp")) => (ports, true),
            Some(_) => return Err(PortForwardError),
        };
        let (rest, guest) = ports.rsplit_once(':').ok_or(PortForwardError)?;
        let (address, host) = match rest.rsplit_once(':') {
            None => (None, rest),
            Some((address, host)) => {
                let v6 = address.strip_prefix('[').and_then(|address| address.strip_suffix(']'));
                let address = match v6 {
                    Some(v6) => v6.parse().map(IpAddr::V6),
                    None => address.parse().map(IpAddr::V4),
                };
                (Some(address.map_err(|_| PortForwardError)?), host)
            }
        };
        let number = |text: &str| text.parse().map_err(|_| PortForwardError);
        Ok(Self { address, host: number(host)?, guest: number(guest)?, udp })
    }
}

impl fmt::Display for PortForward {
    /// As passt has it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(address) = self.address {
            write!(f, "{address}/")?;
        }
        write!(f, "{}:{}", self.host, self.guest)
    }
}

/// A passt that serves one guest; it ends with this.
#[derive(Debug)]
pub struct UserNetwork {
    pid: u32,
    mac: [u8; 6],
    ipv6: bool,
}

impl UserNetwork {
    /// Starts it, with a note in `directory`, and makes the guest's device.
    ///
    /// # Errors
    /// Any [`UserNetworkError`]: also when a port of the host is taken, or the user may not have it.
    pub fn start(ports: &[PortForward], directory: &Path) -> Result<(Self, Net), UserNetworkError> {
        let (ours, theirs) = UnixStream::pair().map_err(UserNetworkError::Start)?;
        let ipv6 = host::has_ipv6_route();
        let note = directory.join(PID_FILE);
        let mut command = Command::new(PROGRAM);
        command.args(arguments(ports, ipv6)).arg("--pid").arg(&note);
        // It goes into the background once everything is settled.
        let done =
            host::run_with_descriptor(&mut command, "--fd", theirs.into()).map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => UserNetworkError::Missing,
                _ => UserNetworkError::Start(error),
            })?;
        if !done.status.success() {
            return Err(UserNetworkError::GaveUp(reason(&done.stderr)));
        }
        let pid = std::fs::read_to_string(&note).map_err(UserNetworkError::Start)?;
        let pid = pid.trim().parse().map_err(|_| UserNetworkError::GaveUp(format!("its process id is {pid:?}")))?;
        let mac = random_mac().map_err(UserNetworkError::Start)?;
        let this = Self { pid, mac, ipv6 };
        // Nobody but the sender can finish packets here, so nothing is offered.
        let mut net = Net::new(NetConfig {
            mac,
            mtu: Some(MTU),
            offloads: Offloads::empty(),
            pairs: 1,
            limits: NetLimits::default(),
        })?;
        let stream = Stream::new(ours).map_err(UserNetworkError::Start)?;
        net.attach(stream).map_err(UserNetworkError::Start)?;
        Ok((this, net))
    }

    /// Writes down for the container where names are asked; the file.
    ///
    /// # Errors
    /// Those of writing it.
    pub fn name_servers(directory: &Path) -> io::Result<PathBuf> {
        let file = directory.join("resolv.conf");
        std::fs::write(&file, format!("nameserver {NAMES}\n"))?;
        // Whoever the container's processes are.
        std::fs::set_permissions(&file, Permissions::from_mode(0o644))?;
        Ok(file)
    }

    /// What the agent is to set up.
    #[must_use]
    pub fn request(&self) -> ConfigureNetworkRequest {
        request(self.mac, self.ipv6)
    }
}

impl Drop for UserNetwork {
    /// It keeps nothing that is worth waiting for.
    fn drop(&mut self) {
        let ended = host::kill_program(self.pid, PROGRAM).and_then(|()| host::wait_for_end(self.pid, PATIENCE));
        if !ended.as_ref().is_ok_and(|ended| *ended) {
            log::warn!("passt (process {}) does not end: {ended:?}", self.pid);
        }
    }
}

/// What it is started with. The router's address is no way to the host's own loopback.
fn arguments(ports: &[PortForward], ipv6: bool) -> Vec<String> {
    let mut all: Vec<String> = ["--quiet", "--no-map-gw", "--no-dhcp"].map(Into::into).into();
    let mut option = |name: &str, value: &dyn fmt::Display| all.extend([name.to_owned(), value.to_string()]);
    option("--mtu", &MTU);
    option("--address", &GUEST);
    option("--netmask", &PREFIX);
    option("--gateway", &ROUTER);
    option("--dns-forward", &NAMES);
    if ipv6 {
        option("--address", &GUEST6);
        option("--gateway", &ROUTER6);
    }
    for port in ports {
        option(if port.udp { "--udp-ports" } else { "--tcp-ports" }, port);
    }
    if !ipv6 {
        all.push("--ipv4-only".into());
    }
    all
}

/// The last of what it says tells why.
fn reason(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let said: Vec<_> =
        text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.contains("syslog")).collect();
    said[said.len().saturating_sub(3)..].join("; ")
}

fn request(mac: [u8; 6], ipv6: bool) -> ConfigureNetworkRequest {
    const INDEX: u32 = 1;
    let address =
        |ip: IpAddr, prefix| Address { ip, prefix, broadcast: None, peer: None, scope: 0, no_prefix_route: false };
    let default = |router: IpAddr| Route {
        ipv6: router.is_ipv6(),
        destination: None,
        prefix: 0,
        // RT_TABLE_MAIN, RTN_UNICAST, RT_SCOPE_UNIVERSE, RTPROT_STATIC.
        table: 254,
        kind: 1,
        scope: 0,
        protocol: 4,
        tos: 0,
        metric: 0,
        source: None,
        mtu: None,
        hops: vec![Hop { interface: INDEX, gateway: Some(router), onlink: false, weight: 1 }],
    };
    let mut addresses = vec![address(GUEST.into(), PREFIX)];
    let mut routes = vec![default(ROUTER.into())];
    if ipv6 {
        addresses.push(address(GUEST6.into(), PREFIX6));
        routes.push(default(ROUTER6.into()));
    }
    let interface = Interface {
        index: INDEX,
        name: INTERFACE.into(),
        kind: String::new(),
        mac: Some(mac),
        mtu: MTU.into(),
        up: true,
        carrier: true,
        ipv6,
        addresses,
    };
    Scan { interfaces: vec![interface], routes, ..Default::default() }.request(&[(INDEX, mac)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read_and_told_to_passt() {
        for (text, told, udp) in [
            ("8080:80", "8080:80", false),
            ("127.0.0.1:8080:80/tcp", "127.0.0.1/8080:80", false),
            ("[::1]:53:5353/udp", "::1/53:5353", true),
        ] {
            let port: PortForward = text.parse().unwrap();
            assert_eq!((port.to_string().as_str(), port.udp), (told, udp));
        }
        for text in
            ["", "80", "0:80", "80:0", "1:65536", "a:1", "x:1:2", "::1:1:2", "[1.2.3.4]:1:2", "1:2/sctp", "1-3:1-3"]
        {
            assert_eq!(text.parse::<PortForward>(), Err(PortForwardError), "{text}");
        }
    }

    #[test]
    fn the_guest_gets_an_address_and_a_router_of_each_kind() {
        let mac = [2, 0, 0, 0, 0, 1];
        let both = request(mac, true);
        assert_eq!((both.interfaces[0].addresses.len(), both.routes.len()), (2, 2));
        let one = request(mac, false);
        assert_eq!((one.interfaces[0].addresses.len(), one.routes.len()), (1, 1));
        assert!(!one.interfaces[0].ipv6 && one.interfaces[0].device_mac == mac);
        assert!(arguments(&[], false).contains(&"--ipv4-only".to_owned()));
        let ports = ["80:80".parse().unwrap(), "53:53/udp".parse().unwrap()];
        let all = arguments(&ports, true).join(" ");
        assert!(all.ends_with("--tcp-ports 80:80 --udp-ports 53:53") && all.contains("--no-map-gw"), "{all}");
    }

    #[test]
    fn the_end_of_what_passt_says_is_the_reason() {
        let said =
            b"Failed to send 47 bytes to syslog\nDon't run as root\n\nFailed to bind port 80 (Permission denied)\n";
        assert_eq!(reason(said), "Don't run as root; Failed to bind port 80 (Permission denied)");
        assert_eq!(reason(b""), "");
    }
}
