//! The guest's network devices, as they are made.

use std::io;

use katavm_devices::net::{Net, NetConfig, NetError, NetLimits, Offloads};
use rustix::rand::{GetRandomFlags, getrandom};

use super::Interface;

/// The most pairs of queues of an interface: each takes a thread, and the one interrupt that a device has takes its share
/// of what more of them would gain.
const MOST_PAIRS: u16 = 4;

/// How many pairs of queues the interfaces of a guest have: one for each vCPU, up to 4.
#[must_use]
pub fn pairs_for(vcpus: u8) -> u16 {
    u16::from(vcpus).clamp(1, MOST_PAIRS)
}

/// An address for a device that has none of its own: local and random.
///
/// # Errors
/// When the kernel has no random numbers.
pub fn random_mac() -> io::Result<[u8; 6]> {
    let mut mac = [0; 6];
    getrandom(&mut mac, GetRandomFlags::empty())?;
    let [first, ..] = &mut mac;
    // Administered locally, and no group's (IEEE 802).
    *first = *first & 0xfc | 2;
    Ok(mac)
}

/// A network device for an interface that is there already, with the interface's address; the tap is still to be
/// attached. It takes any MTU, as the interface's may change. The link is up when the interface's is.
///
/// # Errors
/// When no random numbers or descriptors can be had.
pub fn device(interface: &Interface, pairs: u16) -> Result<Net, NetError> {
    let mac = match interface.mac {
        Some(mac) => mac,
        None => random_mac()?,
    };
    let mut net = Net::new(NetConfig {
        mac,
        mtu: None,
        offloads: Offloads::of_this_kernel(),
        pairs,
        limits: NetLimits::default(),
    })?;
    net.set_link(interface.carrier);
    Ok(net)
}

/// A network device without a link, for an interface that may come when the guest is running already. It takes
/// any MTU; the guest's agent finds it by its address.
///
/// # Errors
/// When no random numbers or descriptors can be had.
pub fn slot(pairs: u16) -> Result<Net, NetError> {
    Net::new(NetConfig {
        mac: random_mac()?,
        mtu: None,
        offloads: Offloads::of_this_kernel(),
        pairs,
        limits: NetLimits::default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_follow_the_vcpus() {
        assert_eq!([0, 1, 2, 4, 5, 32].map(pairs_for), [1, 1, 2, 4, 4, 4]);
    }

    #[test]
    fn addresses_are_local_and_differ() {
        let macs: Vec<_> = (0..64).map(|_| random_mac().unwrap()).collect();
        assert!(macs.iter().all(|mac| mac[0] & 3 == 2));
        let mut sorted = macs.clone();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(sorted.len(), 64);
    }
}
