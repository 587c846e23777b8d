//! Routes and neighbours.

use std::net::IpAddr;

use katavm_protocol::agent::{Hop, Neighbour, Route};
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteNextHop, RouteNextHopFlags,
    RouteVia,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::interfaces::Numbers;
use super::netlink::Netlink;
use super::{byte, family, ip};
use crate::error::Error;

fn number(interfaces: &Numbers, name: &str) -> Result<u32, Error> {
    let found = interfaces.get(name).copied();
    found.ok_or_else(|| Error::Invalid(format!("there is no interface {name} in the request")))
}

/// Adds a route, or replaces the one to the same destination.
pub fn add_route(netlink: &mut Netlink, interfaces: &Numbers, route: &Route) -> Result<(), Error> {
    let message = message(interfaces, route)?;
    netlink.put(RouteNetlinkMessage::NewRoute(message)).map_err(|error| {
        let to = ip(&route.destination).ok().flatten().map_or_else(|| "default".into(), |ip| ip.to_string());
        // What a kernel without it says of several hops, whatever they are.
        let hint = if route.hops.len() > 1 { " (several hops take CONFIG_IP_ROUTE_MULTIPATH)" } else { "" };
        Error::io(format_args!("cannot add the route {to}/{} of table {}{hint}", route.prefix, route.table), error)
    })
}

fn message(interfaces: &Numbers, route: &Route) -> Result<RouteMessage, Error> {
    let mut message = RouteMessage::default();
    message.header.address_family = family(route.ip_version)?;
    message.header.destination_prefix_length = byte("the prefix length", route.prefix)?;
    message.header.table = u8::try_from(route.table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC);
    message.header.kind = byte("the kind of route", route.kind)?.into();
    message.header.scope = byte("the scope", route.scope)?.into();
    message.header.protocol = byte("the routing protocol", route.protocol)?.into();
    message.header.tos = byte("the type of service", route.tos)?;
    let attributes = &mut message.attributes;
    attributes.push(RouteAttribute::Table(route.table));
    attributes.extend(ip(&route.destination)?.map(|to| RouteAttribute::Destination(to.into())));
    attributes.extend(ip(&route.source)?.map(|from| RouteAttribute::PrefSource(from.into())));
    if route.metric != 0 {
        attributes.push(RouteAttribute::Priority(route.metric));
    }
    if route.mtu != 0 {
        attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(route.mtu)]));
    }
    match route.hops.as_slice() {
        [] => {}
        [hop] => {
            attributes.push(RouteAttribute::Oif(number(interfaces, &hop.interface)?));
            attributes.extend(gateway(route, hop)?);
            if hop.onlink {
                message.header.flags |= RouteFlags::Onlink;
            }
        }
        hops => {
            let hops = hops.iter().map(|hop| next_hop(interfaces, route, hop)).collect::<Result<_, _>>()?;
            attributes.push(RouteAttribute::MultiPath(hops));
        }
    }
    Ok(message)
}

fn next_hop(interfaces: &Numbers, route: &Route, hop: &Hop) -> Result<RouteNextHop, Error> {
    let mut next = RouteNextHop::default();
    next.interface_index = number(interfaces, &hop.interface)?;
    // The kernel counts from 0.
    next.hops = byte("the weight", hop.weight.saturating_sub(1))?;
    next.flags = if hop.onlink { RouteNextHopFlags::Onlink } else { RouteNextHopFlags::empty() };
    next.attributes.extend(gateway(route, hop)?);
    Ok(next)
}

/// The router, which may be of the other version of IP.
fn gateway(route: &Route, hop: &Hop) -> Result<Option<RouteAttribute>, Error> {
    Ok(ip(&hop.gateway)?.map(|router| match (router, route.ip_version) {
        (IpAddr::V6(router), 4) => RouteAttribute::Via(RouteVia::Inet6(router)),
        (IpAddr::V4(router), 6) => RouteAttribute::Via(RouteVia::Inet(router)),
        (router, _) => RouteAttribute::Gateway(RouteAddress::from(router)),
    }))
}

/// Adds a permanent neighbour, or replaces the entry for the same address.
pub fn add_neighbour(netlink: &mut Netlink, interfaces: &Numbers, neighbour: &Neighbour) -> Result<(), Error> {
    let mut message = NeighbourMessage::default();
    let ip = ip(&neighbour.ip)?.ok_or_else(|| Error::Invalid("a neighbour without an address".into()))?;
    message.header.ifindex = number(interfaces, &neighbour.interface)?;
    message.header.state = NeighbourState::Permanent;
    let (family, address) = match ip {
        IpAddr::V4(ip) => (AddressFamily::Inet, NeighbourAddress::Inet(ip)),
        IpAddr::V6(ip) => (AddressFamily::Inet6, NeighbourAddress::Inet6(ip)),
    };
    message.header.family = family;
    message.attributes.push(NeighbourAttribute::Destination(address));
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(neighbour.mac.clone()));
    netlink
        .put(RouteNetlinkMessage::NewNeighbour(message))
        .map_err(|error| Error::io(format_args!("cannot add the neighbour {ip} of {}", neighbour.interface), error))
}
