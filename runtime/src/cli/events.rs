//! `katavm events`

use std::io::Write;
use std::time::{Duration, Instant};

use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use serde::Serialize;
use serde_json::{Value, json};

use super::arguments::{Events, Global};
use super::{control, find};
use crate::link::ToWatcher;

/// Prints what happens as runc does, one line of JSON each: statistics once per interval, and each process that the
/// guest's kernel kills for want of memory, until the container has ended. Or the statistics of this moment alone.
///
/// # Errors
/// That it does not run.
pub fn events(global: &Global, options: &Events) -> anyhow::Result<u8> {
    let (found, id) = (find(global, &options.id)?, options.id.as_str());
    let client = control::client(&found, &format!("container with id {id} is not running"))?;
    if options.stats {
        print("stats", id, Some(data(&client.stats()?)))?;
        return Ok(0);
    }
    let watch = client.watch()?;
    let mut due = Instant::now() + options.interval;
    loop {
        if watch.wait(due.saturating_duration_since(Instant::now()))? {
            match watch.next()? {
                Some(ToWatcher::OutOfMemory) => print("oom", id, None)?,
                Some(ToWatcher::Exited) | None => return Ok(0),
                Some(ToWatcher::Heard | ToWatcher::Refused(_)) => {}
            }
            continue;
        }
        due += options.interval;
        match client.stats() {
            Ok(metrics) => print("stats", id, Some(data(&metrics)))?,
            // It ended just now, which the watch tells.
            Err(_) if watch.wait(Duration::ZERO)? => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Its fields are in the order in which runc prints them, which people look for.
#[derive(Serialize)]
struct Line<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Value>,
}

fn print(kind: &'static str, id: &str, data: Option<Value>) -> std::io::Result<()> {
    writeln!(std::io::stdout(), "{}", serde_json::to_string(&Line { kind, id, data })?)
}

fn data(metrics: &Metrics) -> Value {
    let (cpu, memory, pids) = (&metrics.cpu, &metrics.memory, &metrics.pids);
    let events = &metrics.memory_events;
    let limit = |value: u64| if value == 0 { u64::MAX } else { value };
    json!({
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
    })
}
