//! Which sandbox a container belongs in: one of its own, or that of the pod that an engine has made before.
//!
//! CRI-O says so by annotations. Podman says so by namespaces: a container that is given the network namespace of
//! another shares everything that a sandbox is.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespaceType, Spec};

use crate::host;
use crate::sandbox::plan::{Owner, SharedNamespaces};
use crate::state::{Found, Id, StateError, StateRoot, Status};

/// CRI-O: `sandbox` for the first container of a pod, `container` for the others.
const CONTAINER_TYPE: &str = "io.kubernetes.cri-o.ContainerType";
/// CRI-O: the first container's id.
const SANDBOX_ID: &str = "io.kubernetes.cri-o.SandboxID";

/// Why a container cannot join a pod.
#[derive(Debug, thiserror::Error)]
pub enum MembershipError {
    /// It names none.
    #[error("annotations: {CONTAINER_TYPE} is \"container\", but {SANDBOX_ID} names no sandbox")]
    NoSandbox,
    /// The one that it names is not there.
    #[error("annotations: the sandbox {0} ({SANDBOX_ID}) does not run")]
    Gone(String),
    /// The state of others cannot be read.
    #[error(transparent)]
    State(#[from] StateError),
    /// The namespace cannot be looked at.
    #[error("linux.namespaces: cannot look at {path}: {error}")]
    Namespace {
        /// Its file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
}

/// The pod that a container belongs in.
#[derive(Clone, Debug)]
pub struct Membership {
    /// A container of it, whose directory has the sockets of the sandbox process.
    pub peer: Found,
}

impl Membership {
    /// The pod of a container with this configuration; nothing if it gets a sandbox of its own.
    ///
    /// # Errors
    /// Any [`MembershipError`].
    pub fn find(root: &StateRoot, spec: &Spec) -> Result<Option<Self>, MembershipError> {
        let peer = match annotation(spec, CONTAINER_TYPE) {
            Some("container") => {
                let sandbox = annotation(spec, SANDBOX_ID).ok_or(MembershipError::NoSandbox)?;
                let found = sandbox.parse::<Id>().ok().and_then(|id| root.find(&id).ok()).filter(lives);
                Some(found.ok_or_else(|| MembershipError::Gone(sandbox.to_owned()))?)
            }
            Some("sandbox") => None,
            _ => match namespace(spec, LinuxNamespaceType::Network) {
                Some(path) => owner(root, path, "net", |_| true)?,
                None => None,
            },
        };
        Ok(peer.map(|peer| Self { peer }))
    }
}

/// The containers whose namespaces the configuration of container `id` asks for, in the sandbox that it joins: that of the
/// process `sandbox`, if there is one. Other namespaces of the host mean nothing in a guest, and are warned of.
///
/// # Errors
/// Any [`MembershipError`].
pub fn shared_namespaces(
    root: &StateRoot,
    id: &Id,
    spec: &Spec,
    sandbox: Option<u32>,
) -> Result<SharedNamespaces, MembershipError> {
    warn_of_others(spec);
    let mut shared = SharedNamespaces::new();
    // CRI-O pins a pod's namespaces before there is a container in them; the first one's in the guest stand for them.
    let is_first = annotation(spec, CONTAINER_TYPE) == Some("sandbox");
    let files = [(LinuxNamespaceType::Ipc, "ipc"), (LinuxNamespaceType::Uts, "uts"), (LinuxNamespaceType::Pid, "pid")];
    for (kind, file) in files {
        let Some(path) = namespace(spec, kind) else { continue };
        let is_peer = |found: &Found| found.record.id != *id && Some(found.record.sandbox_pid) == sandbox;
        match owner(root, path, file, is_peer)? {
            Some(found) if found.record.is_sandbox => drop(shared.insert(kind, Owner::Guest)),
            Some(found) => drop(shared.insert(kind, Owner::Container(found.record.id))),
            None if is_first => {}
            None => log::warn!(
                "config.json: linux.namespaces: the {kind} namespace {} is none of this sandbox: a container in a \
                 virtual machine cannot join one of the host, and gets one of its own",
                path.display()
            ),
        }
    }
    Ok(shared)
}

/// Warns of namespaces of the host that mean nothing in a guest, and that no other container can share.
fn warn_of_others(spec: &Spec) {
    use LinuxNamespaceType::{Cgroup, Mount, Time, User};
    for kind in [Cgroup, Mount, Time, User] {
        if let Some(path) = namespace(spec, kind) {
            log::warn!(
                "config.json: linux.namespaces: a container in a virtual machine cannot join the {kind} namespace {}, \
                 and gets one of its own",
                path.display()
            );
        }
    }
}

fn annotation<'a>(spec: &'a Spec, name: &str) -> Option<&'a str> {
    spec.annotations().as_ref()?.get(name).map(String::as_str)
}

/// The path of a namespace that a configuration joins.
fn namespace(spec: &Spec, kind: LinuxNamespaceType) -> Option<&Path> {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_deref()).unwrap_or_default();
    namespaces.iter().find(|namespace| namespace.typ() == kind).and_then(|namespace| namespace.path().as_deref())
}

/// The container among those `wanted` whose stand-in is in a namespace.
fn owner(
    root: &StateRoot,
    path: &Path,
    file: &str,
    wanted: impl Fn(&Found) -> bool,
) -> Result<Option<Found>, MembershipError> {
    let key = key_of(path).map_err(|error| MembershipError::Namespace { path: path.into(), error })?;
    let is_in = |found: &Found| {
        // Without a stand-in the pid is the sandbox process', whose namespaces are nobody's.
        let has_stand_in = found.record.pid != found.record.sandbox_pid;
        // One that ends just now has none any more.
        let own = key_of(Path::new(&format!("/proc/{}/ns/{file}", found.record.pid)));
        has_stand_in && own.is_ok_and(|own| own == key)
    };
    Ok(root.list()?.into_iter().find(|found| wanted(found) && lives(found) && is_in(found)))
}

fn lives(found: &Found) -> bool {
    found.alive && found.record.status != Status::Stopped
}

fn key_of(path: &Path) -> io::Result<(u64, u64)> {
    Ok(host::identity(&fs::metadata(path)?))
}
