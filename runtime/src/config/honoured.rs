//! What of a config.json will have no effect: nothing that is not honoured is dropped in silence.
//!
//! The table of the fields is matched against the keys of the JSON itself, so a key that no type of ours knows is named
//! as well.

use std::fmt;

use serde_json::Value;

use super::fields::{Fate, TABLE};

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

const UNKNOWN: &str = "unknown field";

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
        // One that is refused is found by `validate`.
        Some(Fate::Guest(_) | Fate::Host(_) | Fate::Both(_) | Fate::Nothing(_) | Fate::Refused(_)) => {}
        Some(Fate::Parts) => walk(value, pattern, &field, found),
        Some(Fate::Ignored(reason)) => found.push(Unhonoured { field, reason }),
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
            "linux": { "resources": { "blockIO": { "weight": 10, "leafWeight": 7 }, "rdma": { "x": {} },
                                      "memory": { "limit": 5, "kernel": 7, "disableOOMKiller": false } },
                       "namespaces": [{ "type": "network", "path": "/run/netns/x" }] },
            "freebsd": { "jail": 1 },
        });
        let mut expected = [
            "process.apparmorProfile",
            "linux.resources.memory.kernel",
            "linux.resources.blockIO.leafWeight",
            "freebsd",
        ];
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
        let mapping = json!([{ "containerID": 1, "hostID": 1, "size": 1 }]);
        let hooks = json!([{ "path": "/a", "args": ["a"], "env": ["a"], "timeout": 1 }]);
        let throttle = json!([{ "major": 1, "minor": 1, "rate": 1 }]);
        let full = json!({
            "ociVersion": "1.2.0", "hostname": "h", "domainname": "d", "annotations": { "a": "b" },
            "root": { "path": "rootfs", "readonly": true },
            "process": {
                "terminal": true, "consoleSize": { "height": 1, "width": 1 }, "commandLine": "x",
                "user": { "uid": 1, "gid": 1, "umask": 1, "additionalGids": [1], "username": "u" },
                "args": ["a"], "env": ["a"], "cwd": "/",
                "capabilities": { "bounding": ["a"], "effective": ["a"], "inheritable": ["a"], "permitted": ["a"], "ambient": ["a"] },
                "rlimits": [{ "type": "RLIMIT_CORE", "soft": 1, "hard": 1 }], "noNewPrivileges": true,
                "apparmorProfile": "x", "oomScoreAdj": 1, "selinuxLabel": "x",
                "ioPriority": { "class": "x", "priority": 1 },
                "scheduler": { "policy": "x", "nice": 1, "priority": 1, "flags": ["a"], "runtime": 1, "deadline": 1, "period": 1 },
                "execCPUAffinity": { "initial": "1", "final": "1" },
            },
            "mounts": [{ "destination": "/a", "type": "a", "source": "a", "options": ["a"],
                         "uidMappings": mapping, "gidMappings": mapping }],
            "hooks": { "prestart": hooks, "createRuntime": hooks, "createContainer": hooks, "startContainer": hooks,
                       "poststart": hooks, "poststop": hooks },
            "linux": {
                "netDevices": { "a": { "name": "b" } }, "uidMappings": mapping, "gidMappings": mapping,
                "sysctl": { "a": "b" }, "cgroupsPath": "/a", "namespaces": [{ "type": "network", "path": "/a" }],
                "devices": [{ "type": "c", "path": "/a", "major": 1, "minor": 1, "fileMode": 1, "uid": 1, "gid": 1 }],
                "seccomp": {
                    "defaultAction": "a", "defaultErrnoRet": 1, "architectures": ["a"], "flags": ["a"],
                    "listenerPath": "/a", "listenerMetadata": "a",
                    "syscalls": [{ "names": ["a"], "action": "a", "errnoRet": 1, "args": [{ "index": 1 }] }],
                },
                "rootfsPropagation": "x", "maskedPaths": ["a"], "readonlyPaths": ["a"], "mountLabel": "x",
                "intelRdt": { "closID": "a", "schemata": ["a"], "l3CacheSchema": "a", "memBwSchema": "a", "enableCMT": true,
                              "enableMBM": true, "enableMonitoring": true },
                "memoryPolicy": { "mode": "a", "nodes": "a", "flags": ["a"] },
                "personality": { "domain": "a", "flags": ["a"] },
                "timeOffsets": { "boottime": { "secs": 1, "nanosecs": 1 } },
                "resources": {
                    "devices": [{ "allow": true, "type": "c", "major": 1, "minor": 1, "access": "r" }],
                    "memory": { "limit": 1, "reservation": 1, "swap": 1, "kernel": 1, "kernelTCP": 1, "swappiness": 1,
                                "disableOOMKiller": true, "useHierarchy": true, "checkBeforeUpdate": true },
                    "cpu": { "shares": 1, "quota": 1, "idle": 1, "burst": 1, "period": 1, "realtimeRuntime": 1,
                             "realtimePeriod": 1, "cpus": "1", "mems": "1" },
                    "pids": { "limit": 1 },
                    "blockIO": {
                        "weight": 1, "leafWeight": 1,
                        "weightDevice": [{ "major": 1, "minor": 1, "weight": 1, "leafWeight": 1 }],
                        "throttleReadBpsDevice": throttle, "throttleWriteBpsDevice": throttle,
                        "throttleReadIOPSDevice": throttle, "throttleWriteIOPSDevice": throttle,
                    },
                    "hugepageLimits": [{ "pageSize": "a", "limit": 1 }],
                    "network": { "classID": 1, "priorities": [{ "name": "a", "priority": 1 }] },
                    "rdma": { "a": { "hcaHandles": 1 } }, "unified": { "a": "b" },
                },
            },
            "vm": { "a": 1 }, "windows": { "a": 1 }, "solaris": { "a": 1 }, "zos": { "a": 1 }, "freebsd": { "a": 1 },
        });
        let unknown: Vec<_> = unhonoured(&full).into_iter().filter(|u| u.reason == UNKNOWN).collect();
        assert_eq!(unknown, []);
    }
}
