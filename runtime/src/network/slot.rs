//! The guest's network devices, as they are made.

use std::io;

use katavm_devices::net::{Net, NetConfig, NetError, Offloads};
use rustix::rand::{GetRandomFlags, getrandom};

use super::Interface;

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
/// attached. It takes any MTU, as the interface's may change.
///
/// # Errors
/// When no random numbers or descriptors can be had.
pub fn device(interface: &Interface) -> Result<Net, NetError> {
    let mac = match interface.mac {
        Some(mac) => mac,
        None => random_mac()?,
    };
    Net::new(NetConfig { mac, mtu: None, offloads: Offloads::of_this_kernel() })
}

/// A network device without a link, for an interface that may come when the guest is running already. It takes
/// any MTU; the guest's agent finds it by its address.
///
/// # Errors
/// When no random numbers or descriptors can be had.
pub fn slot() -> Result<Net, NetError> {
    Net::new(NetConfig { mac: random_mac()?, mtu: None, offloads: Offloads::of_this_kernel() })
}

#[cfg(test)]
mod tests {
    use super::*;

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
