//! What all containers together may have of the guest's memory.

use std::fs;
use std::sync::OnceLock;

use nix::sys::sysinfo::sysinfo;

use crate::cgroup::CONTAINERS;
use crate::error::Error;

/// One part in so many of memory that is plugged in describes it (`struct page`: 64 bytes per 4 KiB).
const PAGE_TABLE_SHARE: u64 = 64;

/// What they could have when the guest had booted.
static AT_BOOT: OnceLock<u64> = OnceLock::new();

/// Limits them to what the guest has left for them with `plugged` bytes beside those that it has booted with. Called for the
/// first time when the guest has booted.
///
/// # Errors
/// When the kernel does not tell how much there is, or refuses the limit.
pub fn set(plugged: u64) -> Result<(), Error> {
    let at_boot = match AT_BOOT.get() {
        Some(room) => *room,
        None => {
            let memory = sysinfo().map_err(|error| Error::io("cannot ask for the guest's memory", error.into()))?;
            *AT_BOOT.get_or_init(|| left_to_containers(memory.ram_total(), memory.ram_unused()))
        }
    };
    let room = at_boot.saturating_add(plugged - plugged / PAGE_TABLE_SHARE);
    let file = format!("{CONTAINERS}/memory.max");
    fs::write(&file, room.to_string()).map_err(|error| Error::io(format_args!("cannot write {room} to {file}"), error))
}

/// What all containers together may have of the guest's memory, of which `unused` is free when the guest has started; in
/// bytes.
///
/// The rest is the agent's and the kernel's. Files in memory are nobody's whom the kernel could kill: a container that
/// fills all memory with them would otherwise end the guest.
fn left_to_containers(total: u64, unused: u64) -> u64 {
    unused.saturating_sub((total / 16).clamp(8 << 20, 16 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_the_memory_is_kept() {
        let mib = |mib: u64| mib << 20;
        assert_eq!(left_to_containers(mib(100), mib(80)), mib(72));
        assert_eq!(left_to_containers(mib(480), mib(450)), mib(434));
        assert_eq!(left_to_containers(mib(16 << 10), mib(16 << 10)), mib((16 << 10) - 16));
        assert_eq!(left_to_containers(mib(9), mib(4)), 0);
    }
}
