//! What there is in a network namespace, as plain data. Numbers are those of <linux/rtnetlink.h>.

use std::net::{IpAddr, Ipv4Addr};

/// What a guest is to have of a network namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scan {
    /// All interfaces but the loopback and the taps of plugged ones, by their index.
    pub interfaces: Vec<Interface>,
    /// What the kernel does not make of addresses by itself, of all tables; each after those that it needs.
    pub routes: Vec<Route>,
    /// The permanent ones.
    pub neighbours: Vec<Neighbour>,
    /// All but the three that every namespace has.
    pub rules: Vec<Rule>,
    /// Loopback addresses at which an engine answers queries for names.
    pub name_servers: Vec<Ipv4Addr>,
    /// There is the tap of a sandbox that lives.
    pub in_use: bool,
}

/// An interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its number in the namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// `veth`, `macvlan` and so on; empty for hardware.
    pub kind: String,
    /// Its address; none where it does not carry Ethernet frames.
    pub mac: Option<[u8; 6]>,
    /// The longest packet without its Ethernet header.
    pub mtu: u32,
    /// It is set up, whether it has a carrier or not.
    pub up: bool,
    /// It has a carrier, which it only has while it is set up.
    pub carrier: bool,
    /// IPv6 is not switched off on it.
    pub ipv6: bool,
    /// In the order in which the kernel has them.
    pub addresses: Vec<Address>,
}

/// An address of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// Itself.
    pub ip: IpAddr,
    /// Bits of its network.
    pub prefix: u8,
    /// The broadcast address.
    pub broadcast: Option<Ipv4Addr>,
    /// The other end of a point-to-point address.
    pub peer: Option<IpAddr>,
    /// RT_SCOPE_*.
    pub scope: u8,
    /// Without a route of its network (IFA_F_NOPREFIXROUTE).
    pub no_prefix_route: bool,
}

/// A route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// For IPv6.
    pub ipv6: bool,
    /// Where to; none is everywhere.
    pub destination: Option<IpAddr>,
    /// Bits of the destination.
    pub prefix: u8,
    /// The table's number.
    pub table: u32,
    /// RTN_*.
    pub kind: u8,
    /// RT_SCOPE_*.
    pub scope: u8,
    /// RTPROT_*.
    pub protocol: u8,
    /// Type of service.
    pub tos: u8,
    /// Priority among routes to the same destination.
    pub metric: u32,
    /// The preferred source.
    pub source: Option<IpAddr>,
    /// The longest packet; none is the interface's.
    pub mtu: Option<u32>,
    /// Ways to go; none for kinds like `blackhole`.
    pub hops: Vec<Hop>,
}

/// A way of a route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hop {
    /// The interface's number in the namespace.
    pub interface: u32,
    /// The router; none if the destination is on the link.
    pub gateway: Option<IpAddr>,
    /// The router is on the link whatever its address says.
    pub onlink: bool,
    /// How much of the traffic it gets, from 1.
    pub weight: u32,
}

/// A routing rule: which table is asked for a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// For IPv6.
    pub ipv6: bool,
    /// Lower ones come first.
    pub priority: u32,
    /// FR_ACT_*.
    pub action: u8,
    /// The table's number.
    pub table: u32,
    /// It is for packets that are not as described.
    pub invert: bool,
    /// Where a packet comes from, and bits of that; none is anywhere.
    pub source: Option<(IpAddr, u8)>,
    /// Where it goes.
    pub destination: Option<(IpAddr, u8)>,
    /// Type of service.
    pub tos: u8,
    /// The packet's mark and which bits of it count; 0 and 0 for any.
    pub mark: (u32, u32),
    /// By which interface it came; `lo` is from here. Empty for any.
    pub incoming: String,
    /// By which interface its socket wants it to go; empty for any.
    pub outgoing: String,
}

/// A permanent entry of the neighbour table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// The interface's number in the namespace.
    pub interface: u32,
    /// Whose.
    pub ip: IpAddr,
    /// Its address on the link.
    pub mac: [u8; 6],
}
