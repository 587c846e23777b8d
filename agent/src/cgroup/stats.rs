//! Counters of a cgroup (v2) from the text of its files (Documentation/admin-guide/cgroup-v2.rst).

use std::fs;
use std::path::Path;

use katavm_protocol::agent::StatsResponse;

/// The counters of the group at `path`. A file that is not there (its controller is off) leaves zeroes.
pub fn read(path: &Path) -> StatsResponse {
    parse(|name| fs::read_to_string(path.join(name)).unwrap_or_default())
}

/// The counters from what `file` returns as the text of each file.
pub fn parse(file: impl Fn(&str) -> String) -> StatsResponse {
    let single = |name: &str| number(file(name).trim());
    let cpu = file("cpu.stat");
    let cpu = |key: &str| pairs(&cpu).find(|(name, _)| *name == key).map_or(0, |(_, value)| value);
    let map = |name: &str| pairs(&file(name)).map(|(key, value)| (key.to_owned(), value)).collect();
    StatsResponse {
        cpu_usage_usec: cpu("usage_usec"),
        cpu_user_usec: cpu("user_usec"),
        cpu_system_usec: cpu("system_usec"),
        cpu_nr_periods: cpu("nr_periods"),
        cpu_nr_throttled: cpu("nr_throttled"),
        cpu_throttled_usec: cpu("throttled_usec"),
        memory_current: single("memory.current"),
        memory_peak: single("memory.peak"),
        memory_max: single("memory.max"),
        memory_swap_current: single("memory.swap.current"),
        memory_stat: map("memory.stat"),
        memory_events: map("memory.events"),
        pids_current: single("pids.current"),
        pids_max: single("pids.max"),
        ..Default::default()
    }
}

/// The lines of a flat-keyed file, `KEY VALUE`; other lines are left out.
pub fn pairs(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.lines().filter_map(|line| {
        let (key, value) = line.split_once(' ')?;
        Some((key, value.parse().ok()?))
    })
}

/// A number; "max", which is no limit, is 0.
fn number(text: &str) -> u64 {
    text.parse().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str) -> String {
        match name {
            "cpu.stat" => {
                "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\nnr_periods 3\nnr_throttled 2\n\
                           throttled_usec 70\nnr_bursts 0\n"
            }
            "memory.current" => "4096\n",
            "memory.max" => "max\n",
            "pids.max" => "100\n",
            "memory.stat" => "anon 12\nfile 34\nodd line here\n",
            "memory.events" => "low 0\noom 2\noom_kill 1\n",
            _ => "",
        }
        .to_owned()
    }

    #[test]
    fn counters_come_from_their_files() {
        let stats = parse(file);
        assert_eq!((stats.cpu_usage_usec, stats.cpu_user_usec, stats.cpu_system_usec), (1500, 1000, 500));
        assert_eq!((stats.cpu_nr_periods, stats.cpu_nr_throttled, stats.cpu_throttled_usec), (3, 2, 70));
        assert_eq!((stats.memory_current, stats.memory_max, stats.memory_peak), (4096, 0, 0));
        assert_eq!(stats.pids_max, 100);
        assert_eq!(stats.memory_stat.get("file"), Some(&34));
        assert_eq!(stats.memory_stat.len(), 2);
        assert_eq!(stats.memory_events.get("oom_kill"), Some(&1));
    }

    #[test]
    fn an_absent_controller_is_zero() {
        assert_eq!(parse(|_| String::new()), StatsResponse::default());
    }
}
