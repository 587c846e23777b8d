//! The kernel command line.

use std::fmt::Write;

use katavm_devices::virtio::mmio::WINDOW;

/// What every guest boots with.
///
/// - `quiet`: only errors reach the serial console, each byte of which is an exit.
/// - `reboot=k`: there is no ACPI; a reset goes through the keyboard controller's port, which the reset device answers.
/// - `panic=-1`: a panic resets at once, so that the host hears of it.
/// - `8250.nr_uarts=1`: do not look for serial ports that are not there.
/// - `no_timer_check`: KVM's timer works; the check costs time.
/// - `cryptomgr.notests`: no self-tests of ciphers at each boot.
/// - `noreplace-smp`: do not patch lock prefixes out for one CPU, and back in when another comes.
/// - `swiotlb=noforce`: no bounce buffers, which nothing uses; a guest above 3 GiB clears 64 MiB for them otherwise.
/// - `dummy.numdummies=0`: no interface that nobody asked for in every container.
const BASE: &str = "console=ttyS0 quiet reboot=k panic=-1 8250.nr_uarts=1 no_timer_check cryptomgr.notests \
                    noreplace-smp swiotlb=noforce dummy.numdummies=0";

/// A virtio-mmio window as the kernel shall find it.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// Guest-physical address.
    pub address: u64,
    /// Interrupt line.
    pub gsi: u32,
}

/// Memory that is plugged in is made use of by the kernel, movable as long as there is a third as much that is not: it can be
/// taken out again then.
pub const GROWING: &str = " memhp_default_state=online memory_hotplug.online_policy=auto-movable";

/// The command line: the base, one entry per device, and what the caller adds.
pub fn cmdline(windows: &[Window], extra: &str) -> String {
    let mut line = String::from(BASE);
    for Window { address, gsi } in windows {
        // Writing to a String cannot fail.
        let _ = write!(line, " virtio_mmio.device={}K@{address:#x}:{gsi}", WINDOW >> 10);
    }
    if !extra.is_empty() {
        line.push(' ');
        line.push_str(extra);
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_and_extras_come_last() {
        let line = cmdline(&[Window { address: 0xd000_0000, gsi: 5 }], "debug");
        assert!(line.ends_with(" virtio_mmio.device=4K@0xd0000000:5 debug"), "{line}");
    }
}
