//! The cgroup v2 tree: all controllers handed on to the containers' groups.
//!
//! The agent stays in the root, which alone may have both processes and controllers: to move it would wait for an RCU
//! grace period, 10 ms of a boot.

use std::fs;

use nix::sys::sysinfo::sysinfo;

use crate::cgroup::{CONTAINERS, ROOT};
use crate::error::Error;

/// Makes the group of the containers' groups.
///
/// # Errors
/// Which file could not be written.
pub fn prepare() -> Result<(), Error> {
    let available = fs::read_to_string(format!("{ROOT}/cgroup.controllers"))
        .map_err(|error| Error::io(format_args!("cannot read {ROOT}/cgroup.controllers"), error))?;
    let all: Vec<String> = available.split_ascii_whitespace().map(|name| format!("+{name}")).collect();
    let all = all.join(" ");
    write(&format!("{ROOT}/cgroup.subtree_control"), &all)?;
    make(CONTAINERS)?;
    let memory = sysinfo().map_err(|error| Error::io("cannot ask for the guest's memory", error.into()))?;
    write(
        &format!("{CONTAINERS}/memory.max"),
        &left_to_containers(memory.ram_total(), memory.ram_unused()).to_string(),
    )?;
    write(&format!("{CONTAINERS}/cgroup.subtree_control"), &all)
}

/// What all containers together may have of the guest's memory, of which `unused` is free when the guest has started; in
/// bytes.
///
/// The rest is the agent's and the kernel's. Files in memory are nobody's whom the kernel could kill: a container that
/// fills all memory with them would otherwise end the guest.
fn left_to_containers(total: u64, unused: u64) -> u64 {
    unused.saturating_sub((total / 16).clamp(8 << 20, 16 << 20))
}

fn make(path: &str) -> Result<(), Error> {
    fs::create_dir(path).map_err(|error| Error::io(format_args!("cannot make {path}"), error))
}

fn write(path: &str, value: &str) -> Result<(), Error> {
    fs::write(path, value).map_err(|error| Error::io(format_args!("cannot write {value:?} to {path}"), error))
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
