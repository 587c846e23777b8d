//! Name servers at loopback addresses of a network namespace, where an engine has put them.
//!
//! dockerd does so in networks that users make: a socket of its own in the namespace, at 127.0.0.11, and rules there that
//! lead port 53 to it. A socket of the namespace is the engine's, as the containers' are in the guest.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::time::Duration;

use katavm_protocol::names::PORT;

use super::NetworkError;
use crate::host::{in_network_namespace, network_table};

/// So many at most.
const MOST: usize = 4;
/// How long a server may take to accept a connection.
const PATIENCE: Duration = Duration::from_secs(5);

/// The loopback addresses, other than everybody's, at which a UDP socket of the calling thread's namespace is.
pub(super) fn here() -> Vec<Ipv4Addr> {
    let table = network_table("udp").unwrap_or_else(|error| {
        log::warn!("cannot look for name servers in the network namespace: {error}");
        String::new()
    });
    addresses(&table)
}

/// Of /proc/net/udp: a heading, then lines whose second word is an address, as a number of this machine, and a port.
fn addresses(table: &str) -> Vec<Ipv4Addr> {
    let address = |line: &str| {
        let (ip, _) = line.split_whitespace().nth(1)?.split_once(':')?;
        Some(Ipv4Addr::from(u32::from_str_radix(ip, 16).ok()?.to_ne_bytes()))
    };
    let named = |ip: &Ipv4Addr| ip.is_loopback() && *ip != Ipv4Addr::LOCALHOST;
    let mut all: Vec<_> = table.lines().skip(1).filter_map(address).filter(named).collect();
    all.sort_unstable();
    all.dedup();
    all.truncate(MOST);
    all
}

/// A socket in the namespace that speaks to a name server there, and does not block.
///
/// # Errors
/// When the namespace cannot be entered, or nobody is there.
pub fn name_server(netns: impl AsFd, server: Ipv4Addr) -> Result<UdpSocket, NetworkError> {
    let open = || {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.connect((server, PORT))?;
        socket.set_nonblocking(true)?;
        Ok::<_, io::Error>(socket)
    };
    in_network_namespace(netns, open).map_err(NetworkError::Enter)?.map_err(NetworkError::NameServer)
}

/// The same over TCP.
///
/// # Errors
/// As [`name_server`].
pub fn name_server_by_tcp(netns: impl AsFd, server: Ipv4Addr) -> Result<TcpStream, NetworkError> {
    let open = || {
        let stream = TcpStream::connect_timeout(&SocketAddr::from((server, PORT)), PATIENCE)?;
        stream.set_nonblocking(true)?;
        Ok::<_, io::Error>(stream)
    };
    in_network_namespace(netns, open).map_err(NetworkError::Enter)?.map_err(NetworkError::NameServer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines_sockets_at_loopback_addresses_are_name_servers() {
        let number = |ip: &str| format!("{:08X}", u32::from_ne_bytes(ip.parse::<Ipv4Addr>().unwrap().octets()));
        let line = |ip: &str| format!("  17: {}:9A1B 00000000:0000 07 00000000:00000000 00:00000000\n", number(ip));
        let table: String = ["127.0.0.11", "0.0.0.0", "127.0.0.1", "127.0.0.11", "10.0.0.2", "127.0.0.9"]
            .map(line)
            .into_iter()
            .collect();
        let heading = "  sl  local_address rem_address   st tx_queue rx_queue tr\n";
        let found: Vec<_> = addresses(&format!("{heading}{table}")).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["127.0.0.9", "127.0.0.11"]);
        assert!(addresses("").is_empty() && addresses("x\ny\n1: zz:1\n").is_empty());
    }
}
