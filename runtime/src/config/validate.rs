//! What a configuration must have for a container to be made of it, and what cannot be had at all.

use oci_spec::runtime::{LinuxNamespaceType, LinuxSeccomp, LinuxSeccompAction, Spec};

/// As `--network host` asks for.
const HOST_NETWORK: &str = "linux.namespaces has no network namespace, which means the host's network: a guest cannot share it. \
                            Give the container a network namespace, new or by its path";

/// The fault of a configuration that cannot be run, with the field's name.
pub fn check(spec: &Spec) -> Result<(), String> {
    let version = spec.version();
    if !version.starts_with("1.") {
        return Err(format!("ociVersion {version:?} is not supported: it must be 1.x"));
    }
    if spec.root().is_none() {
        return Err("root is missing".into());
    }
    let Some(process) = spec.process() else {
        return Err("process is missing: there is nothing to run".into());
    };
    let args = process.args().as_deref().unwrap_or_default();
    if args.is_empty() {
        return Err("process.args must not be empty".into());
    }
    if args.iter().chain(process.env().iter().flatten()).any(|text| text.contains('\0')) {
        return Err("process.args and process.env must not contain NUL".into());
    }
    if !process.cwd().is_absolute() {
        return Err(format!("process.cwd {:?} must be an absolute path", process.cwd().display().to_string()));
    }
    let Some(linux) = spec.linux() else {
        return Err("linux is missing: only Linux containers are supported".into());
    };
    let namespaces = linux.namespaces().as_deref().unwrap_or_default();
    if !namespaces.iter().any(|namespace| namespace.typ() == LinuxNamespaceType::Network) {
        return Err(HOST_NETWORK.into());
    }
    for (index, mount) in spec.mounts().iter().flatten().enumerate() {
        if !mount.destination().is_absolute() {
            let destination = mount.destination().display();
            return Err(format!("mounts[{index}].destination \"{destination}\" must be an absolute path"));
        }
    }
    linux.seccomp().as_ref().map_or(Ok(()), check_seccomp)
}

fn check_seccomp(seccomp: &LinuxSeccomp) -> Result<(), String> {
    const WHY: &str = "a listener on the host cannot serve the system calls of a guest";
    if seccomp.listener_path().is_some() {
        return Err(format!("linux.seccomp.listenerPath: {WHY}"));
    }
    let mut actions = seccomp.syscalls().iter().flatten().map(|syscall| syscall.action());
    if let Some(index) = actions.position(|action| action == LinuxSeccompAction::ScmpActNotify) {
        return Err(format!("linux.seccomp.syscalls[{index}].action: SCMP_ACT_NOTIFY: {WHY}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn good() -> Value {
        json!({
            "ociVersion": "1.0.2",
            "process": { "user": { "uid": 0, "gid": 0 }, "args": ["sh"], "cwd": "/" },
            "root": { "path": "rootfs" },
            "mounts": [{ "destination": "/proc", "type": "proc", "source": "proc" }],
            "linux": { "namespaces": [{ "type": "network" }] },
        })
    }

    #[test]
    fn each_fault_is_named() {
        type Change = fn(&mut Value);
        let cases: [(&str, Change); 10] = [
            ("ociVersion \"2.0.0\" is not supported", |v| v["ociVersion"] = json!("2.0.0")),
            ("root is missing", |v| drop(v.as_object_mut().unwrap().remove("root"))),
            ("process is missing", |v| drop(v.as_object_mut().unwrap().remove("process"))),
            ("process.args must not be empty", |v| v["process"]["args"] = json!([])),
            ("must not contain NUL", |v| v["process"]["env"] = json!(["A=\0"])),
            ("process.cwd \"tmp\" must be", |v| v["process"]["cwd"] = json!("tmp")),
            ("mounts[0].destination \"proc\" must be", |v| v["mounts"][0]["destination"] = json!("proc")),
            ("no network namespace", |v| v["linux"]["namespaces"] = json!([{ "type": "mount" }])),
            ("linux.seccomp.listenerPath", |v| {
                v["linux"]["seccomp"] = json!({ "defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/x" });
            }),
            ("linux.seccomp.syscalls[0].action", |v| {
                let syscalls = json!([{ "names": ["mkdir"], "action": "SCMP_ACT_NOTIFY" }]);
                v["linux"]["seccomp"] = json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": syscalls });
            }),
        ];
        let parse = |value: Value| serde_json::from_value(value).unwrap();
        assert_eq!(check(&parse(good())), Ok(()));
        for (fault, change) in cases {
            let mut value = good();
            change(&mut value);
            let reason = check(&parse(value)).unwrap_err();
            assert!(reason.contains(fault), "{reason} instead of {fault}");
        }
    }
}
