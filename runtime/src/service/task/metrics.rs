//! Statistics in the forms that containerd has for hosts with cgroup v2 (`io.containerd.cgroups.v2.Metrics`) and with v1
//! (`io.containerd.cgroups.v1.Metrics`). The guest always has v2.

use containerd_shim_protos::cgroups::metrics as v1_types;
use containerd_shim_protos::cgroups_v2::metrics::{CPUStat, MemoryEvents, MemoryStat, Metrics, PidsStat};
use katavm_protocol::agent::StatsResponse;
use protobuf::MessageField;

/// A limit of "max" is the largest number, as containerd has it.
fn limit(value: u64) -> u64 {
    if value == 0 { u64::MAX } else { value }
}

/// A container's statistics for a host with cgroup v1. What v1 counts of a group and of those below it is the same here.
pub fn v1(stats: &StatsResponse) -> v1_types::Metrics {
    /// In v1 times are nanoseconds, in v2 microseconds.
    const NS: u64 = 1000;
    let memory = |name: &str| stats.memory_stat.get(name).copied().unwrap_or_default();
    let (cache, rss, mapped) = (memory("file"), memory("anon"), memory("file_mapped"));
    let usage = v1_types::CPUUsage {
        total: stats.cpu_usage_usec.saturating_mul(NS),
        kernel: stats.cpu_system_usec.saturating_mul(NS),
        user: stats.cpu_user_usec.saturating_mul(NS),
        ..Default::default()
    };
    let throttling = v1_types::Throttle {
        periods: stats.cpu_nr_periods,
        throttled_periods: stats.cpu_nr_throttled,
        throttled_time: stats.cpu_throttled_usec.saturating_mul(NS),
        ..Default::default()
    };
    let entry = v1_types::MemoryEntry {
        limit: limit(stats.memory_max),
        usage: stats.memory_current,
        max: stats.memory_peak,
        ..Default::default()
    };
    let swap = v1_types::MemoryEntry {
        usage: stats.memory_current.saturating_add(stats.memory_swap_current),
        limit: u64::MAX,
        ..Default::default()
    };
    v1_types::Metrics {
        pids: MessageField::some(v1_types::PidsStat {
            current: stats.pids_current,
            limit: stats.pids_max,
            ..Default::default()
        }),
        cpu: MessageField::some(v1_types::CPUStat {
            usage: MessageField::some(usage),
            throttling: MessageField::some(throttling),
            ..Default::default()
        }),
        memory: MessageField::some(v1_types::MemoryStat {
            cache,
            rss,
            mapped_file: mapped,
            dirty: memory("file_dirty"),
            writeback: memory("file_writeback"),
            pg_fault: memory("pgfault"),
            pg_maj_fault: memory("pgmajfault"),
            inactive_anon: memory("inactive_anon"),
            active_anon: memory("active_anon"),
            inactive_file: memory("inactive_file"),
            active_file: memory("active_file"),
            unevictable: memory("unevictable"),
            hierarchical_memory_limit: limit(stats.memory_max),
            hierarchical_swap_limit: u64::MAX,
            total_cache: cache,
            total_rss: rss,
            total_mapped_file: mapped,
            total_dirty: memory("file_dirty"),
            total_writeback: memory("file_writeback"),
            total_pg_fault: memory("pgfault"),
            total_pg_maj_fault: memory("pgmajfault"),
            total_inactive_anon: memory("inactive_anon"),
            total_active_anon: memory("active_anon"),
            total_inactive_file: memory("inactive_file"),
            total_active_file: memory("active_file"),
            total_unevictable: memory("unevictable"),
            usage: MessageField::some(entry),
            swap: MessageField::some(swap),
            ..Default::default()
        }),
        memory_oom_control: MessageField::some(v1_types::MemoryOomControl {
            oom_kill: stats.memory_events.get("oom_kill").copied().unwrap_or_default(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// A container's statistics for a host with cgroup v2.
pub fn v2(stats: &StatsResponse) -> Metrics {
    let memory = |name: &str| stats.memory_stat.get(name).copied().unwrap_or_default();
    let event = |name: &str| stats.memory_events.get(name).copied().unwrap_or_default();
    Metrics {
        pids: MessageField::some(PidsStat { current: stats.pids_current, limit: stats.pids_max, ..Default::default() }),
        cpu: MessageField::some(CPUStat {
            usage_usec: stats.cpu_usage_usec,
            user_usec: stats.cpu_user_usec,
            system_usec: stats.cpu_system_usec,
            nr_periods: stats.cpu_nr_periods,
            nr_throttled: stats.cpu_nr_throttled,
            throttled_usec: stats.cpu_throttled_usec,
            ..Default::default()
        }),
        memory: MessageField::some(MemoryStat {
            anon: memory("anon"),
            file: memory("file"),
            kernel_stack: memory("kernel_stack"),
            slab: memory("slab"),
            sock: memory("sock"),
            shmem: memory("shmem"),
            file_mapped: memory("file_mapped"),
            file_dirty: memory("file_dirty"),
            file_writeback: memory("file_writeback"),
            anon_thp: memory("anon_thp"),
            inactive_anon: memory("inactive_anon"),
            active_anon: memory("active_anon"),
            inactive_file: memory("inactive_file"),
            active_file: memory("active_file"),
            unevictable: memory("unevictable"),
            slab_reclaimable: memory("slab_reclaimable"),
            slab_unreclaimable: memory("slab_unreclaimable"),
            pgfault: memory("pgfault"),
            pgmajfault: memory("pgmajfault"),
            usage: stats.memory_current,
            usage_limit: limit(stats.memory_max),
            swap_usage: stats.memory_swap_current,
            ..Default::default()
        }),
        memory_events: MessageField::some(MemoryEvents {
            low: event("low"),
            high: event("high"),
            max: event("max"),
            oom: event("oom"),
            oom_kill: event("oom_kill"),
            ..Default::default()
        }),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_tell_the_same() {
        let stats = StatsResponse {
            cpu_usage_usec: 5,
            memory_current: 4096,
            memory_stat: [("inactive_file".to_owned(), 1024)].into(),
            pids_current: 3,
            ..Default::default()
        };
        let (old, new) = (v1(&stats), v2(&stats));
        assert_eq!(old.cpu.usage.total, new.cpu.usage_usec * 1000);
        assert_eq!((old.memory.usage.usage, old.memory.total_inactive_file), (4096, new.memory.inactive_file));
        assert_eq!((old.memory.usage.limit, new.memory.usage_limit), (u64::MAX, u64::MAX));
        assert_eq!(old.pids.current, new.pids.current);
    }
}
