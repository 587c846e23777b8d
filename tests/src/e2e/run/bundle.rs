//! Bundles of busybox, made for one case each.

use std::fs;
use std::path::PathBuf;

use anyhow::Result;
use serde_json::{Value, json};

use super::super::Context;
use super::super::agent::rootfs;

/// A bundle of busybox with `args`, after `change` of its configuration.
pub fn bundle(context: &Context, args: &[&str], change: impl FnOnce(&mut Value)) -> Result<PathBuf> {
    rootfs(context)?;
    let all = json!(["CAP_CHOWN", "CAP_KILL", "CAP_DAC_OVERRIDE", "CAP_SETUID", "CAP_SETGID"]);
    let mut config = json!({
        "ociVersion": "1.2.0",
        "process": {
            "args": args, "cwd": "/", "user": {"uid": 0, "gid": 0}, "env": ["PATH=/bin"],
            "capabilities": {"bounding": all, "effective": all, "permitted": all},
        },
        "root": {"path": "rootfs"},
        "hostname": "case",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
        ],
        "linux": {"namespaces": [
            {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}, {"type": "cgroup"},
        ]},
    });
    change(&mut config);
    fs::write(context.scratch().join("config.json"), config.to_string())?;
    Ok(context.scratch().to_path_buf())
}

/// One whose process has a terminal, for a shell with `script`.
pub fn on_terminal(context: &Context, args: &[&str]) -> Result<PathBuf> {
    bundle(context, args, |config| {
        config["process"]["terminal"] = json!(true);
        config["process"]["env"] = json!(["PATH=/bin", "TERM=xterm", "PS1=$ "]);
        let options = ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"];
        let devpts = json!({"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": options});
        if let Some(mounts) = config["mounts"].as_array_mut() {
            mounts.push(devpts);
        }
    })
}
