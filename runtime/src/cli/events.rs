//! `katavm events`

use std::io::Write;

use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use serde_json::{Value, json};

use super::arguments::{Events, Global};
use super::{control, find};
use crate::state::Status;

/// Prints statistics as runc does: one line of JSON, or one per interval until the container has ended.
///
/// # Errors
/// That it does not run.
pub fn events(global: &Global, options: &Events) -> anyhow::Result<u8> {
    loop {
        let found = find(global, &options.id)?;
        let client = control::client(&found, &format!("container with id {} is not running", options.id));
        let metrics = match client.and_then(|client| Ok(client.stats()?)) {
            Ok(metrics) => metrics,
            Err(_) if !options.stats && is_over(global, options) => return Ok(0),
            Err(error) => return Err(error),
        };
        writeln!(std::io::stdout(), "{}", line(options.id.as_str(), &metrics))?;
        if options.stats {
            return Ok(0);
        }
        std::thread::sleep(options.interval);
    }
}

fn is_over(global: &Global, options: &Events) -> bool {
    find(global, &options.id).map_or(true, |found| found.record.status == Status::Stopped)
}

fn line(id: &str, metrics: &Metrics) -> Value {
    let (cpu, memory, pids) = (&metrics.cpu, &metrics.memory, &metrics.pids);
    let events = &metrics.memory_events;
    let limit = |value: u64| if value == 0 { u64::MAX } else { value };
    json!({
        "type": "stats",
        "id": id,
        "data": {
            "cpu": {
                "usage": { "total": cpu.usage_usec * 1000, "kernel": cpu.system_usec * 1000, "user": cpu.user_usec * 1000 },
                "throttling": {
                    "periods": cpu.nr_periods,
                    "throttledPeriods": cpu.nr_throttled,
                    "throttledTime": cpu.throttled_usec * 1000,
                },
            },
            "memory": {
                "usage": { "limit": memory.usage_limit, "usage": memory.usage, "failcnt": events.max },
                "swap": { "limit": memory.swap_limit, "usage": memory.swap_usage, "failcnt": 0 },
                "raw": { "anon": memory.anon, "file": memory.file, "pgfault": memory.pgfault, "pgmajfault": memory.pgmajfault },
                "cache": memory.file,
            },
            "pids": { "current": pids.current, "limit": limit(pids.limit) },
        },
    })
}
