//! Statistics in the form that containerd has for cgroup v2 (`io.containerd.cgroups.v2.Metrics`).

use containerd_shim_protos::cgroups_v2::metrics::{CPUStat, MemoryEvents, MemoryStat, Metrics, PidsStat};
use katavm_protocol::agent::StatsResponse;
use protobuf::MessageField;

/// A container's statistics; a limit of "max" is the largest number, as containerd has it.
pub fn v2(stats: &StatsResponse) -> Metrics {
    let limit = |value: u64| if value == 0 { u64::MAX } else { value };
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
