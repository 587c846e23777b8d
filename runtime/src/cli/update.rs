//! `katavm update`

use std::io::Read;
use std::path::Path;

use anyhow::Context;
use serde_json::{Map, Value, json};

use super::arguments::{Global, Update};
use super::{control, find};

/// Changes the limits of a container.
///
/// # Errors
/// That it does not run, or that a limit is refused.
pub fn update(global: &Global, options: &Update) -> anyhow::Result<u8> {
    let found = find(global, &options.id)?;
    let resources = match &options.resources {
        Some(path) => read(path)?,
        None => from_options(options),
    };
    control::client(&found, "container not running")?.update(serde_json::to_vec(&resources)?)?;
    Ok(0)
}

fn read(path: &Path) -> anyhow::Result<Value> {
    let mut text = Vec::new();
    if path == Path::new("-") {
        std::io::stdin().read_to_end(&mut text).context("cannot read standard input")?;
    } else {
        text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    }
    serde_json::from_slice(&text).with_context(|| format!("{} holds no resources", path.display()))
}

fn from_options(options: &Update) -> Value {
    let object = |fields: &[(&str, Option<Value>)]| -> Value {
        let given = fields.iter().filter_map(|(name, value)| Some(((*name).to_owned(), value.clone()?)));
        Value::Object(given.collect::<Map<_, _>>())
    };
    let memory = object(&[
        ("limit", options.memory.map(Value::from)),
        ("reservation", options.memory_reservation.map(Value::from)),
        ("swap", options.memory_swap.map(Value::from)),
    ]);
    let cpu = object(&[
        ("shares", options.cpu_share.map(Value::from)),
        ("quota", options.cpu_quota.map(Value::from)),
        ("period", options.cpu_period.map(Value::from)),
        ("burst", options.cpu_burst.map(Value::from)),
        ("idle", options.cpu_idle.map(Value::from)),
        ("realtimePeriod", options.cpu_rt_period.map(Value::from)),
        ("realtimeRuntime", options.cpu_rt_runtime.map(Value::from)),
        ("cpus", options.cpuset_cpus.clone().map(Value::from)),
        ("mems", options.cpuset_mems.clone().map(Value::from)),
    ]);
    let block_io = options.blkio_weight.map(|weight| json!({ "weight": weight }));
    let pids = options.pids_limit.map(|limit| json!({ "limit": limit }));
    let given = |value: Value| value.as_object().is_some_and(|fields| !fields.is_empty()).then_some(value);
    object(&[("memory", given(memory)), ("cpu", given(cpu)), ("pids", pids), ("blockIO", block_io)])
}
