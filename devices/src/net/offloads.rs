//! What one side may leave to the other: checksums and segmentation.

use super::layout::*;

bitflags::bitflags! {
    /// Work on packets that is put off, by the numbers that taps have for it (TUNSETOFFLOAD).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Offloads: u32 {
        /// Checksums.
        const CSUM = 1;
        /// TCP segmentation over IPv4.
        const TSO4 = 1 << 1;
        /// TCP segmentation over IPv6.
        const TSO6 = 1 << 2;
        /// Segmentation of TCP with congestion notification.
        const ECN = 1 << 3;
        /// UDP fragmentation.
        const UFO = 1 << 4;
        /// UDP segmentation over IPv4.
        const USO4 = 1 << 5;
        /// UDP segmentation over IPv6.
        const USO6 = 1 << 6;
    }
}

/// Each offload with the features by which the device and the driver, in this order, are able to finish the work.
const FEATURES: [(Offloads, u64, u64); 7] = [
    (Offloads::CSUM, F_CSUM, F_GUEST_CSUM),
    (Offloads::TSO4, F_HOST_TSO4, F_GUEST_TSO4),
    (Offloads::TSO6, F_HOST_TSO6, F_GUEST_TSO6),
    (Offloads::ECN, F_HOST_ECN, F_GUEST_ECN),
    (Offloads::UFO, F_HOST_UFO, F_GUEST_UFO),
    (Offloads::USO4, F_HOST_USO, F_GUEST_USO4),
    (Offloads::USO6, F_HOST_USO, F_GUEST_USO6),
];

impl Offloads {
    /// What the taps of the running kernel can do: UDP segmentation came with Linux 6.2, the rest is older
    /// than any kernel that katavm runs on.
    #[must_use]
    pub fn of_this_kernel() -> Self {
        let release = rustix::system::uname();
        Self::of_kernel(&release.release().to_string_lossy())
    }

    fn of_kernel(release: &str) -> Self {
        let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().unwrap_or(0));
        let version: (u32, u32) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        if version >= (6, 2) { Self::all() } else { Self::all() - Self::USO4 - Self::USO6 }
    }

    /// What depends on an offload that is missing goes as well (virtio 1.3, 5.1.3.1); a tap knows UDP segmentation
    /// for both versions of IP or for none.
    pub(super) fn consistent(mut self) -> Self {
        if !self.contains(Self::CSUM) {
            return Self::empty();
        }
        if !self.intersects(Self::TSO4 | Self::TSO6) {
            self.remove(Self::ECN);
        }
        if !self.contains(Self::USO4 | Self::USO6) {
            self.remove(Self::USO4 | Self::USO6);
        }
        self
    }

    /// The features by which the device offers these, in both directions.
    pub(super) fn offer(self) -> u64 {
        let each = FEATURES.iter().filter(|(offload, ..)| self.contains(*offload));
        each.fold(0, |all, (_, host, guest)| all | host | guest)
    }

    /// What the driver is ready to take, by the features that it has accepted.
    pub(super) fn to_guest(features: u64) -> Self {
        let accepted = FEATURES.iter().filter(|(.., guest)| features & guest != 0);
        accepted.fold(Self::empty(), |all, (offload, ..)| all | *offload).consistent()
    }

    /// What the driver asks to be given from now on, by feature bits (5.1.6.5.7); none when it has not `accepted` all of
    /// them, or they are no offloads.
    pub(super) fn asked(bits: u64, accepted: u64) -> Option<Self> {
        let possible = FEATURES.iter().fold(0, |all, (.., guest)| all | guest) & accepted;
        (bits & !possible == 0).then(|| Self::to_guest(bits))
    }

    /// Any segmentation.
    pub(super) fn segments(self) -> bool {
        !(self - Self::CSUM).is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn udp_segmentation_is_for_kernels_that_have_it() {
        for (release, has) in [("6.1.0-37-amd64", false), ("6.2", true), ("6.12.48+deb13", true), ("7.0-rc1", true)] {
            assert_eq!(Offloads::of_kernel(release).contains(Offloads::USO4), has, "{release}");
            assert!(Offloads::of_kernel(release).contains(Offloads::TSO6), "{release}");
        }
        assert!(!Offloads::of_kernel("nonsense").contains(Offloads::USO6));
    }

    #[test]
    fn nothing_is_taken_without_what_it_depends_on() {
        assert_eq!(Offloads::to_guest(F_GUEST_TSO4 | F_GUEST_UFO), Offloads::empty());
        assert_eq!(Offloads::to_guest(F_GUEST_CSUM | F_GUEST_ECN | F_GUEST_USO4), Offloads::CSUM);
        let all = Offloads::all();
        assert_eq!(Offloads::to_guest(all.offer()), all);
    }
}
