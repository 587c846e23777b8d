//! The sandbox's control group on the host, by libcgroups: a folder of cgroup v2, or a scope that systemd makes.

use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use libcgroups::common::{
    AnyCgroupManager, CgroupConfig, CgroupManager as _, CgroupSetup, ControllerOpt, create_cgroup_manager,
    get_cgroup_setup,
};
use libcgroups_nix::unistd::Pid;
use oci_spec::runtime::LinuxResources;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Access, AtFlags, CWD, accessat};
use serde::{Deserialize, Serialize};

use super::children;
use super::users::is_root_of_host;

/// Where cgroup v2 is.
const ROOT: &str = "/sys/fs/cgroup";
/// How long killed processes may take to end.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where a control group is, by what an engine says of it. It is no proof that there is one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Cgroup {
    /// Below the root of cgroup v2; or `SLICE:PREFIX:NAME` for systemd.
    path: PathBuf,
    /// systemd makes it.
    systemd: bool,
    /// The container's id, which systemd shows.
    id: String,
    /// Where the process was that planned it, from the root of cgroup v2.
    #[serde(default)]
    origin: PathBuf,
}

impl Cgroup {
    /// The control group that `linux.cgroupsPath` asks for; where it says nothing, one beside this process' own, as
    /// runc has it. `None` on a host that has no cgroup v2 of its own. Whether systemd makes it is told by the form of
    /// `path` where nobody says so: containerd's clients ask by that alone.
    ///
    /// # Errors
    /// That this process' own cannot be found, or that `path` is none of systemd's.
    pub fn plan(path: Option<&Path>, systemd: Option<bool>, id: &str) -> io::Result<Option<Self>> {
        if !has_cgroup_v2() {
            return Ok(None);
        }
        let systemd = systemd.unwrap_or_else(|| path.is_some_and(names_scope));
        let path = match path {
            Some(path) if systemd => {
                let parts = path.to_str().map_or(0, |text| text.split(':').count());
                if parts != 3 {
                    let reason = format!("linux.cgroupsPath {} is not SLICE:PREFIX:NAME", path.display());
                    return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
                }
                path.to_owned()
            }
            None if systemd => format!(":katavm:{id}").into(),
            Some(path) if path.is_absolute() => path.to_owned(),
            Some(path) => own()?.join(path),
            None => own()?.parent().unwrap_or(Path::new("/")).join(id),
        };
        Ok(Some(Self { path, systemd, id: id.into(), origin: own()? }))
    }

    /// Whether this process can make it and move processes into it: root of a user namespace can where the host's root
    /// or the user's systemd has delegated a part of the tree to the user.
    ///
    /// # Errors
    /// What is missing.
    pub fn is_delegated(&self) -> io::Result<()> {
        if self.systemd {
            // Asks the user's systemd for its part of the tree.
            return self.manager().map(drop);
        }
        let path = self.folder();
        let there = path.ancestors().find(|folder| folder.exists()).unwrap_or(Path::new(ROOT));
        let access = |path: &Path| accessat(CWD, path, Access::WRITE_OK, AtFlags::EACCESS);
        let refused = |error| {
            let reason = format!("{} does not belong to this user: {error}", there.display());
            io::Error::new(io::ErrorKind::PermissionDenied, reason)
        };
        // Moving a process takes a right at the folder which has both groups below it (cgroups(7), "Delegation").
        let common = folder_of(&self.origin).ancestors().find(|folder| path.starts_with(folder)).map(Path::to_owned);
        let common = common.unwrap_or_else(|| ROOT.into()).join("cgroup.procs");
        access(there).and_then(|()| access(&common)).map_err(refused)
    }

    /// Moves a process into it, and makes it before where it is missing.
    ///
    /// # Errors
    /// What the kernel or systemd refuses.
    pub fn join(&self, pid: u32) -> io::Result<()> {
        let pid = Pid::from_raw(pid.cast_signed());
        self.manager()?.add_task(pid).map_err(|error| self.failed("join", &error))
    }

    /// Sets limits.
    ///
    /// # Errors
    /// What the kernel or systemd refuses.
    pub fn limit(&self, resources: &LinuxResources) -> io::Result<()> {
        let mut resources = resources.clone();
        if self.systemd {
            self.set_cpusets(&mut resources).map_err(|error| self.failed("limit", &error))?;
        } else if !self.folder().join("io.bfq.weight").exists() {
            set_io_weight(&mut resources);
        }
        let resources = &resources;
        let options = ControllerOpt { resources, disable_oom_killer: false, oom_score_adj: None, freezer_state: None };
        self.manager()?.apply(&options).map_err(|error| self.failed("limit", &error))
    }

    /// Removes it with what is still in it, this process apart; no error if there is none.
    ///
    /// # Errors
    /// What the kernel or systemd refuses.
    pub fn remove(&self) -> io::Result<()> {
        if self.holds(&own()?) {
            // The root is the one group that takes processes whatever is below it (cgroups(7)). A user's process can
            // go back to where it came from.
            let to = if is_root_of_host() { ROOT.into() } else { folder_of(&self.origin) };
            fs::write(to.join("cgroup.procs"), std::process::id().to_string())?;
        }
        if !self.systemd {
            self.empty()?;
        }
        self.manager()?.remove().map_err(|error| self.failed("remove", &error))
    }

    /// Kills what is in it, and waits for the end of that: a group with processes cannot be removed.
    fn empty(&self) -> io::Result<()> {
        let folder = self.folder();
        let mut events =
            match fs::write(folder.join("cgroup.kill"), "1").and_then(|()| File::open(folder.join("cgroup.events"))) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                events => events?,
            };
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut text = String::new();
            events.rewind()?;
            events.read_to_string(&mut text)?;
            let left = deadline.saturating_duration_since(Instant::now());
            if text.lines().any(|line| line == "populated 0") || left.is_zero() {
                return Ok(());
            }
            // The kernel tells of a change by POLLPRI (cgroups(7), "cgroup.events").
            let timeout = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
            poll(&mut [PollFd::new(&events, PollFlags::PRI)], Some(&timeout))?;
        }
    }

    /// Its folder, if it is not systemd's.
    fn folder(&self) -> PathBuf {
        folder_of(&self.path)
    }

    /// Whether a group, from the root of cgroup v2, is this one or in it.
    fn holds(&self, group: &Path) -> bool {
        if !self.systemd {
            return group.starts_with(&self.path);
        }
        self.scope().is_some_and(|scope| group.components().any(|part| part.as_os_str() == scope.as_str()))
    }

    /// The name of systemd's unit for it, if systemd makes it.
    fn scope(&self) -> Option<String> {
        let text = self.path.to_str().filter(|_| self.systemd)?;
        let mut parts = text.splitn(3, ':').skip(1);
        match (parts.next()?, parts.next()?) {
            ("", name) => Some(format!("{name}.scope")),
            (prefix, name) => Some(format!("{prefix}-{name}.scope")),
        }
    }

    /// Takes CPUs and memory nodes out of `resources`, and has systemd set them (systemd.resource-control(5)):
    /// libcgroups tells systemd of them in a type that it refuses.
    fn set_cpusets(&self, resources: &mut LinuxResources) -> io::Result<()> {
        let properties = take_cpusets(resources);
        let Some(scope) = self.scope().filter(|_| !properties.is_empty()) else { return Ok(()) };
        let mut command = Command::new("systemctl");
        if !is_root_of_host() {
            command.arg("--user");
        }
        let output = children::output(command.args(["set-property", "--runtime", &scope]).args(&properties))?;
        if output.status.success() {
            return Ok(());
        }
        let message = String::from_utf8_lossy(&output.stderr);
        Err(io::Error::other(format!("systemctl set-property {}: {}", properties.join(" "), message.trim())))
    }

    fn manager(&self) -> io::Result<AnyCgroupManager> {
        let config = CgroupConfig {
            cgroup_path: self.path.clone(),
            systemd_cgroup: self.systemd,
            container_name: self.id.clone(),
        };
        create_cgroup_manager(config).map_err(|error| self.failed("find", &error))
    }

    fn failed(&self, what: &str, error: &dyn std::fmt::Display) -> io::Error {
        io::Error::other(format!("cannot {what} the control group {}: {error}", self.path.display()))
    }
}

/// Takes CPUs and memory nodes out; gives them as properties of a unit of systemd.
fn take_cpusets(resources: &mut LinuxResources) -> Vec<String> {
    let mut properties = Vec::new();
    if let Some(mut cpu) = resources.cpu().clone() {
        properties.extend(cpu.cpus().iter().map(|cpus| format!("AllowedCPUs={cpus}")));
        properties.extend(cpu.mems().iter().map(|mems| format!("AllowedMemoryNodes={mems}")));
        cpu.set_cpus(None).set_mems(None);
        resources.set_cpu(Some(cpu));
    }
    if let Some(files) = resources.unified_mut() {
        properties.extend(files.remove("cpuset.cpus").map(|cpus| format!("AllowedCPUs={cpus}")));
        properties.extend(files.remove("cpuset.mems").map(|mems| format!("AllowedMemoryNodes={mems}")));
    }
    properties
}

/// Makes a weight of I/O one of cgroup v2, as runc does: 10 to 1000 become 1 to 10000. libcgroups does the same in 16 bits,
/// which are too few.
fn set_io_weight(resources: &mut LinuxResources) {
    let Some(mut io) = resources.block_io().clone() else { return };
    let Some(weight) = io.weight().filter(|weight| *weight > 0) else { return };
    io.set_weight(None);
    resources.set_block_io(Some(io));
    let weight = 1 + u64::from(weight.saturating_sub(10)) * 9999 / 990;
    let mut unified = resources.unified().clone().unwrap_or_default();
    unified.entry("io.weight".into()).or_insert_with(|| weight.to_string());
    resources.set_unified(Some(unified));
}

/// Whether this host has cgroup v2 alone.
#[must_use]
pub fn has_cgroup_v2() -> bool {
    matches!(get_cgroup_setup(), Ok(CgroupSetup::Unified))
}

/// The folder of a group.
fn folder_of(group: &Path) -> PathBuf {
    Path::new(ROOT).join(group.strip_prefix("/").unwrap_or(group))
}

/// This process' own, from the root of cgroup v2.
fn own() -> io::Result<PathBuf> {
    let text = fs::read_to_string("/proc/self/cgroup")?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::"));
    path.map(PathBuf::from).ok_or_else(|| io::Error::other("/proc/self/cgroup names no group of cgroup v2"))
}

/// Whether a path is one of systemd's, `SLICE:PREFIX:NAME`.
fn names_scope(path: &Path) -> bool {
    let parts: Vec<_> = path.to_str().unwrap_or_default().split(':').collect();
    matches!(parts[..], [slice, _, name] if slice.ends_with(".slice") && !slice.starts_with('/') && !name.is_empty())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn cgroup(path: &str, systemd: bool) -> Cgroup {
        Cgroup { path: path.into(), systemd, id: "c1".into(), origin: "/".into() }
    }

    #[test]
    fn what_systemd_is_told_of_by_its_own_client_is_not_left_to_the_library() {
        let text = json!({
            "cpu": { "shares": 512, "cpus": "0-1", "mems": "0" },
            "unified": { "cpuset.cpus": "1", "cpuset.mems": "1", "memory.high": "9" },
        });
        let mut resources = serde_json::from_value(text).unwrap();
        let properties =
            ["AllowedCPUs=0-1", "AllowedMemoryNodes=0", "AllowedCPUs=1", "AllowedMemoryNodes=1"].map(String::from);
        assert_eq!(take_cpusets(&mut resources), properties);
        let left = json!({ "cpu": { "shares": 512 }, "unified": { "memory.high": "9" } });
        assert_eq!(serde_json::to_value(&resources).unwrap(), left);
        assert_eq!(cgroup("machine.slice:katavm:c1", true).scope().as_deref(), Some("katavm-c1.scope"));
        assert_eq!(cgroup("machine.slice::c1", true).scope().as_deref(), Some("c1.scope"));
        assert_eq!(cgroup("/a/c1", false).scope(), None);
    }

    #[test]
    fn scopes_of_systemd_are_told_by_their_form() {
        assert!(names_scope(Path::new("kubepods-pod1.slice:cri-containerd:c1")));
        assert!(names_scope(Path::new("system.slice::c1")));
        for path in ["/kubepods/pod1/c1", "kubepods.slice:c1", "a:b:c", "kubepods.slice:x:", "/a.slice:b:c", ""] {
            assert!(!names_scope(Path::new(path)), "{path}");
        }
    }

    #[test]
    fn weights_of_io_are_those_of_cgroup_v2() {
        for (given, written) in [(10, "1"), (100, "910"), (500, "4950"), (1000, "10000")] {
            let json = serde_json::json!({ "blockIO": { "weight": given } });
            let mut resources: LinuxResources = serde_json::from_value(json).unwrap();
            set_io_weight(&mut resources);
            let unified = resources.unified().as_ref().unwrap();
            assert_eq!(unified.get("io.weight").map(String::as_str), Some(written));
            assert_eq!(resources.block_io().as_ref().unwrap().weight(), None);
        }
    }

    #[test]
    fn a_process_knows_when_it_is_inside() {
        let plain = cgroup("/a/c1", false);
        assert!(plain.holds(Path::new("/a/c1")) && plain.holds(Path::new("/a/c1/below")));
        assert!(!plain.holds(Path::new("/a")) && !plain.holds(Path::new("/a/c12")));
        let scope = cgroup("machine.slice:libpod:c1", true);
        assert!(scope.holds(Path::new("/machine.slice/libpod-c1.scope/container")));
        assert!(!scope.holds(Path::new("/machine.slice/libpod-c2.scope")));
    }
}
