//! What a container's processes are, from /proc (proc_pid_stat(5), proc_pid_status(5)).

use std::fs;
use std::path::{Path, PathBuf};

use katavm_protocol::agent::Process;

/// Nanoseconds in one of /proc's ticks: USER_HZ is 100 on every x86 kernel.
const TICK_NS: u64 = 10_000_000;

/// Describes those of `pids` that still are there.
pub fn describe(pids: &[u32]) -> Vec<Process> {
    let boot_ns = boot_time_ns(&fs::read_to_string("/proc/stat").unwrap_or_default());
    pids.iter().filter_map(|pid| read(*pid, boot_ns)).collect()
}

fn read(pid: u32, boot_ns: u64) -> Option<Process> {
    let folder = Path::new("/proc").join(pid.to_string());
    let read = |name: &str| fs::read(PathBuf::from(&folder).join(name)).unwrap_or_default();
    let text = |name: &str| String::from_utf8_lossy(&read(name)).into_owned();
    let mut process = parse_stat(&text("stat"), boot_ns)?;
    process.uid = effective_uid(&text("status"));
    let arguments = String::from_utf8_lossy(&read("cmdline")).trim_end_matches('\0').replace('\0', " ");
    if !arguments.is_empty() {
        process.command = arguments;
    }
    Some(process)
}

/// All but the user and the arguments; the command is the name in brackets.
fn parse_stat(stat: &str, boot_ns: u64) -> Option<Process> {
    let (pid, rest) = stat.split_once(" (")?;
    // The name may hold anything, parentheses included.
    let (name, rest) = rest.rsplit_once(") ")?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    // The first of them is field 3 of the manual page.
    let number = |field: usize| fields.get(field - 3).and_then(|text| text.parse::<u64>().ok());
    Some(Process {
        pid: pid.parse().ok()?,
        ppid: u32::try_from(number(4)?).ok()?,
        tty: u32::try_from(number(7).unwrap_or(0)).unwrap_or(0),
        cpu_ns: (number(14)? + number(15)?) * TICK_NS,
        started_at_ns: boot_ns + number(22)? * TICK_NS,
        command: format!("[{name}]"),
        ..Default::default()
    })
}

fn effective_uid(status: &str) -> u32 {
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    line.and_then(|ids| ids.split_ascii_whitespace().nth(1)?.parse().ok()).unwrap_or(0)
}

fn boot_time_ns(stat: &str) -> u64 {
    let seconds: Option<u64> = stat.lines().find_map(|line| line.strip_prefix("btime ")?.trim().parse().ok());
    seconds.unwrap_or(0) * 1_000_000_000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_is_no_trouble() {
        let stat = "17 (a) (b) S 1 17 17 34816 20 4194304 100 0 0 0 250 50 0 0 20 0 1 0 12345 1 2 3";
        let process = parse_stat(stat, 1_000_000_000).unwrap();
        assert_eq!((process.pid, process.ppid, process.tty), (17, 1, 34816));
        assert_eq!((process.cpu_ns, process.started_at_ns), (3_000_000_000, 124_450_000_000));
        assert_eq!(process.command, "[a) (b]");
    }

    #[test]
    fn this_process_is_described() {
        let process = &describe(&[std::process::id(), u32::MAX])[..];
        assert_eq!(process.len(), 1);
        assert!(process[0].command.contains("katavm"), "{process:?}");
        assert!(process[0].started_at_ns > 0);
    }

    #[test]
    fn the_user_is_the_effective_one() {
        assert_eq!(effective_uid("Name:\tx\nUid:\t1\t2\t3\t4\n"), 2);
    }
}
