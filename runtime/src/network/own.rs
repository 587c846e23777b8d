//! What a plugged interface leaves to the namespace itself, where an engine's name server is in it: the answers to what
//! that asks others, and nothing else.
//!
//! Guest and namespace have the same addresses, so their connections are told apart by ports. The namespace's own are from
//! a small range that Linux gives nobody by itself, and filters let packets to those ports pass. Answers to the question
//! for a neighbour go to both.

use std::os::fd::AsFd;

use rtnetlink::Handle;
use rtnetlink::packet_route::tc::{
    TcAction, TcActionAttribute, TcActionGeneric, TcActionMirror, TcActionMirrorOption, TcActionOption, TcActionType,
    TcFilterU32Option, TcMirror, TcMirrorActionType, TcU32Key, TcU32Selector, TcU32SelectorFlags,
};

use super::NetworkError;
use super::netlink::errno;
use crate::host::{in_network_namespace, network_setting, set_network_setting};

/// The namespace's own ports: above those that Linux chooses from (ip_local_port_range is 32768 to 60999).
pub const PORTS: (u16, u16) = (0xfe00, 0xfeff);

const SETTING: &str = "ipv4/ip_local_port_range";
/// What it is in a new namespace.
const DEFAULT: &str = "32768\t60999";

/// Has the namespace's own connections be from [`PORTS`]; what was set before.
///
/// # Errors
/// When the namespace cannot be entered or the setting not be changed.
pub fn take_ports(netns: impl AsFd) -> Result<String, NetworkError> {
    let take = || {
        let before = network_setting(SETTING)?;
        set_network_setting(SETTING, &format!("{} {}", PORTS.0, PORTS.1))?;
        // Left by a sandbox that was killed: what was before that is not known any more.
        Ok(if is_own(&before) { DEFAULT.into() } else { before })
    };
    in_network_namespace(netns, take).map_err(NetworkError::Enter)?.map_err(NetworkError::Ports)
}

fn is_own(range: &str) -> bool {
    range.split_whitespace().map(str::parse).eq([Ok(PORTS.0), Ok(PORTS.1)])
}

/// Has them be what they were.
///
/// # Errors
/// As [`take_ports`].
pub fn give_ports_back(netns: impl AsFd, before: &str) -> Result<(), NetworkError> {
    let give = || set_network_setting(SETTING, before);
    in_network_namespace(netns, give).map_err(NetworkError::Enter)?.map_err(NetworkError::Ports)
}

/// A filter's priority, and the EtherType that it is for.
type Place = (u16, u16);

const ARP: Place = (0x60, 0x0806);
const IPV4: Place = (0x61, 0x0800);
const IPV6: Place = (0x62, 0x86dd);
/// All places of filters of this kind.
pub const PLACES: [Place; 3] = [ARP, IPV4, IPV6];

const TCP: u32 = 6;
const UDP: u32 = 17;

/// Bits of a packet: at which byte after the link's header, their value, and which of them count.
type Key = (i32, u32, u32);

/// Adds the filters to an interface whose packets go to the tap with the number `tap` otherwise. Those that are there
/// already must have been taken away.
///
/// # Errors
/// Of the kernel.
pub async fn add(handle: &Handle, interface: i32, tap: u32) -> Result<(), rtnetlink::Error> {
    // An answer (RFC 826).
    put(handle, interface, ARP, &[(4, 2, 0xffff)], Some(tap)).await?;
    for protocol in [UDP, TCP] {
        // Without options, and no later fragment, which has no port (RFC 791).
        let keys =
            [(0, 0x45 << 24, 0xff << 24), (4, 0, 0x1fff), (8, protocol << 16, 0xff << 16), (20, port(), PORT_BITS)];
        put(handle, interface, IPV4, &keys, None).await?;
        // RFC 8200.
        put(handle, interface, IPV6, &[(4, protocol << 8, 0xff << 8), (40, port(), PORT_BITS)], None).await?;
    }
    // ICMPv6, a neighbour's advertisement (RFC 4861).
    put(handle, interface, IPV6, &[(4, 58 << 8, 0xff << 8), (40, 136 << 24, 0xff << 24)], Some(tap)).await
}

/// The destination is in the second half of the first word of UDP and TCP.
const PORT_BITS: u32 = !(PORTS.1 ^ PORTS.0) as u32;

fn port() -> u32 {
    PORTS.0.into()
}

/// One filter: what it matches passes, and a copy of it goes out by another interface where one is named.
async fn put(
    handle: &Handle,
    interface: i32,
    (priority, protocol): Place,
    keys: &[Key],
    copy_to: Option<u32>,
) -> Result<(), rtnetlink::Error> {
    let mut selector = TcU32Selector::default();
    selector.flags = TcU32SelectorFlags::Terminal;
    selector.keys = keys.iter().map(key).collect();
    selector.nkeys = selector.keys.len() as u8;
    let mut options = vec![TcFilterU32Option::Selector(selector)];
    options.extend(copy_to.map(|tap| TcFilterU32Option::Action(vec![copy(tap)])));
    let filter = handle.traffic_filter(interface).add().ingress().priority(priority).protocol(protocol.to_be());
    filter.u32(&options)?.execute().await
}

fn key(&(offset, value, mask): &Key) -> TcU32Key {
    let mut key = TcU32Key::default();
    (key.off, key.val, key.mask) = (offset, value, mask);
    key
}

fn copy(tap: u32) -> TcAction {
    let mut mirror = TcMirror::default();
    mirror.generic = TcActionGeneric::default();
    mirror.generic.action = TcActionType::Ok;
    mirror.eaction = TcMirrorActionType::EgressMirror;
    mirror.ifindex = tap;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.to_string()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror))]),
    ];
    action
}

/// There are no such filters.
pub fn are_missing(error: &rtnetlink::Error) -> bool {
    matches!(errno(error), Some(libc::ENOENT | libc::EINVAL))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ports_are_one_block_that_bits_can_tell() {
        let (first, last) = PORTS;
        assert!((first..=last).all(|port| u32::from(port) & PORT_BITS == super::port()));
        assert!([first - 1, last.wrapping_add(1)].iter().all(|port| u32::from(*port) & PORT_BITS != super::port()));
        assert_eq!(PORT_BITS, 0xff00);
        assert!(is_own("65024\t65279") && !is_own(DEFAULT) && !is_own("65024") && !is_own(""));
    }
}
