//! A pod's life, call by call.

use anyhow::{Result, ensure};
use protobuf::Enum as _;
use serde_json::{Value, json};

use super::{Context, Pod, Verdict, handler, kernel, on_node};
use crate::cri::messages::{ContainerState, PodSandboxState};

pub fn whole(context: &Context) -> Result<Verdict> {
    let kernel = kernel(context)?;
    on_node(context, |node| {
        let pod = Pod::run(node, "life", |_| ())?;
        let status = node.cri.pod_status(&pod.id)?;
        ensure!(status.state.value() == PodSandboxState::SANDBOX_READY.value(), "{status:?}");
        ensure!(status.runtime_handler == handler(), "{status:?}");
        let network = status.network.unwrap_or_default();
        ensure!(network.ip.starts_with("10.88.") && network.additional_ips.len() == 1, "{network:?}");
        let script = "echo to stdout; echo to stderr >&2; printf 'no end'; trap 'echo bye; exit 7' TERM
                      while :; do sleep 0.2; done";
        let id = pod.create("main", &["sh", "-c", script], |_| ())?;
        let state = |id: &str| Ok::<_, anyhow::Error>(node.cri.container_status(id)?.state.enum_value_or_default());
        ensure!(state(&id)? == ContainerState::CONTAINER_CREATED, "{:?}", state(&id)?);
        node.cri.start_container(&id)?;
        ensure!(state(&id)? == ContainerState::CONTAINER_RUNNING, "{:?}", state(&id)?);
        let seen = pod
            .sh(&id, "uname -r; hostname; ip -o -4 addr show eth0 | tr -s ' ' | cut -d' ' -f4; cat /etc/resolv.conf")?;
        let expected = format!(
            "{kernel}\nlife\n{}/16\nsearch default.svc.cluster.local\nnameserver 10.88.0.53\noptions ndots:5",
            network.ip
        );
        ensure!(seen == expected, "{seen:?} instead of {expected:?}");
        let failed = node.cri.exec_sync(&id, &["sh", "-c", "echo out; echo err >&2; exit 3"], 30)?;
        let told = (failed.exit_code, failed.stdout.as_slice(), failed.stderr.as_slice());
        ensure!(told == (3, b"out\n", b"err\n"), "{failed:?}");
        node.cri.stop_container(&id, 30)?;
        let ended = pod.ended(&id)?;
        ensure!(ended.exit_code == 7 && ended.finished_at >= ended.started_at && ended.started_at > 0, "{ended:?}");
        let mut log = pod.log("main")?;
        log.sort();
        let lines = ["stderr F to stderr", "stdout F no endbye", "stdout F to stdout"];
        ensure!(log == lines, "{log:?}");
        node.cri.remove_container(&id)?;
        ensure!(node.cri.container_status(&id).is_err(), "the container is still there");
        node.cri.stop_pod(&pod.id)?;
        let status = node.cri.pod_status(&pod.id)?;
        ensure!(status.state.value() == PodSandboxState::SANDBOX_NOTREADY.value(), "{status:?}");
        // Again, as the kubelet does.
        node.cri.stop_pod(&pod.id)?;
        node.cri.remove_pod(&pod.id)?;
        node.cri.remove_pod(&pod.id)?;
        ensure!(node.cri.pods()?.is_empty(), "the pod is still there");
        pod.tidy()
    })
}

/// Stopping and removing in each order that a kubelet comes to.
pub fn any_order(context: &Context) -> Result<Verdict> {
    on_node(context, |node| {
        // Everything at once, running.
        let pod = Pod::run(node, "order", |_| ())?;
        for name in ["a", "b"] {
            pod.idle(name)?;
        }
        pod.remove()?;
        ensure!(node.cri.containers()?.is_empty(), "a container is still there");
        // The pod is stopped first, then its containers are removed, one of which never ran.
        let pod = Pod::run(node, "order", |_| ())?;
        let (ran, never) = (pod.idle("ran")?, pod.create("never", &["true"], |_| ())?);
        node.cri.stop_pod(&pod.id)?;
        ensure!(pod.ended(&ran)?.exit_code == 137, "{:?}", pod.ended(&ran)?);
        for id in [&ran, &never] {
            node.cri.stop_container(id, 0)?;
            node.cri.remove_container(id)?;
        }
        node.cri.remove_pod(&pod.id)?;
        pod.tidy()?;
        // A container is removed while it runs, and one that is gone once more.
        let pod = Pod::run(node, "order", |_| ())?;
        let id = pod.idle("a")?;
        node.cri.remove_container(&id)?;
        node.cri.remove_container(&id)?;
        node.cri.remove_pod(&pod.id)?;
        pod.tidy()
    })
}

/// Init containers run one after the other to their ends; a container that has ended is made anew beside what is left of
/// the one before.
pub fn restarts(context: &Context) -> Result<Verdict> {
    on_node(context, |node| {
        let volume = node.folder().join("restarts");
        std::fs::create_dir(&volume)?;
        let mount = json!([{ "host_path": volume, "container_path": "/data" }]);
        let mounted = |config: &mut Value| config["mounts"] = mount.clone();
        let pod = Pod::run(node, "restarts", |_| ())?;
        for name in ["init-1", "init-2"] {
            let id = pod.start(name, &["sh", "-c", &format!("echo {name} >>/data/log")], mounted)?;
            ensure!(pod.ended(&id)?.exit_code == 0, "{:?}", pod.ended(&id)?);
        }
        let mut before = None;
        for attempt in 0..3 {
            let script =
                format!("echo attempt {attempt} >>/data/log; touch /here; [ $(ls / | grep -c here) = 1 ]; exit 2");
            let id = pod.start("main", &["sh", "-c", &script], |config| {
                mounted(config);
                config["metadata"]["attempt"] = json!(attempt);
            })?;
            let ended = pod.ended(&id)?;
            ensure!(ended.exit_code == 2 && ended.metadata.attempt == attempt, "{ended:?}");
            if let Some(before) = before.replace(id) {
                node.cri.remove_container(&before)?;
            }
        }
        let log = std::fs::read_to_string(volume.join("log"))?;
        ensure!(log == "init-1\ninit-2\nattempt 0\nattempt 1\nattempt 2\n", "{log:?}");
        pod.remove()?;
        std::fs::remove_dir_all(&volume)?;
        Ok(())
    })
}

/// What fails does so in words, and leaves nothing.
pub fn failures(context: &Context) -> Result<Verdict> {
    on_node(context, |node| {
        let on_host = Pod::run(node, "failures", |config| {
            config["linux"]["security_context"]["namespace_options"] = json!({ "network": "NODE", "pid": "CONTAINER" });
        });
        let told = on_host.err().map(|error| error.to_string()).unwrap_or_default();
        ensure!(told.contains("network"), "a pod on the host's network: {told:?}");
        let pod = Pod::run(node, "failures", |_| ())?;
        let id = pod.create("missing", &["/nosuch"], |_| ())?;
        let told = node.cri.start_container(&id).err().map(|error| error.to_string()).unwrap_or_default();
        ensure!(told.contains("/nosuch") && told.contains("no such file or directory"), "{told:?}");
        let ended = pod.ended(&id)?;
        ensure!(ended.exit_code == 128 && ended.reason == "StartError", "{ended:?}");
        let gone = pod.create("volume", &["true"], |config| {
            config["mounts"] = json!([{ "host_path": "/dev/kmsg", "container_path": "/kmsg" }]);
        });
        let told = match gone {
            Ok(id) => node.cri.start_container(&id).err().map(|error| error.to_string()),
            Err(error) => Some(format!("{error:#}")),
        };
        ensure!(told.as_ref().is_some_and(|told| told.contains("/dev/kmsg")), "{told:?}");
        // The pod is none the worse for it.
        let id = pod.idle("main")?;
        ensure!(pod.sh(&id, "echo well")? == "well", "the pod is not well");
        pod.remove()?;
        std::fs::remove_dir_all(node.folder().join("logs/failures")).or(Ok(()))
    })
}
