//! newuidmap(1) and newgidmap(1): libcontainer asks for these programs where a user namespace has more than one range,
//! and the guest has no others. The initramfs has the agent by their names.

use std::ffi::OsString;
use std::fs;
use std::path::Path;

/// Whether the binary was executed by this name.
#[must_use]
pub fn is_id_map(name: &Path) -> bool {
    map_of(name).is_some()
}

/// Writes the map of a process' user namespace: `PID INSIDE OUTSIDE COUNT [INSIDE OUTSIDE COUNT]...` (user_namespaces(7)).
/// Whoever asks is root of the guest, so the kernel's checks are all that are needed. The status to exit with.
#[must_use]
pub fn run(name: &Path, arguments: impl Iterator<Item = OsString>) -> i32 {
    let arguments: Option<Vec<u32>> = arguments.map(|argument| argument.to_str()?.parse().ok()).collect();
    let (Some(map), Some([pid, ranges @ ..])) = (map_of(name), arguments.as_deref()) else { return 1 };
    match text(ranges).map(|text| fs::write(format!("/proc/{pid}/{map}"), text)) {
        Some(Ok(())) => 0,
        Some(Err(_)) | None => 1,
    }
}

fn map_of(name: &Path) -> Option<&'static str> {
    match name.file_name()?.to_str()? {
        "newuidmap" => Some("uid_map"),
        "newgidmap" => Some("gid_map"),
        _ => None,
    }
}

/// All ranges at once, a line each: the kernel takes one write.
fn text(ranges: &[u32]) -> Option<String> {
    let (ranges, []) = ranges.as_chunks() else { return None };
    (!ranges.is_empty())
        .then(|| ranges.iter().map(|[inside, outside, count]| format!("{inside} {outside} {count}\n")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_lines() {
        assert_eq!(text(&[0, 1, 1000, 1000, 0, 1]).unwrap(), "0 1 1000\n1000 0 1\n");
        assert_eq!((text(&[]), text(&[0, 1])), (None, None));
    }

    #[test]
    fn it_is_told_by_its_name() {
        assert!(is_id_map(Path::new("/bin/newuidmap")) && is_id_map(Path::new("newgidmap")));
        assert!(!is_id_map(Path::new("/init")));
    }
}
