//! Interfaces and their addresses.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use katavm_protocol::agent::{Address, Interface};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::netlink::Netlink;
use super::{byte, ip};
use crate::error::Error;
use crate::places::{self, PLACES};

const INTERFACES: &str = "/sys/class/net";

/// The numbers of the interfaces by their names.
pub type Numbers = HashMap<String, u32>;

/// An interface as it is now.
struct Link {
    index: u32,
    name: String,
    /// The address that its device was made with.
    permanent: Option<Vec<u8>>,
    address: Vec<u8>,
    mtu: u32,
    up: bool,
}

impl Link {
    /// Whether its device was made with this address.
    fn is(&self, mac: &[u8]) -> bool {
        // A kernel that does not tell permanent addresses: the current one, which is the same until it is changed.
        self.permanent.as_deref().unwrap_or(&self.address) == mac
    }
}

/// Makes the interfaces what they are told to be.
pub fn apply(netlink: &mut Netlink, wanted: &[Interface]) -> Result<Numbers, Error> {
    replug(netlink, wanted)?;
    let mut numbers = Numbers::new();
    for interface in wanted {
        // Each time anew: names change on the way.
        let links = all(netlink)?;
        let link = find(&links, &interface.device_mac)?;
        let name = &interface.name;
        let failed = |error| Error::io(format_args!("cannot set up the network interface {name}"), error);
        rename(netlink, &links, link, name).map_err(failed)?;
        set_ipv6(name, interface.ipv6).map_err(failed)?;
        set_link(netlink, link, interface).map_err(failed)?;
        set_addresses(netlink, link.index, interface)?;
        numbers.insert(name.clone(), link.index);
    }
    Ok(numbers)
}

/// Takes away the interfaces whose devices the host has unplugged, and finds those that it has plugged in.
fn replug(netlink: &mut Netlink, wanted: &[Interface]) -> Result<(), Error> {
    let links = all(netlink)?;
    let is_wanted = |link: &&Link| wanted.iter().any(|interface| link.is(&interface.device_mac));
    for link in links.iter().filter(|link| !is_wanted(link)) {
        let name = &link.name;
        leave(name).map_err(|error| Error::io(format_args!("cannot take {name} away"), error))?;
    }
    if links.iter().filter(is_wanted).count() < wanted.len() {
        PLACES.look().map_err(|error| Error::io("cannot look for new network devices", error))?;
    }
    Ok(())
}

/// Takes an interface away whose device has left its place; nothing, if it is no such interface.
fn leave(interface: &str) -> io::Result<()> {
    // The device of the interface is a child of its place.
    let Ok(device) = fs::canonicalize(Path::new(INTERFACES).join(interface).join("device")) else { return Ok(()) };
    let place = device.parent().and_then(Path::file_name).map(|name| name.to_string_lossy());
    match place.filter(|name| places::is_name(name)) {
        Some(place) => PLACES.unbind(&place),
        None => Ok(()),
    }
}

fn all(netlink: &mut Netlink) -> Result<Vec<Link>, Error> {
    links(netlink).map_err(|error| Error::io("cannot list the network interfaces", error))
}

fn links(netlink: &mut Netlink) -> io::Result<Vec<Link>> {
    let all = netlink.list(RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
    let link = |message| match message {
        RouteNetlinkMessage::NewLink(message) => Some(link(message)),
        _ => None,
    };
    Ok(all.into_iter().filter_map(link).collect())
}

fn link(message: LinkMessage) -> Link {
    let up = message.header.flags.contains(LinkFlags::Up);
    let index = message.header.index;
    let mut link = Link { index, name: String::new(), permanent: None, address: Vec::new(), mtu: 0, up };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::PermAddress(bytes) => link.permanent = Some(bytes),
            LinkAttribute::Address(bytes) => link.address = bytes,
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            _ => {}
        }
    }
    link
}

fn find<'a>(links: &'a [Link], mac: &[u8]) -> Result<&'a Link, Error> {
    links.iter().find(|link| link.is(mac)).ok_or_else(|| {
        let mac: Vec<String> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
        Error::NotFound(format!("no network device has the address {}", mac.join(":")))
    })
}

fn changed(index: u32, change: impl FnOnce(&mut LinkMessage)) -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    change(&mut message);
    RouteNetlinkMessage::SetLink(message)
}

fn set_up(message: &mut LinkMessage, up: bool) {
    message.header.change_mask = LinkFlags::Up;
    message.header.flags = if up { LinkFlags::Up } else { LinkFlags::empty() };
}

fn rename(netlink: &mut Netlink, links: &[Link], link: &Link, name: &str) -> io::Result<()> {
    if link.name == name {
        return Ok(());
    }
    // Whoever has the name has lost it on the host.
    if let Some(other) = links.iter().find(|other| other.name == name) {
        netlink.change(changed(other.index, |message| set_up(message, false)))?;
        let spare = format!("unused{}", other.index);
        netlink.change(changed(other.index, |message| message.attributes.push(LinkAttribute::IfName(spare))))?;
    }
    if link.up {
        netlink.change(changed(link.index, |message| set_up(message, false)))?;
    }
    netlink.change(changed(link.index, |message| message.attributes.push(LinkAttribute::IfName(name.to_owned()))))
}

/// Before it is up, or it has a link-local address already.
fn set_ipv6(name: &str, enabled: bool) -> io::Result<()> {
    let path = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
    match std::fs::write(path, if enabled { "0" } else { "1" }) {
        // A kernel without IPv6: there are no addresses to set then.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

fn set_link(netlink: &mut Netlink, link: &Link, wanted: &Interface) -> io::Result<()> {
    netlink.change(changed(link.index, |message| {
        set_up(message, wanted.up);
        if !wanted.mac.is_empty() && wanted.mac != link.address {
            message.attributes.push(LinkAttribute::Address(wanted.mac.clone()));
        }
        if wanted.mtu != 0 && wanted.mtu != link.mtu {
            message.attributes.push(LinkAttribute::Mtu(wanted.mtu));
        }
    }))
}

fn set_addresses(netlink: &mut Netlink, index: u32, interface: &Interface) -> Result<(), Error> {
    let name = &interface.name;
    let mut wanted = Vec::with_capacity(interface.addresses.len());
    for address in &interface.addresses {
        let ip = ip(&address.ip)?.ok_or_else(|| Error::Invalid("an address without an address".into()))?;
        wanted.push((ip, message(index, ip, address)?));
    }
    // First of all, because with an address the others of its network go as well (promote_secondaries).
    for (ip, message) in addresses(netlink, index)
        .map_err(|error| Error::io(format_args!("cannot list the addresses of {name}"), error))?
    {
        let prefix = message.header.prefix_len;
        let stays = wanted.iter().any(|(own, wanted)| (*own, wanted.header.prefix_len) == (ip, prefix));
        if !stays && !is_kernels(&message) {
            netlink
                .change(RouteNetlinkMessage::DelAddress(message))
                .map_err(|error| Error::io(format_args!("cannot take the address {ip} off {name}"), error))?;
        }
    }
    for (ip, message) in wanted {
        netlink
            .put(RouteNetlinkMessage::NewAddress(message))
            .map_err(|error| Error::io(format_args!("cannot give {name} the address {ip}"), error))?;
    }
    Ok(())
}

/// Link-local IPv6 addresses, and those of announcements, come by themselves.
fn is_kernels(message: &AddressMessage) -> bool {
    let permanent = message.attributes.iter().any(
        |attribute| matches!(attribute, AddressAttribute::Flags(flags) if flags.contains(AddressFlags::Permanent)),
    );
    message.header.family == AddressFamily::Inet6 && (message.header.scope == AddressScope::Link || !permanent)
}

fn addresses(netlink: &mut Netlink, index: u32) -> io::Result<Vec<(IpAddr, AddressMessage)>> {
    let all = netlink.list(RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
    let own = all.into_iter().filter_map(|message| match message {
        RouteNetlinkMessage::NewAddress(message) if message.header.index == index => Some(message),
        _ => None,
    });
    let with_ip = own.filter_map(|message| {
        let local = message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Local(ip) => Some(*ip),
            _ => None,
        });
        let ip = local.or_else(|| {
            message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Address(ip) => Some(*ip),
                _ => None,
            })
        })?;
        Some((ip, message))
    });
    Ok(with_ip.collect())
}

fn message(index: u32, here: IpAddr, address: &Address) -> Result<AddressMessage, Error> {
    let mut message = AddressMessage::default();
    message.header.index = index;
    message.header.family = if here.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    message.header.prefix_len = byte("the prefix length", address.prefix)?;
    message.header.scope = byte("the scope", address.scope)?.into();
    message.attributes.push(AddressAttribute::Local(here));
    message.attributes.push(AddressAttribute::Address(ip(&address.peer)?.unwrap_or(here)));
    if let Ok(broadcast) = <[u8; 4]>::try_from(address.broadcast.as_slice()) {
        message.attributes.push(AddressAttribute::Broadcast(Ipv4Addr::from(broadcast)));
    }
    let mut flags = AddressFlags::empty();
    if here.is_ipv6() {
        // The host has made sure that nobody else has it. It has it itself.
        flags |= AddressFlags::Nodad;
    }
    if address.no_prefix_route {
        flags |= AddressFlags::Noprefixroute;
    }
    message.attributes.push(AddressAttribute::Flags(flags));
    Ok(message)
}
