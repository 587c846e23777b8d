//! Listening in a network namespace where its guest does.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::AsFd;

use katavm_protocol::agent::Listener;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt};

use super::NetworkError;
use crate::host::in_network_namespace;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// Where a socket listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Listening {
    /// All zero is every address of its version.
    pub ip: IpAddr,
    /// From 1.
    pub port: u16,
    /// An IPv6 socket that IPv4 does not reach.
    pub v6_only: bool,
}

impl Listening {
    /// What the agent tells of; none for what makes no sense, or makes none outside the guest: addresses of one link.
    #[must_use]
    pub fn of(told: &Listener) -> Option<Self> {
        let v4 = <[u8; 4]>::try_from(told.ip.as_slice()).map(IpAddr::from);
        let ip = v4.or_else(|_| <[u8; 16]>::try_from(told.ip.as_slice()).map(IpAddr::from)).ok()?.to_canonical();
        let port = u16::try_from(told.port).ok().filter(|port| *port > 0)?;
        let is_of_link = matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
        (!is_of_link).then_some(Self { ip, port, v6_only: ip.is_ipv6() && told.v6_only })
    }

    fn listen(self) -> io::Result<TcpListener> {
        match self.open() {
            // The namespace may have no IPv6 where the guest has it.
            Err(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL) if self.ip.is_ipv6() && self.ip.is_unspecified() => {
                let ip = Ipv4Addr::UNSPECIFIED.into();
                if self.v6_only { Err(Errno::AFNOSUPPORT.into()) } else { Ok(Self { ip, ..self }.open()?) }
            }
            opened => Ok(opened?),
        }
    }

    fn open(self) -> Result<TcpListener, Errno> {
        let family = if self.ip.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(family, SocketType::STREAM, flags, None)?;
        // Connections of one that was here before may still be ending.
        sockopt::set_socket_reuseaddr(&socket, true)?;
        if self.ip.is_ipv6() {
            sockopt::set_ipv6_v6only(&socket, self.v6_only)?;
        }
        bind(&socket, &SocketAddr::new(self.ip, self.port))?;
        listen(&socket, BACKLOG)?;
        Ok(socket.into())
    }
}

/// Listens in the namespace at each of `wanted`; what has an address that is not there, or is taken, fails by itself.
///
/// # Errors
/// When the namespace cannot be entered.
pub fn listen_in(netns: impl AsFd, wanted: &[Listening]) -> Result<Vec<io::Result<TcpListener>>, NetworkError> {
    let all = || wanted.iter().map(|wanted| wanted.listen()).collect();
    in_network_namespace(netns, all).map_err(NetworkError::Enter)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(ip: &[u8], port: u32, v6_only: bool) -> Option<Listening> {
        Listening::of(&Listener { ip: ip.to_vec(), port, v6_only, ..Default::default() })
    }

    #[test]
    fn only_addresses_that_mean_something_here_are_taken_from_the_guest() {
        let v4 = Listening { ip: [127, 0, 0, 1].into(), port: 80, v6_only: false };
        assert_eq!(told(&[127, 0, 0, 1], 80, true), Some(v4));
        let mapped = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 127, 0, 0, 1];
        assert_eq!(told(&mapped, 80, false), Some(v4));
        assert!(told(&[0; 16], 65535, true).unwrap().v6_only);
        let mut link = [0; 16];
        link[..2].copy_from_slice(&[0xfe, 0x80]);
        for (ip, port) in [(&[0; 4][..], 0), (&[0; 4], 65536), (&[0; 5], 80), (&[], 80), (&link, 80)] {
            assert_eq!(told(ip, port, false), None, "{ip:?} {port}");
        }
    }

    #[test]
    fn what_is_taken_fails_and_what_only_the_other_version_has_does_not() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let here = |ip: [u8; 4]| Listening { ip: ip.into(), port, v6_only: false };
        let errors =
            [here([127, 0, 0, 1]).listen(), here([192, 0, 2, 1]).listen()].map(|done| done.unwrap_err().kind());
        assert_eq!(errors, [io::ErrorKind::AddrInUse, io::ErrorKind::AddrNotAvailable]);
        // Beside it, for IPv6 alone; without IPv6 there is nothing to try.
        let other = Listening { ip: [0_u8; 16].into(), port, v6_only: true };
        if let Err(error) = other.listen() {
            assert_ne!(error.kind(), io::ErrorKind::AddrInUse);
        }
    }
}
