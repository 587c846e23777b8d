//! Reading a network namespace.

use std::net::IpAddr;
use std::os::fd::AsFd;

use futures::TryStreamExt;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage};
use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteNextHop, RouteNextHopFlags,
    RouteProtocol, RouteType, RouteVia,
};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use rtnetlink::{Handle, IpVersion, RouteMessageBuilder};

use super::NetworkError;
use super::model::{Address, Hop, Interface, Neighbour, Route, Rule, Scan};
use super::netlink::{converse, failed};
use super::plug::TAP_PREFIX;
use crate::host::network_setting;

/// RT_TABLE_LOCAL: the kernel's own.
const TABLE_LOCAL: u32 = 255;

impl Scan {
    /// Reads the namespace behind a descriptor of its file, as `/proc/<pid>/ns/net` is one.
    ///
    /// # Errors
    /// Any [`NetworkError`].
    pub fn of(netns: impl AsFd) -> Result<Self, NetworkError> {
        converse(netns, async |handle| read(&handle).await)
    }

    /// The interface with this number in the namespace.
    #[must_use]
    pub fn interface(&self, index: u32) -> Option<&Interface> {
        self.interfaces.iter().find(|interface| interface.index == index)
    }
}

async fn read(handle: &Handle) -> Result<Scan, NetworkError> {
    let links = handle.link().get().execute().try_collect::<Vec<_>>().await.map_err(failed("list the interfaces"))?;
    let addresses =
        handle.address().get().execute().try_collect::<Vec<_>>().await.map_err(failed("list the addresses"))?;
    let (taps, mut interfaces): (Vec<Interface>, Vec<_>) = links.iter().filter_map(interface).partition(is_ours);
    interfaces.sort_by_key(|interface| interface.index);
    for interface in &mut interfaces {
        let own = addresses.iter().filter(|message| message.header.index == interface.index);
        interface.addresses = own.filter_map(address).collect();
    }

    let mut routes = Vec::new();
    for family in [RouteMessageBuilder::<std::net::Ipv4Addr>::new().build(), v6_dump()] {
        let messages = handle.route().get(family).execute().try_collect::<Vec<_>>().await;
        routes.extend(messages.map_err(failed("list the routes"))?.iter().filter_map(route));
    }
    let known = |index: u32| interfaces.iter().any(|interface| interface.index == index);
    routes.retain(|route| route.hops.iter().all(|hop| known(hop.interface)));
    // A router must be reachable before there can be routes over it.
    routes.sort_by_key(|route| route.hops.iter().any(|hop| hop.gateway.is_some()));

    let neighbours = handle.neighbours().get().execute().try_collect::<Vec<_>>().await;
    let neighbours = neighbours.map_err(failed("list the neighbours"))?;
    let neighbours = neighbours.iter().filter_map(neighbour).filter(|neighbour| known(neighbour.interface)).collect();

    let mut rules = Vec::new();
    for version in [IpVersion::V4, IpVersion::V6] {
        let messages = handle.rule().get(version).execute().try_collect::<Vec<_>>().await;
        rules.extend(messages.map_err(failed("list the routing rules"))?.iter().filter_map(rule));
    }
    Ok(Scan { interfaces, routes, neighbours, rules, name_servers: super::names::here(), in_use: !taps.is_empty() })
}

fn v6_dump() -> RouteMessage {
    RouteMessageBuilder::<std::net::Ipv6Addr>::new().build()
}

fn interface(message: &LinkMessage) -> Option<Interface> {
    if message.header.flags.contains(LinkFlags::Loopback) {
        return None;
    }
    let mut interface = Interface {
        index: message.header.index,
        name: String::new(),
        kind: String::new(),
        mac: None,
        mtu: 0,
        up: message.header.flags.contains(LinkFlags::Up),
        carrier: message.header.flags.contains(LinkFlags::LowerUp),
        ipv6: false,
        addresses: Vec::new(),
    };
    let ethernet = message.header.link_layer_type == LinkLayerType::Ether;
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => interface.name.clone_from(name),
            LinkAttribute::Address(bytes) if ethernet => interface.mac = bytes.as_slice().try_into().ok(),
            LinkAttribute::Mtu(mtu) => interface.mtu = *mtu,
            LinkAttribute::LinkInfo(infos) => {
                let kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.to_string()),
                    _ => None,
                });
                interface.kind = kind.unwrap_or_default();
            }
            _ => {}
        }
    }
    let disabled = network_setting(&format!("ipv6/conf/{}/disable_ipv6", interface.name));
    // A kernel without IPv6 has no such setting.
    interface.ipv6 = disabled.is_ok_and(|value| value == "0");
    Some(interface)
}

/// A tap that [`plug`](super::plug) made.
fn is_ours(interface: &Interface) -> bool {
    interface.kind == "tun" && interface.name.starts_with(TAP_PREFIX)
}

fn address(message: &AddressMessage) -> Option<Address> {
    let (mut here, mut there, mut broadcast) = (None, None, None);
    let mut flags = AddressFlags::empty();
    for attribute in &message.attributes {
        match attribute {
            // Of both, `Local` is this end's where there are two.
            AddressAttribute::Address(ip) => there = Some(*ip),
            AddressAttribute::Local(ip) => here = Some(*ip),
            AddressAttribute::Broadcast(ip) => broadcast = Some(*ip),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    let ip = here.or(there)?;
    // What routers announced: the guest hears of it as well.
    if ip.is_ipv6() && !flags.contains(AddressFlags::Permanent) {
        return None;
    }
    let peer = there.filter(|peer| *peer != ip);
    Some(Address {
        ip,
        prefix: message.header.prefix_len,
        broadcast,
        peer,
        scope: message.header.scope.into(),
        no_prefix_route: flags.contains(AddressFlags::Noprefixroute),
    })
}

fn route(message: &RouteMessage) -> Option<Route> {
    let header = &message.header;
    let mut route = Route {
        ipv6: header.address_family == AddressFamily::Inet6,
        destination: None,
        prefix: header.destination_prefix_length,
        table: header.table.into(),
        kind: header.kind.into(),
        scope: header.scope.into(),
        protocol: header.protocol.into(),
        tos: header.tos,
        metric: 0,
        source: None,
        mtu: None,
        hops: Vec::new(),
    };
    let mut direct = Hop { interface: 0, gateway: None, onlink: header.flags.contains(RouteFlags::Onlink), weight: 1 };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(to) => route.destination = ip(to),
            RouteAttribute::PrefSource(from) => route.source = ip(from),
            RouteAttribute::Gateway(gateway) => direct.gateway = ip(gateway),
            RouteAttribute::Via(via) => direct.gateway = via_ip(via),
            RouteAttribute::Oif(index) => direct.interface = *index,
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Table(table) => route.table = *table,
            RouteAttribute::Metrics(metrics) => {
                route.mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
            }
            RouteAttribute::MultiPath(hops) => route.hops = hops.iter().map(hop).collect(),
            _ => {}
        }
    }
    let goes_somewhere = matches!(header.kind, RouteType::Unicast);
    if route.hops.is_empty() && goes_somewhere {
        route.hops.push(direct);
    }
    let for_guest = route.table != TABLE_LOCAL && is_for_guest(header.kind, header.protocol, header.flags);
    for_guest.then_some(route)
}

/// Not what the guest's kernel makes by itself: of addresses, or of the announcements of routers, which it hears as well.
fn is_for_guest(kind: RouteType, protocol: RouteProtocol, flags: RouteFlags) -> bool {
    let kinds =
        [RouteType::Unicast, RouteType::BlackHole, RouteType::Unreachable, RouteType::Prohibit, RouteType::Throw];
    let own = matches!(protocol, RouteProtocol::Kernel | RouteProtocol::Ra | RouteProtocol::IcmpRedirect);
    kinds.contains(&kind) && !own && !flags.contains(RouteFlags::Cloned)
}

fn hop(hop: &RouteNextHop) -> Hop {
    let gateway = hop.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Gateway(gateway) => ip(gateway),
        RouteAttribute::Via(via) => via_ip(via),
        _ => None,
    });
    let onlink = hop.flags.contains(RouteNextHopFlags::Onlink);
    Hop { interface: hop.interface_index, gateway, onlink, weight: u32::from(hop.hops) + 1 }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

fn via_ip(via: &RouteVia) -> Option<IpAddr> {
    match via {
        RouteVia::Inet(ip) => Some((*ip).into()),
        RouteVia::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

/// None for the three that every namespace has, and for what says more than [`Rule`] can.
fn rule(message: &RuleMessage) -> Option<Rule> {
    let header = &message.header;
    let mut rule = Rule {
        ipv6: header.family == AddressFamily::Inet6,
        priority: 0,
        action: header.action.into(),
        table: header.table.into(),
        invert: header.flags.contains(RuleFlags::Invert),
        source: None,
        destination: None,
        tos: header.tos,
        mark: (0, 0),
        incoming: String::new(),
        outgoing: String::new(),
    };
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Source(ip) => rule.source = Some((*ip, header.src_len)),
            RuleAttribute::Destination(ip) => rule.destination = Some((*ip, header.dst_len)),
            RuleAttribute::Priority(priority) => rule.priority = *priority,
            RuleAttribute::Table(table) => rule.table = *table,
            RuleAttribute::FwMark(mark) => rule.mark.0 = *mark,
            RuleAttribute::FwMask(mask) => rule.mark.1 = *mask,
            RuleAttribute::Iifname(name) => rule.incoming.clone_from(name),
            RuleAttribute::Oifname(name) => rule.outgoing.clone_from(name),
            RuleAttribute::SuppressPrefixLen(u32::MAX) | RuleAttribute::Protocol(_) => {}
            other => {
                log::warn!("a routing rule is left out of the guest's network, for its {other:?}");
                return None;
            }
        }
    }
    let possible = [RuleAction::ToTable, RuleAction::Blackhole, RuleAction::Unreachable, RuleAction::Prohibit]
        .contains(&header.action);
    // Local, main and default.
    let everywhere = [(0, 255), (32766, 254), (32767, 253)].contains(&(rule.priority, rule.table));
    (possible && !everywhere).then_some(rule)
}

fn neighbour(message: &NeighbourMessage) -> Option<Neighbour> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let (mut ip, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => ip = Some((*address).into()),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => ip = Some((*address).into()),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.as_slice().try_into().ok(),
            _ => {}
        }
    }
    Some(Neighbour { interface: message.header.ifindex, ip: ip?, mac: mac? })
}
