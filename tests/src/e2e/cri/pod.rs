//! A pod of a case.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::node::{BUSYBOX, Node, until};
use crate::cri::messages::{ContainerState, ContainerStatus};

/// The control groups of pods, as the kubelet has them.
const GROUPS: &str = "/kubepods";

/// A pod and its configuration.
pub struct Pod<'a> {
    node: &'a Node,
    config: Value,
    name: String,
    /// The CRI's.
    pub id: String,
}

impl<'a> Pod<'a> {
    /// Runs one, after `change` of the configuration that the kubelet would write.
    pub fn run(node: &'a Node, name: &str, change: impl FnOnce(&mut Value)) -> Result<Self> {
        Self::run_with(node, name, &super::handler(), change)
    }

    /// The same of a runtime class.
    pub fn run_with(node: &'a Node, name: &str, handler: &str, change: impl FnOnce(&mut Value)) -> Result<Self> {
        let group = format!("{GROUPS}/{name}");
        let mut config = json!({
            "metadata": { "name": name, "uid": name, "namespace": "default" },
            "hostname": name,
            "log_directory": logs(node, name),
            "dns_config": { "servers": ["10.88.0.53"], "searches": ["default.svc.cluster.local"], "options": ["ndots:5"] },
            "linux": {
                "cgroup_parent": group,
                "security_context": { "namespace_options": { "pid": "CONTAINER" } },
            },
        });
        change(&mut config);
        // The kubelet's part.
        fs::create_dir_all(logs(node, name))?;
        let id = node.cri.run_pod(&config, handler)?;
        Ok(Self { node, config, name: name.into(), id })
    }

    /// Makes a container of busybox, after `change` of its configuration.
    pub fn create(&self, name: &str, command: &[&str], change: impl FnOnce(&mut Value)) -> Result<String> {
        let mut config = json!({
            "metadata": { "name": name },
            "image": { "image": BUSYBOX },
            "command": command,
            "log_path": format!("{name}.log"),
            "linux": { "security_context": { "namespace_options": { "pid": "CONTAINER" } } },
        });
        change(&mut config);
        self.node.cri.create_container(&self.id, &self.config, &config).with_context(|| format!("container {name}"))
    }

    /// The same, and starts it.
    pub fn start(&self, name: &str, command: &[&str], change: impl FnOnce(&mut Value)) -> Result<String> {
        let id = self.create(name, command, change)?;
        self.node.cri.start_container(&id)?;
        Ok(id)
    }

    /// A container that only waits.
    pub fn idle(&self, name: &str) -> Result<String> {
        self.start(name, &["sleep", "100000"], |_| ())
    }

    /// What a script prints in a container; it must end well.
    pub fn sh(&self, container: &str, script: &str) -> Result<String> {
        let done = self.node.cri.exec_sync(container, &["sh", "-ec", script], 60)?;
        let (stdout, stderr) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
        ensure!(done.exit_code == 0, "{script}: code {}: {stdout}{stderr}", done.exit_code);
        Ok(stdout.trim_end().to_owned())
    }

    /// Waits for a container's end.
    pub fn ended(&self, container: &str) -> Result<ContainerStatus> {
        let status = || self.node.cri.container_status(container);
        until(&format!("container {container} does not end"), || {
            Ok(status()?.state.enum_value_or_default() == ContainerState::CONTAINER_EXITED)
        })?;
        Ok(status()?)
    }

    /// The file of a container's log.
    pub fn log_file(&self, name: &str) -> PathBuf {
        Path::new(&logs(self.node, &self.name)).join(format!("{name}.log"))
    }

    /// A container's log: for each line its stream, its tag and its text. Each has the time in front.
    pub fn log(&self, name: &str) -> Result<Vec<String>> {
        let text = fs::read_to_string(self.log_file(name))?;
        text.lines()
            .map(|line| {
                let (time, rest) = line.split_once(' ').with_context(|| format!("log line {line:?}"))?;
                ensure!(time.len() >= 20 && time.as_bytes().get(10) == Some(&b'T'), "the time of log line {line:?}");
                Ok(rest.to_owned())
            })
            .collect()
    }

    /// The pod's address.
    pub fn ip(&self) -> Result<String> {
        let status = self.node.cri.pod_status(&self.id)?;
        Ok(status.network.unwrap_or_default().ip)
    }

    /// Stops and removes it, and the kubelet's part of it, which nothing may use any more.
    pub fn remove(self) -> Result<()> {
        self.node.cri.stop_pod(&self.id)?;
        self.node.cri.remove_pod(&self.id)?;
        self.tidy()
    }

    /// The kubelet's part of a removal.
    pub fn tidy(self) -> Result<()> {
        fs::remove_dir_all(logs(self.node, &self.name))?;
        let group = Path::new("/sys/fs/cgroup").join(GROUPS.trim_start_matches('/')).join(&self.name);
        // The last process may be on its way out of it.
        until(&format!("{} is in use", group.display()), || Ok(!group.exists() || fs::remove_dir(&group).is_ok()))?;
        // Other pods may be in there.
        let _ = group.parent().map(fs::remove_dir);
        Ok(())
    }
}

fn logs(node: &Node, pod: &str) -> String {
    node.folder().join("logs").join(pod).display().to_string()
}
