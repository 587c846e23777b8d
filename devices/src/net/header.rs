//! The header in front of a packet (virtio 1.3, 5.1.6), as the kernel's tap and the guest's driver have it.

use super::layout::HEADER;
use super::offloads::Offloads;

const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;

const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_UDP: u8 = 3;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
/// A flag beside the type.
const GSO_ECN: u8 = 0x80;

/// What the driver finds in front of a packet that the tap has given, in `buffers` buffers; none when the
/// packet takes work that the driver did not agree to: it was on its way while another driver was there.
pub fn for_driver(mut header: [u8; HEADER], accepted: Offloads, buffers: u16) -> Option<[u8; HEADER]> {
    let [flags, gso, .., low, high] = &mut header;
    let needed = match *gso & !GSO_ECN {
        GSO_NONE => Offloads::empty(),
        GSO_TCPV4 => Offloads::TSO4,
        GSO_TCPV6 => Offloads::TSO6,
        GSO_UDP => Offloads::UFO,
        GSO_UDP_L4 => Offloads::USO4 | Offloads::USO6,
        _ => return None,
    };
    let ecn = if *gso & GSO_ECN == 0 { Offloads::empty() } else { Offloads::ECN };
    let csum = if *flags & NEEDS_CSUM == 0 { Offloads::empty() } else { Offloads::CSUM };
    if !accepted.contains(needed | ecn | csum) {
        return None;
    }
    *flags &= if accepted.contains(Offloads::CSUM) { NEEDS_CSUM | DATA_VALID } else { 0 };
    [*low, *high] = buffers.to_le_bytes();
    Some(header)
}

/// Whether the driver leaves work on a packet to the device.
pub fn asks_for_work([flags, gso, ..]: [u8; HEADER]) -> bool {
    flags & NEEDS_CSUM != 0 || gso != GSO_NONE
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(flags: u8, gso: u8) -> [u8; HEADER] {
        [flags, gso, 54, 0, 120, 5, 34, 0, 16, 0, 0xee, 0xee]
    }

    #[test]
    fn the_number_of_buffers_is_put_in() {
        let made = for_driver(header(1, 0x81), Offloads::all(), 0x0102).unwrap();
        assert_eq!(made, [1, 0x81, 54, 0, 120, 5, 34, 0, 16, 0, 2, 1]);
    }

    #[test]
    fn a_driver_gets_no_work_that_it_did_not_agree_to() {
        for (flags, gso, needs) in [
            (1, 0, Offloads::CSUM),
            (1, 1, Offloads::CSUM | Offloads::TSO4),
            (1, 0x81, Offloads::CSUM | Offloads::TSO4 | Offloads::ECN),
            (1, 4, Offloads::CSUM | Offloads::TSO6),
            (1, 3, Offloads::CSUM | Offloads::UFO),
            (1, 5, Offloads::CSUM | Offloads::USO4 | Offloads::USO6),
        ] {
            assert!(for_driver(header(flags, gso), needs, 1).is_some(), "{gso}");
            for one in needs.iter() {
                assert!(for_driver(header(flags, gso), needs - one, 1).is_none(), "{gso} without {one:?}");
            }
        }
        assert!(for_driver(header(0, 2), Offloads::all(), 1).is_none(), "an unknown type");
    }

    #[test]
    fn flags_are_for_those_who_can_read_them() {
        assert_eq!(for_driver(header(2, 0), Offloads::empty(), 1).unwrap()[0], 0);
        assert_eq!(for_driver(header(0xfe, 0), Offloads::CSUM, 1).unwrap()[0], 2);
    }
}
