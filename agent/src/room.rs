//! What all containers together may have of the guest's memory.

use std::sync::OnceLock;
use std::time::Duration;
use std::{fs, thread};

use nix::errno::Errno;
use nix::sys::sysinfo::sysinfo;
use nix::time::{ClockId, clock_gettime};

use crate::cgroup::CONTAINERS;
use crate::error::Error;

/// One part in so many of memory that is plugged in describes it (`struct page`: 64 bytes per 4 KiB).
const PAGE_TABLE_SHARE: u64 = 64;

/// No free page is reported to the host before (PAGE_REPORTING_DELAY in the kernel's mm/page_reporting.c).
const FIRST_REPORT: Duration = Duration::from_secs(2);
/// How often free memory is looked at while pages may be reported.
const PAUSE: Duration = Duration::from_millis(5);
/// So many looks are longer than a report takes.
const LOOKS: u32 = 20;
/// So many, where most of the memory seems not to be free: the host is very busy, and the report not over.
const MOST_LOOKS: u32 = 400;

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
            let memory = memory().map_err(|error| Error::io("cannot ask for the guest's memory", error.into()))?;
            *AT_BOOT.get_or_init(|| left_to_containers(memory.0, memory.1))
        }
    };
    let room = at_boot.saturating_add(plugged - plugged / PAGE_TABLE_SHARE);
    let file = format!("{CONTAINERS}/memory.max");
    fs::write(&file, room.to_string()).map_err(|error| Error::io(format_args!("cannot write {room} to {file}"), error))
}

/// The guest's memory and what is free of it, in bytes.
///
/// Free pages that are just being reported to the host are not counted as free until it has answered, and the first
/// report of a small guest has nearly all of them. A guest that boots within two seconds is before it; a slower one looks
/// several times, for longer than a report takes, and believes the most that it saw.
fn memory() -> Result<(u64, u64), Errno> {
    let mut memory = sysinfo()?;
    let mut free = memory.ram_unused();
    if Duration::from(clock_gettime(ClockId::CLOCK_BOOTTIME)?) >= FIRST_REPORT {
        let mut looks = 0;
        while looks < LOOKS || (looks < MOST_LOOKS && free < memory.ram_total() / 2) {
            thread::sleep(PAUSE);
            memory = sysinfo()?;
            free = free.max(memory.ram_unused());
            looks += 1;
        }
    }
    Ok((memory.ram_total(), free))
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
