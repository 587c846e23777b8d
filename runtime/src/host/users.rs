//! Whose root this process is.

use std::fs;

use rustix::process::geteuid;

/// Whether this process is root of the host: not merely root of a user namespace, as under a rootless engine.
#[must_use]
pub fn is_root_of_host() -> bool {
    // Where /proc is not there, neither is anything else that a namespace takes.
    geteuid().is_root() && fs::read_to_string("/proc/self/uid_map").map_or(true, |map| maps_all_users(&map))
}

/// The map of the first user namespace, or one that leaves nobody out (user_namespaces(7)).
fn maps_all_users(map: &str) -> bool {
    map.split_ascii_whitespace().eq(["0", "0", "4294967295"])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_users_are_told_from_a_namespaces() {
        assert!(maps_all_users("         0          0 4294967295\n"));
        assert!(!maps_all_users("         0       1000          1\n         1     100000      65536\n"));
        assert!(!maps_all_users("         0     100000      65536\n"));
    }
}
