//! Every field of config.json and what becomes of it, as a table: nothing that is not honoured is dropped in silence.
//!
//! The table is matched against the keys of the JSON itself, so a key that no type of ours knows is named as well.

use std::fmt;

use serde_json::Value;

/// A field that was given and will have no effect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unhonoured {
    /// As a path: `linux.resources.blockIO`, `mounts[3].uidMappings`.
    pub field: String,
    /// Why.
    pub reason: &'static str,
}

impl fmt::Display for Unhonoured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "config.json: {} is not honoured: {}", self.field, self.reason)
    }
}

enum Fate {
    /// It is done, with everything in it.
    Honoured,
    /// What is in it has a row of its own.
    Parts,
    /// It has no effect.
    Ignored(&'static str),
}
use Fate::{Honoured, Ignored, Parts};

const UNKNOWN: &str = "unknown field";
const CGROUP_V1: &str = "the guest has cgroup v2 only, which has no such setting";
const NO_LSM: &str = "the guest's kernel has no such security module; the virtual machine is the boundary";
const HOST_CPUS: &str = "it names CPUs or memory nodes of the host; the guest has its own";
const OTHER_SYSTEM: &str = "not for Linux containers";

/// Fields by their path; `[]` stands for each element of an array.
#[rustfmt::skip]
const TABLE: &[(&str, Fate)] = &[
    ("ociVersion", Honoured),
    ("root", Parts),
    ("root.path", Honoured),
    ("root.readonly", Honoured),
    ("hostname", Honoured),
    ("domainname", Honoured),
    // They are for whoever asks; none of them tells a runtime to do something.
    ("annotations", Honoured),
    ("process", Parts),
    ("process.terminal", Honoured),
    ("process.consoleSize", Honoured),
    ("process.user", Parts),
    ("process.user.uid", Honoured),
    ("process.user.gid", Honoured),
    ("process.user.umask", Honoured),
    ("process.user.additionalGids", Honoured),
    ("process.user.username", Ignored(OTHER_SYSTEM)),
    ("process.args", Honoured),
    ("process.commandLine", Ignored(OTHER_SYSTEM)),
    ("process.env", Honoured),
    ("process.cwd", Honoured),
    ("process.capabilities", Honoured),
    ("process.rlimits", Honoured),
    ("process.noNewPrivileges", Honoured),
    ("process.oomScoreAdj", Honoured),
    ("process.ioPriority", Honoured),
    ("process.scheduler", Honoured),
    ("process.apparmorProfile", Ignored(NO_LSM)),
    ("process.selinuxLabel", Ignored(NO_LSM)),
    // It is about further processes: nothing to do for the first one.
    ("process.execCPUAffinity", Honoured),
    ("mounts", Parts),
    ("mounts[].destination", Honoured),
    ("mounts[].type", Honoured),
    ("mounts[].source", Honoured),
    ("mounts[].options", Honoured),
    ("mounts[].uidMappings", Honoured),
    ("mounts[].gidMappings", Honoured),
    ("hooks", Parts),
    ("hooks.prestart", Honoured),
    ("hooks.createRuntime", Honoured),
    ("hooks.createContainer", Honoured),
    ("hooks.startContainer", Honoured),
    ("hooks.poststart", Honoured),
    ("hooks.poststop", Honoured),
    ("linux", Parts),
    ("linux.devices", Honoured),
    ("linux.uidMappings", Honoured),
    ("linux.gidMappings", Honoured),
    ("linux.sysctl", Honoured),
    ("linux.cgroupsPath", Honoured),
    ("linux.namespaces", Parts),
    ("linux.namespaces[].type", Honoured),
    // Which ones mean something is `membership`'s to say.
    ("linux.namespaces[].path", Honoured),
    ("linux.resources", Parts),
    ("linux.resources.devices", Parts),
    ("linux.resources.devices[].allow", Honoured),
    ("linux.resources.devices[].type", Honoured),
    ("linux.resources.devices[].major", Honoured),
    ("linux.resources.devices[].minor", Honoured),
    ("linux.resources.devices[].access", Honoured),
    ("linux.resources.memory", Parts),
    ("linux.resources.memory.limit", Honoured),
    ("linux.resources.memory.reservation", Honoured),
    ("linux.resources.memory.swap", Honoured),
    ("linux.resources.memory.kernel", Ignored(CGROUP_V1)),
    ("linux.resources.memory.kernelTCP", Ignored(CGROUP_V1)),
    ("linux.resources.memory.swappiness", Ignored(CGROUP_V1)),
    ("linux.resources.memory.disableOOMKiller", Ignored(CGROUP_V1)),
    // cgroup v2 is always hierarchical; a limit below the use cannot be, as nothing runs yet.
    ("linux.resources.memory.useHierarchy", Honoured),
    ("linux.resources.memory.checkBeforeUpdate", Honoured),
    ("linux.resources.cpu", Parts),
    ("linux.resources.cpu.shares", Honoured),
    ("linux.resources.cpu.quota", Honoured),
    ("linux.resources.cpu.burst", Honoured),
    ("linux.resources.cpu.period", Honoured),
    ("linux.resources.cpu.idle", Honoured),
    ("linux.resources.cpu.realtimeRuntime", Ignored(CGROUP_V1)),
    ("linux.resources.cpu.realtimePeriod", Ignored(CGROUP_V1)),
    ("linux.resources.cpu.cpus", Ignored(HOST_CPUS)),
    ("linux.resources.cpu.mems", Ignored(HOST_CPUS)),
    ("linux.resources.pids", Honoured),
    ("linux.resources.blockIO", Honoured),
    ("linux.resources.hugepageLimits", Honoured),
    ("linux.resources.network", Ignored(CGROUP_V1)),
    ("linux.resources.rdma", Ignored("the guest has no RDMA device")),
    ("linux.resources.unified", Honoured),
    ("linux.seccomp", Honoured),
    ("linux.rootfsPropagation", Honoured),
    ("linux.maskedPaths", Honoured),
    ("linux.readonlyPaths", Honoured),
    ("linux.mountLabel", Ignored(NO_LSM)),
    ("linux.intelRdt", Ignored("the guest's CPUs have no resource control")),
    ("linux.memoryPolicy", Ignored(HOST_CPUS)),
    ("linux.personality", Honoured),
    ("linux.timeOffsets", Honoured),
    ("linux.netDevices", Ignored("a device of the host cannot be moved into a guest")),
    ("vm", Ignored("katavm brings its own virtual machine; --kernel and --initrd choose what it boots")),
    ("windows", Ignored(OTHER_SYSTEM)),
    ("solaris", Ignored(OTHER_SYSTEM)),
    ("zos", Ignored(OTHER_SYSTEM)),
    ("freebsd", Ignored(OTHER_SYSTEM)),
];

/// The fields of a configuration that will have no effect.
#[must_use]
pub fn unhonoured(config: &Value) -> Vec<Unhonoured> {
    let mut found = Vec::new();
    walk(config, "", "", &mut found);
    found
}

/// `pattern` is the table's name of the value, `field` the person's.
fn walk(value: &Value, pattern: &str, field: &str, found: &mut Vec<Unhonoured>) {
    match value {
        Value::Object(entries) => {
            for (key, value) in entries {
                let dot = if pattern.is_empty() { "" } else { "." };
                judge(value, &format!("{pattern}{dot}{key}"), format!("{field}{dot}{key}"), found);
            }
        }
        Value::Array(elements) => {
            for (index, element) in elements.iter().enumerate() {
                walk(element, &format!("{pattern}[]"), &format!("{field}[{index}]"), found);
            }
        }
        _ => {}
    }
}

fn judge(value: &Value, pattern: &str, field: String, found: &mut Vec<Unhonoured>) {
    if says_nothing(value) {
        return;
    }
    match TABLE.iter().find(|(known, _)| *known == pattern).map(|(_, fate)| fate) {
        Some(Honoured) => {}
        Some(Parts) => walk(value, pattern, &field, found),
        Some(Ignored(reason)) => found.push(Unhonoured { field, reason }),
        None => found.push(Unhonoured { field, reason: UNKNOWN }),
    }
}

/// Whether a value asks for nothing, as generators of configurations write where they have nothing to say.
fn says_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(elements) => elements.iter().all(says_nothing),
        Value::Object(entries) => entries.values().all(says_nothing),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fields(config: &Value) -> Vec<String> {
        unhonoured(config).into_iter().map(|u| u.field).collect()
    }

    #[test]
    fn what_is_not_honoured_is_named_with_its_place() {
        let config = json!({
            "hooks": { "prestart": [{ "path": "/bin/true" }], "startContainer": [{ "path": "/x" }], "poststop": [] },
            "process": { "apparmorProfile": "x", "selinuxLabel": "", "args": ["sh"] },
            "mounts": [{ "destination": "/a" }, { "destination": "/b", "options": ["bind", "idmap"], "uidMappings": [{ "hostID": 1 }] }],
            "linux": { "resources": { "blockIO": { "weight": 10 }, "rdma": { "x": {} },
                                      "memory": { "limit": 5, "kernel": 7, "disableOOMKiller": false } },
                       "namespaces": [{ "type": "network", "path": "/run/netns/x" }] },
            "freebsd": { "jail": 1 },
        });
        let mut expected = ["process.apparmorProfile", "linux.resources.memory.kernel", "freebsd"];
        let mut named = fields(&config);
        named.sort_unstable();
        expected.sort_unstable();
        assert_eq!(named, expected);
    }

    #[test]
    fn unknown_fields_are_named_wherever_they_are() {
        let config = json!({ "proces": { "args": [1] }, "process": { "arg": [1] }, "mounts": [{ "form": "x" }] });
        let mut named = fields(&config);
        named.sort_unstable();
        assert_eq!(named, ["mounts[0].form", "proces", "process.arg"]);
        assert!(unhonoured(&config).iter().all(|u| u.reason == UNKNOWN));
    }

    #[test]
    fn every_field_of_the_specification_has_a_row() {
        // The specification's types, all fields set, serialised: no key may be unknown.
        let full = json!({
            "ociVersion": "1.2.0", "hostname": "h", "domainname": "d", "annotations": { "a": "b" },
            "process": {
                "terminal": true, "consoleSize": { "height": 1, "width": 1 }, "commandLine": "x",
                "user": { "uid": 1, "gid": 1, "umask": 1, "additionalGids": [1], "username": "u" },
                "args": ["a"], "env": ["a"], "cwd": "/", "capabilities": { "bounding": ["CAP_KILL"] },
                "rlimits": [{}], "noNewPrivileges": true, "apparmorProfile": "x", "oomScoreAdj": 1,
                "selinuxLabel": "x", "ioPriority": { "class": "x" }, "scheduler": { "policy": "x" },
                "execCPUAffinity": { "initial": "1" },
            },
            "linux": {
                "netDevices": { "a": {} }, "uidMappings": [{}], "gidMappings": [{}], "sysctl": { "a": "b" },
                "cgroupsPath": "/a", "devices": [{ "a": 1 }], "seccomp": { "a": 1 }, "rootfsPropagation": "x",
                "maskedPaths": ["a"], "readonlyPaths": ["a"], "mountLabel": "x", "intelRdt": { "a": 1 },
                "memoryPolicy": { "a": 1 }, "personality": { "a": 1 }, "timeOffsets": { "a": 1 },
                "resources": {
                    "devices": [{ "allow": true, "type": "c", "major": 1, "minor": 1, "access": "r" }],
                    "memory": { "limit": 1, "reservation": 1, "swap": 1, "kernel": 1, "kernelTCP": 1, "swappiness": 1,
                                "disableOOMKiller": true, "useHierarchy": true, "checkBeforeUpdate": true },
                    "cpu": { "shares": 1, "quota": 1, "idle": 1, "burst": 1, "period": 1, "realtimeRuntime": 1,
                             "realtimePeriod": 1, "cpus": "1", "mems": "1" },
                    "pids": { "limit": 1 }, "blockIO": { "weight": 1 }, "hugepageLimits": [{}],
                    "network": { "classID": 1 }, "rdma": { "a": 1 }, "unified": { "a": "b" },
                },
            },
        });
        let unknown: Vec<_> = unhonoured(&full).into_iter().filter(|u| u.reason == UNKNOWN).collect();
        assert_eq!(unknown, []);
    }

    #[test]
    fn no_row_is_there_twice_or_out_of_reach() {
        for (index, (field, _)) in TABLE.iter().enumerate() {
            assert!(TABLE.iter().skip(index + 1).all(|(other, _)| other != field), "{field} is there twice");
            if let Some((parent, _)) = field.rsplit_once('.') {
                let parent = parent.trim_end_matches("[]");
                let row = TABLE.iter().find(|(known, _)| *known == parent);
                assert!(matches!(row, Some((_, Parts))), "{field} is never reached");
            }
        }
    }
}
