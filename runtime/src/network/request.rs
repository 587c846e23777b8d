//! What the guest's agent is told about a namespace.

use std::net::IpAddr;

use katavm_protocol::agent;

use super::model::{Address, Hop, Interface, Neighbour, Route, Rule, Scan};

impl Scan {
    /// The agent's request for the interfaces that are plugged into devices of the guest: pairs of an interface's
    /// number in the namespace and the address of its device. Nothing of other interfaces is in it.
    #[must_use]
    pub fn request(&self, plugged: &[(u32, [u8; 6])]) -> agent::ConfigureNetworkRequest {
        let device = |index: u32| plugged.iter().find(|(plugged, _)| *plugged == index).map(|(_, mac)| *mac);
        let name = |index: u32| device(index).and_then(|_| self.interface(index)).map(|found| found.name.clone());
        let interfaces = self.interfaces.iter();
        agent::ConfigureNetworkRequest {
            interfaces: interfaces.filter_map(|own| Some(interface(own, device(own.index)?))).collect(),
            routes: self.routes.iter().filter_map(|route| route_over(route, name)).collect(),
            neighbours: self.neighbours.iter().filter_map(|own| neighbour(own, name)).collect(),
            rules: self.rules.iter().map(rule).collect(),
            name_servers: self.name_servers.iter().map(|ip| ip.octets().to_vec()).collect(),
            ..Default::default()
        }
    }
}

fn bytes(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn interface(own: &Interface, device: [u8; 6]) -> agent::Interface {
    agent::Interface {
        device_mac: device.to_vec(),
        name: own.name.clone(),
        mac: own.mac.map(Vec::from).unwrap_or_default(),
        mtu: own.mtu,
        addresses: own.addresses.iter().map(address).collect(),
        up: own.up,
        ipv6: own.ipv6,
        ..Default::default()
    }
}

fn address(own: &Address) -> agent::Address {
    agent::Address {
        ip: bytes(own.ip),
        prefix: own.prefix.into(),
        broadcast: own.broadcast.map(|ip| ip.octets().to_vec()).unwrap_or_default(),
        peer: own.peer.map(bytes).unwrap_or_default(),
        scope: own.scope.into(),
        no_prefix_route: own.no_prefix_route,
        ..Default::default()
    }
}

/// None when a part of it goes over an interface that the guest does not have.
fn route_over(own: &Route, name: impl Fn(u32) -> Option<String>) -> Option<agent::Route> {
    let hop = |own: &Hop| {
        Some(agent::Hop {
            interface: name(own.interface)?,
            gateway: own.gateway.map(bytes).unwrap_or_default(),
            onlink: own.onlink,
            weight: own.weight,
            ..Default::default()
        })
    };
    Some(agent::Route {
        ip_version: if own.ipv6 { 6 } else { 4 },
        destination: own.destination.map(bytes).unwrap_or_default(),
        prefix: own.prefix.into(),
        table: own.table,
        kind: own.kind.into(),
        scope: own.scope.into(),
        protocol: own.protocol.into(),
        tos: own.tos.into(),
        metric: own.metric,
        source: own.source.map(bytes).unwrap_or_default(),
        mtu: own.mtu.unwrap_or(0),
        hops: own.hops.iter().map(hop).collect::<Option<_>>()?,
        ..Default::default()
    })
}

fn rule(own: &Rule) -> agent::Rule {
    let prefix = |of: Option<(IpAddr, u8)>| of.map(|(ip, bits)| (bytes(ip), bits.into())).unwrap_or_default();
    let (source, source_prefix) = prefix(own.source);
    let (destination, destination_prefix) = prefix(own.destination);
    let (mark, mark_mask) = own.mark;
    agent::Rule {
        ip_version: if own.ipv6 { 6 } else { 4 },
        priority: own.priority,
        action: own.action.into(),
        table: own.table,
        invert: own.invert,
        source,
        source_prefix,
        destination,
        destination_prefix,
        tos: own.tos.into(),
        mark,
        mark_mask,
        incoming: own.incoming.clone(),
        outgoing: own.outgoing.clone(),
        ..Default::default()
    }
}

fn neighbour(own: &Neighbour, name: impl Fn(u32) -> Option<String>) -> Option<agent::Neighbour> {
    let interface = name(own.interface)?;
    Some(agent::Neighbour { interface, ip: bytes(own.ip), mac: own.mac.to_vec(), ..Default::default() })
}
