//! Security contexts of pods and containers.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::{Context, Pod, Verdict, on_node};

/// A container's name, its script, its security context, and what the script prints then.
type Try<'a> = (&'a str, &'a str, &'a dyn Fn(&mut Value), &'a str);

fn context_of(config: &mut Value) -> &mut Value {
    &mut config["linux"]["security_context"]
}

pub fn contexts(context: &Context) -> Result<Verdict> {
    on_node(context, |node| {
        let pod = Pod::run(node, "security", |config| {
            config["linux"]["sysctls"] =
                json!({ "kernel.shm_rmid_forced": "1", "net.ipv4.ip_local_port_range": "1024 65000" });
        })?;
        let run = |name: &str, script: &str, change: &dyn Fn(&mut Value)| -> Result<String> {
            let id = pod.start(name, &["sh", "-c", script], |config| change(context_of(config)))?;
            let ended = pod.ended(&id)?;
            let log = pod.log(name)?;
            ensure!(ended.exit_code == 0, "{name}: {ended:?} {log:?}");
            let lines: Vec<_> = log.iter().filter_map(|line| line.strip_prefix("stdout F ")).collect();
            Ok(lines.join("\n"))
        };
        let sysctls = "cat /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_local_port_range | tr '\\t' ' '";
        let cases: [Try<'_>; 8] = [
            ("sysctls", sysctls, &|_| (), "1\n1024 65000"),
            (
                "user",
                "id -u; id -g; id -G",
                &|to| {
                    to["run_as_user"] = json!({ "value": 1001 });
                    to["run_as_group"] = json!({ "value": 1002 });
                    to["supplemental_groups"] = json!([1003, 1004]);
                },
                "1001\n1002\n1002 1003 1004",
            ),
            (
                "root",
                "touch /new || echo read-only; touch /dev/shm/new",
                &|to| to["readonly_rootfs"] = json!(true),
                "read-only",
            ),
            (
                "capabilities",
                "chown 1 /tmp 2>/dev/null || echo no chown; ip link add d0 type dummy 2>/dev/null && echo net admin; ip link del d0 2>/dev/null; true",
                &|to| to["capabilities"] = json!({ "add_capabilities": ["NET_ADMIN"], "drop_capabilities": ["CHOWN"] }),
                "no chown\nnet admin",
            ),
            (
                "masked",
                "head -c 1 /proc/timer_list 2>/dev/null | wc -c; echo 0 2>/dev/null >/proc/sys/kernel/dmesg_restrict || echo read-only",
                &|to| {
                    to["masked_paths"] = json!(["/proc/timer_list"]);
                    to["readonly_paths"] = json!(["/proc/sys"]);
                },
                "0\nread-only",
            ),
            (
                "privileges",
                "grep NoNewPrivs /proc/self/status | tr -s '\\t' ' '",
                &|to| to["no_new_privs"] = json!(true),
                "NoNewPrivs: 1",
            ),
            (
                "seccomp",
                "grep 'Seccomp:' /proc/self/status | tr -s '\\t' ' '; unshare -m true 2>/dev/null || echo refused",
                &|to| to["seccomp"] = json!({ "profile_type": "RuntimeDefault" }),
                "Seccomp: 2\nrefused",
            ),
            (
                "unconfined",
                "grep 'Seccomp:' /proc/self/status | tr -s '\\t' ' '",
                &|to| to["seccomp"] = json!({ "profile_type": "Unconfined" }),
                "Seccomp: 0",
            ),
        ];
        for (name, script, change, expected) in cases {
            let output = run(name, script, change)?;
            ensure!(output == expected, "{name}: {output:?} instead of {expected:?}");
        }
        pod.remove()?;
        let pod = Pod::run(node, "security", |config| context_of(config)["privileged"] = json!(true))?;
        let id =
            pod.start("privileged", &["sleep", "100000"], |config| context_of(config)["privileged"] = json!(true))?;
        let output = pod.sh(
            &id,
            "mount -t tmpfs none /tmp && echo mounted; ip link add d0 type bridge && ip link del d0 && echo net admin",
        )?;
        ensure!(output == "mounted\nnet admin", "{output:?}");
        pod.remove()
    })
}
