//! A container's config.json, made fit for the guest and for libcontainer.
//!
//! What the guest cannot do is refused, unless the virtual machine around it makes it meaningless.

use std::path::{Path, PathBuf};

use katavm_protocol::CONTAINER;
use oci_spec::runtime::{
    Capabilities, HooksBuilder, LinuxCapabilitiesBuilder, LinuxIdMapping, LinuxNamespaceType, Mount, Process, Spec,
};

use crate::error::Error;

/// A tmpfs with it starts with what the root file system has in its place.
const COPY_UP: &str = "tmpcopyup";

/// Parses and adapts a specification.
///
/// # Errors
/// What in it is wrong, or cannot be had.
pub fn adapt(json: &[u8], cgroup: PathBuf) -> Result<Spec, Error> {
    let mut spec: Spec =
        serde_json::from_slice(json).map_err(|error| Error::Invalid(format!("the specification: {error}")))?;
    let missing = |what: &str| Error::Invalid(format!("the specification has no {what}"));
    if spec.root().as_ref().is_none_or(|root| !root.path().is_absolute()) {
        return Err(missing("absolute root.path"));
    }
    let mut process = spec.process().clone().ok_or_else(|| missing("process"))?;
    adapt_process(&mut process)?;
    spec.set_process(Some(process));
    let mut linux = spec.linux().clone().ok_or_else(|| missing("linux section"))?;
    if linux.seccomp().as_ref().is_some_and(|seccomp| seccomp.listener_path().is_some()) {
        return Err(Error::Invalid("linux.seccomp.listenerPath: a listener on the host cannot serve a guest".into()));
    }
    linux.set_cgroups_path(Some(cgroup));
    let propagation = linux.rootfs_propagation().as_deref().map(root_propagation).transpose()?;
    linux.set_rootfs_propagation(propagation.map(String::from));
    // The guest's network is the container's network: the virtual machine is the namespace.
    let namespaces = linux.namespaces().clone().unwrap_or_default();
    let kept = namespaces.into_iter().filter(|namespace| namespace.typ() != LinuxNamespaceType::Network);
    linux.set_namespaces(Some(kept.collect()));
    if linux.namespaces().iter().flatten().any(|namespace| namespace.typ() == LinuxNamespaceType::User) {
        spec.mounts_mut().iter_mut().flatten().for_each(bind_sysfs);
    }
    // Neither SELinux nor resctrl is in the guest.
    linux.set_mount_label(None);
    linux.set_intel_rdt(None);
    linux.set_net_devices(None);
    spec.set_linux(Some(linux));
    // Hooks name programs of the host, which runs them; only startContainer's are in the container.
    let start = spec.hooks().as_ref().and_then(|hooks| hooks.start_container().clone());
    let hooks = start.and_then(|start| HooksBuilder::default().start_container(start).build().ok());
    spec.set_hooks(hooks);
    Ok(spec)
}

/// Has the guest's own /sys mounted: a container with a user namespace may not mount one, as the network namespace that it
/// shows is the guest's (mount(2) would say EPERM).
fn bind_sysfs(mount: &mut Mount) {
    if mount.typ().as_deref() == Some("sysfs") {
        let options = mount.options().iter().flatten().cloned().chain(["rbind".to_owned()]).collect();
        mount.set_typ(Some("bind".into())).set_source(Some("/sys".into())).set_options(Some(options));
    }
}

/// The name that libcontainer has for a propagation of the root mount: it knows the plain ones only, and means all mounts
/// below by them.
fn root_propagation(name: &str) -> Result<&str, Error> {
    match name.strip_prefix('r').unwrap_or(name) {
        plain @ ("shared" | "slave" | "private" | "unbindable") => Ok(plain),
        _ => Err(Error::Invalid(format!("linux.rootfsPropagation {name:?} is none of mount_namespaces(7)"))),
    }
}

/// Whether it asks for the pid namespace of the pod, which is no container's.
#[must_use]
pub fn joins_the_pods_pids(spec: &Spec) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_deref()).unwrap_or_default();
    let is_pods = |path: &Path| path == Path::new(CONTAINER);
    namespaces
        .iter()
        .any(|namespace| namespace.typ() == LinuxNamespaceType::Pid && namespace.path().as_deref().is_some_and(is_pods))
}

/// Finds the namespaces that are shared with other containers, by the pid of the first process of each.
///
/// # Errors
/// That there is no such container.
pub fn join_namespaces(spec: &mut Spec, pid_of: impl Fn(&str) -> Result<i32, Error>) -> Result<(), Error> {
    let Some(linux) = spec.linux_mut() else { return Ok(()) };
    for namespace in linux.namespaces_mut().iter_mut().flatten() {
        let path = namespace.path().as_ref().map(|path| path.to_string_lossy().into_owned());
        let Some(owner) = path.as_deref().and_then(|path| path.strip_prefix(CONTAINER)) else { continue };
        let file = match namespace.typ() {
            LinuxNamespaceType::Ipc => "ipc",
            LinuxNamespaceType::Uts => "uts",
            LinuxNamespaceType::Pid => "pid",
            other => return Err(Error::Invalid(format!("a {other} namespace cannot be shared"))),
        };
        namespace.set_path(Some(format!("/proc/{}/ns/{file}", pid_of(owner)?).into()));
    }
    Ok(())
}

/// Takes the settings of the network out of a specification: the guest's network is the container's, and libcontainer
/// would refuse them in a container without a network namespace.
pub fn take_network_sysctls(spec: &mut Spec) -> Vec<(String, String)> {
    let Some(linux) = spec.linux_mut() else { return Vec::new() };
    let (network, others) = linux.sysctl().clone().unwrap_or_default().into_iter().partition(|(name, _)| {
        // sysctl(8) takes both separators.
        name.starts_with("net.") || name.starts_with("net/")
    });
    linux.set_sysctl(Some(others));
    let mut network: Vec<_> = network.into_iter().collect();
    network.sort_unstable();
    network
}

/// Takes the option `tmpcopyup` out of a specification: the mounts that have it. libcontainer does not know it.
pub fn take_copy_ups(spec: &mut Spec) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for mount in spec.mounts_mut().iter_mut().flatten() {
        let Some(mut options) = mount.options().clone() else { continue };
        let before = options.len();
        options.retain(|option| option != COPY_UP);
        if options.len() < before {
            found.push(mount.destination().clone());
            mount.set_options(Some(options));
        }
    }
    found
}

/// Adapts a process, a container's first or a further one.
///
/// # Errors
/// What in it is wrong.
pub fn adapt_process(process: &mut Process) -> Result<(), Error> {
    let args = process.args().as_deref().unwrap_or_default();
    let Some(program) = args.first() else {
        return Err(Error::Invalid("process.args is empty".into()));
    };
    if program.is_empty() {
        return Err(Error::NotFound("exec: \"\": executable file not found in $PATH".into()));
    }
    if args.iter().chain(process.env().iter().flatten()).any(|text| text.contains('\0')) {
        return Err(Error::Invalid("process.args or process.env holds a NUL byte".into()));
    }
    if !process.cwd().is_absolute() {
        return Err(Error::Invalid(format!("process.cwd {:?} is not absolute", process.cwd().display())));
    }
    // libcontainer takes "false" for a reason to load seccomp after the capabilities are gone, which fails.
    if process.no_new_privileges() == Some(false) {
        process.set_no_new_privileges(None);
    }
    // libcontainer keeps all capabilities where none are listed; runc drops them.
    if process.capabilities().is_none() {
        let none = Capabilities::new();
        let all = LinuxCapabilitiesBuilder::default()
            .bounding(none.clone())
            .effective(none.clone())
            .permitted(none.clone())
            .inheritable(none.clone())
            .ambient(none)
            .build()
            .map_err(|error| Error::Internal(format!("no capabilities: {error}")))?;
        process.set_capabilities(Some(all));
    }
    process.set_apparmor_profile(None);
    process.set_selinux_label(None);
    Ok(())
}

/// The number that `id` of the container's user namespace has in the guest.
pub fn outside(id: u32, mappings: Option<&Vec<LinuxIdMapping>>) -> u32 {
    let Some(mappings) = mappings else { return id };
    let map = |mapping: &LinuxIdMapping| {
        let offset = id.checked_sub(mapping.container_id()).filter(|offset| *offset < mapping.size())?;
        mapping.host_id().checked_add(offset)
    };
    mappings.iter().find_map(map).unwrap_or(id)
}

/// The user and group of a process as the guest knows them.
pub fn owner(spec: &Spec, process: &Process) -> (u32, u32) {
    let linux = spec.linux().as_ref();
    let uids = linux.and_then(|linux| linux.uid_mappings().as_ref());
    let gids = linux.and_then(|linux| linux.gid_mappings().as_ref());
    (outside(process.user().uid(), uids), outside(process.user().gid(), gids))
}

/// Whether a mount of the specification covers `path`, so that it is not the root file system's.
pub fn is_below_mount(spec: &Spec, path: &Path) -> bool {
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    mounts.iter().any(|mount| path.starts_with(mount.destination()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapted(json: serde_json::Value) -> Result<Spec, Error> {
        adapt(&serde_json::to_vec(&json).unwrap(), "/katavm/c1".into())
    }

    fn minimal() -> serde_json::Value {
        serde_json::json!({
            "ociVersion": "1.2.0",
            "root": {"path": "/run/katavm/shared/c1"},
            "process": {"args": ["sh"], "cwd": "/", "user": {"uid": 0, "gid": 0}, "noNewPrivileges": false,
                        "apparmorProfile": "docker-default"},
            "linux": {"namespaces": [{"type": "pid"}, {"type": "network", "path": "/var/run/netns/x"}],
                      "cgroupsPath": "/user.slice/c1"},
            "hooks": {"prestart": [{"path": "/bin/host"}]}
        })
    }

    #[test]
    fn propagations_have_plain_names() {
        for (given, plain) in [("rslave", "slave"), ("shared", "shared"), ("runbindable", "unbindable")] {
            let mut json = minimal();
            json["linux"]["rootfsPropagation"] = given.into();
            let spec = adapted(json).unwrap();
            assert_eq!(spec.linux().as_ref().unwrap().rootfs_propagation().as_deref(), Some(plain));
        }
        let mut json = minimal();
        json["linux"]["rootfsPropagation"] = "rx".into();
        assert!(adapted(json).unwrap_err().to_string().contains("linux.rootfsPropagation"));
    }

    #[test]
    fn what_only_the_host_has_is_taken_out() {
        let spec = adapted(minimal()).unwrap();
        let linux = spec.linux().as_ref().unwrap();
        assert_eq!(linux.cgroups_path().as_deref(), Some(Path::new("/katavm/c1")));
        let namespaces = linux.namespaces().as_ref().unwrap();
        assert_eq!(namespaces.iter().map(|n| n.typ()).collect::<Vec<_>>(), [LinuxNamespaceType::Pid]);
        assert!(spec.hooks().is_none());
        let process = spec.process().as_ref().unwrap();
        assert!(process.apparmor_profile().is_none());
        assert!(process.no_new_privileges().is_none());
        assert!(process.capabilities().as_ref().unwrap().bounding().as_ref().unwrap().is_empty());
    }

    #[test]
    fn what_is_wrong_is_named() {
        let broken = |change: &dyn Fn(&mut serde_json::Value)| {
            let mut json = minimal();
            change(&mut json);
            adapted(json).unwrap_err().to_string()
        };
        assert!(broken(&|json| json["process"]["args"] = serde_json::json!([])).contains("process.args"));
        assert!(broken(&|json| json["process"]["cwd"] = "tmp".into()).contains("process.cwd"));
        assert!(broken(&|json| json["root"]["path"] = "rootfs".into()).contains("root.path"));
        let listener = serde_json::json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/x"});
        assert!(broken(&|json| json["linux"]["seccomp"] = listener.clone()).contains("listenerPath"));
    }

    #[test]
    fn settings_of_the_network_are_told_apart() {
        let mut json = minimal();
        json["linux"]["sysctl"] = serde_json::json!({"net.core.somaxconn": "7", "kernel.msgmax": "1", "net/x": "2"});
        let mut spec = adapted(json).unwrap();
        let network = take_network_sysctls(&mut spec);
        assert_eq!(network.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["net.core.somaxconn", "net/x"]);
        let left = spec.linux().as_ref().unwrap().sysctl().clone().unwrap();
        assert_eq!(left.into_keys().collect::<Vec<_>>(), ["kernel.msgmax"]);
    }

    #[test]
    fn namespaces_of_other_containers_are_found() {
        let mut json = minimal();
        json["linux"]["namespaces"] = serde_json::json!([{"type": "ipc", "path": "container:c0"}, {"type": "uts"}]);
        let mut spec = adapted(json.clone()).unwrap();
        join_namespaces(&mut spec, |id| if id == "c0" { Ok(7) } else { panic!("{id}") }).unwrap();
        let namespaces = spec.linux().as_ref().unwrap().namespaces().clone().unwrap();
        assert_eq!(namespaces[0].path().as_deref(), Some(Path::new("/proc/7/ns/ipc")));
        assert_eq!(namespaces[1].path().as_deref(), None);
        assert!(!joins_the_pods_pids(&spec));
        let mut of_pod = json.clone();
        of_pod["linux"]["namespaces"][0] = serde_json::json!({"type": "pid", "path": "container:"});
        assert!(joins_the_pods_pids(&adapted(of_pod).unwrap()));
        let gone = join_namespaces(&mut adapted(json).unwrap(), |id| Err(Error::NotFound(id.into())));
        assert!(gone.is_err());
    }

    #[test]
    fn mounts_that_start_with_copies_are_found() {
        let mut json = minimal();
        json["mounts"] = serde_json::json!([
            {"destination": "/a", "type": "tmpfs", "source": "tmpfs", "options": ["rw", "tmpcopyup", "size=1m"]},
            {"destination": "/b", "type": "tmpfs", "source": "tmpfs", "options": ["rw"]},
        ]);
        let mut spec = adapted(json).unwrap();
        assert_eq!(take_copy_ups(&mut spec), [Path::new("/a")]);
        let options = spec.mounts().as_ref().unwrap().iter().map(|mount| mount.options().clone().unwrap());
        assert_eq!(options.collect::<Vec<_>>(), [vec!["rw", "size=1m"], vec!["rw"]]);
    }

    #[test]
    fn ids_are_mapped() {
        let json = r#"[{"containerID": 0, "hostID": 100000, "size": 10}, {"containerID": 50, "hostID": 7, "size": 1}]"#;
        let mappings: Vec<LinuxIdMapping> = serde_json::from_str(json).unwrap();
        assert_eq!([0, 9, 50].map(|id| outside(id, Some(&mappings))), [100_000, 100_009, 7]);
        assert_eq!(outside(10, Some(&mappings)), 10);
        assert_eq!(outside(5, None), 5);
    }
}
