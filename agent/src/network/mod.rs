//! The guest's network: interfaces, routes and neighbours as the host tells them.
//!
//! A blocking conversation over one netlink socket, with the message types that libcontainer brings along anyway.

mod interfaces;
pub mod listeners;
mod netlink;
mod routes;
mod rules;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Mutex;

use katavm_protocol::agent::ConfigureNetworkRequest;

use crate::error::Error;
use crate::lock;
use netlink::Netlink;
use netlink_packet_route::AddressFamily;

/// One request at a time: each is about all of the network.
static TURN: Mutex<()> = Mutex::new(());

/// Applies the request. Doing it again changes nothing.
///
/// # Errors
/// Which part could not be done.
pub fn configure(request: &ConfigureNetworkRequest) -> Result<(), Error> {
    let _turn = lock(&TURN);
    let mut netlink = Netlink::open().map_err(|error| Error::io("cannot speak to the kernel's network", error))?;
    let interfaces = interfaces::apply(&mut netlink, &request.interfaces)?;
    for route in &request.routes {
        routes::add_route(&mut netlink, &interfaces, route)?;
    }
    for neighbour in &request.neighbours {
        routes::add_neighbour(&mut netlink, &interfaces, neighbour)?;
    }
    for rule in &request.rules {
        rules::add(&mut netlink, rule)?;
    }
    Ok(())
}

/// An address of the request; none for no bytes.
pub(crate) fn ip(bytes: &[u8]) -> Result<Option<IpAddr>, Error> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let v4 = <[u8; 4]>::try_from(bytes).map(|octets| Ipv4Addr::from(octets).into());
    let v6 = || <[u8; 16]>::try_from(bytes).map(|octets| Ipv6Addr::from(octets).into());
    let ip = v4.or_else(|_| v6()).map_err(|_| Error::Invalid(format!("{bytes:?} is no IP address")))?;
    Ok(Some(ip))
}

/// A version of IP.
fn family(ip_version: u32) -> Result<AddressFamily, Error> {
    match ip_version {
        4 => Ok(AddressFamily::Inet),
        6 => Ok(AddressFamily::Inet6),
        other => Err(Error::Invalid(format!("there is no IP version {other}"))),
    }
}

/// A number of the request that the kernel has in one byte.
fn byte(what: &str, number: u32) -> Result<u8, Error> {
    u8::try_from(number).map_err(|_| Error::Invalid(format!("{what} {number} is too large")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_4_or_16_bytes() {
        assert_eq!(ip(&[10, 0, 0, 1]).unwrap(), Some("10.0.0.1".parse().unwrap()));
        let six = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
        assert_eq!(ip(&six).unwrap(), Some("fd00::1".parse().unwrap()));
        assert_eq!(ip(&[]).unwrap(), None);
        assert!(ip(&[1, 2, 3]).is_err() && ip(&[0; 17]).is_err());
    }
}
