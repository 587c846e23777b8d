//! What a sandbox needs, decided before anything is made: its size, what of the host it shares, and the
//! configuration as the guest shall see it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use katavm_protocol::CONTAINER;
use katavm_protocol::agent::{MountOverlayRequest, Tmpfs};
use oci_spec::runtime::{LinuxIdMapping, LinuxNamespaceType, Mount, Spec};

use super::disk::{Disk, Part};
use super::size::{Limits, Size, SizeError, SizeOptions};
use super::volume;
use crate::config::{Bundle, GuestRoot, Overlay};
use crate::host::{self, EmptyTmpfs, FileKind, IdMap, IdRange, system_message};
use crate::limits;
use crate::standin::{View, Volume};
use crate::state::Id;

/// Where the guest has what is shared: each export is a directory or file in here.
pub(super) const SHARED: &str = "/run/katavm/shared";
/// Where the guest has file systems in its memory that containers share.
const TMPFS: &str = "/run/katavm/tmpfs";
/// Where the guest has copies of volumes that the kubelet replaces.
pub(crate) const REPLACED: &str = "/run/katavm/volumes";
/// Where programs look for POSIX shared memory (shm_overview(7)).
const SHARED_MEMORY: &str = "/dev/shm";
/// The end of the export's name of a root file system.
const ROOTFS: &str = "rootfs";

/// Character devices that each Linux has under the same name and number: the guest's own stands in for the host's.
const STANDARD_DEVICES: [(u32, u32, &str); 6] = [
    (1, 3, "/dev/null"),
    (1, 5, "/dev/zero"),
    (1, 7, "/dev/full"),
    (1, 8, "/dev/random"),
    (1, 9, "/dev/urandom"),
    (5, 0, "/dev/tty"),
];

/// Empty places for disks, beside those that the first container has a disk for.
const SPARE_PLACES: usize = 4;
/// Places at least where the first container's root file system is on disks: those of a pod's others are then, too, as far
/// as this goes.
const ROOT_PLACES: usize = 20;

/// Why no plan could be made.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The size.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// The source of a bind mount is not there, as runc words it.
    #[error("error mounting {source_path:?} to rootfs at {destination:?}: stat {path}: {reason}", path = source_path.display())]
    Source {
        /// On the host.
        source_path: PathBuf,
        /// In the container.
        destination: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// The source of a bind mount lives in the host's kernel.
    #[error(
        "mounts[{index}]: {source_path:?} is a {kind} of the host's kernel, which a guest with a kernel of its own cannot use"
    )]
    Special {
        /// Which mount.
        index: usize,
        /// On the host.
        source_path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// An identity-mapped mount that cannot be.
    #[error("mounts[{index}]: cannot be identity-mapped (uidMappings, gidMappings, idmap, ridmap): {reason}")]
    IdMap {
        /// Which mount.
        index: usize,
        /// Why not.
        reason: &'static str,
    },
    /// A bind mount without a source.
    #[error("mounts[{0}]: a bind mount needs a source")]
    NoSource(usize),
    /// The configuration cannot be written down again.
    #[error("cannot write the guest's configuration: {0}")]
    Json(#[from] serde_json::Error),
}

/// A directory or file of the host that the guest sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// Its name in the shared directory.
    pub name: String,
    /// On the host.
    pub path: PathBuf,
    /// Whether the guest may not change it.
    pub read_only: bool,
    /// Whose its files seem to be to the guest.
    pub id_map: Option<IdMap>,
    /// Whether it is the same to all containers of the guest that have it.
    pub is_volume: bool,
    /// All that the guest sees of a directory; empty: all that there is.
    pub only: Vec<String>,
}

/// A volume of which the guest gets a copy that follows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replaced {
    /// The last part of its path in the guest.
    pub name: String,
    /// On the host.
    pub path: PathBuf,
}

/// Everything that is decided beforehand.
#[derive(Clone, Debug)]
pub struct Plan {
    /// RAM and vCPUs at the start.
    pub size: Size,
    /// What it may grow to.
    pub most: Size,
    /// Its memory is of huge pages.
    pub huge_pages: bool,
    /// What the container may use.
    pub limits: Limits,
    /// What is shared, the root file system first, if that is.
    pub exports: Vec<Export>,
    /// File systems in the guest's memory.
    pub tmpfs: Vec<Tmpfs>,
    /// What is copied.
    pub replaced: Vec<Replaced>,
    /// What the guest has as disks, the root file system first, if that is one.
    pub disks: Vec<Disk>,
    /// How layers among them are put together to the root file system.
    pub overlay: Option<MountOverlayRequest>,
    /// config.json for the agent.
    pub guest_spec: Vec<u8>,
    /// Whether the container's process has a terminal.
    pub terminal: bool,
    /// What a process that stands for the container on the host shall see of its files.
    pub view: View,
}

/// Whose namespace of the same sandbox is shared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// Another container's.
    Container(Id),
    /// The guest's own, which is the pod's.
    Guest,
}

/// Whose namespaces are shared, by the namespaces' types.
pub type SharedNamespaces = HashMap<LinuxNamespaceType, Owner>;

impl Plan {
    /// Plans what a container needs of its sandbox: of one that is to be made, or as one more of one that is there.
    ///
    /// # Errors
    /// Any [`PlanError`].
    pub fn new(id: &Id, bundle: &Bundle, options: SizeOptions, shared: &SharedNamespaces) -> Result<Self, PlanError> {
        let size = Size::plan(&bundle.spec, options)?;
        let mut spec = bundle.spec.clone();
        // The root stays writable for the guest even if `root.readonly` is set: mount points that are missing in it
        // are made by the agent, as other runtimes do, before it becomes read-only for the container.
        let mut volumes = Vec::new();
        let rootfs = format!("{id}.{ROOTFS}");
        if let Some(root) = spec.root_mut() {
            root.set_path(Path::new(SHARED).join(&rootfs));
        }
        let (mut exports, mut disks, mut overlay) = (Vec::new(), Vec::new(), None);
        let root = |path: &Path, only| Export {
            name: rootfs.clone(),
            path: path.into(),
            read_only: false,
            id_map: None,
            is_volume: false,
            only,
        };
        match &bundle.in_guest {
            // Where the guest has it is known once it is attached.
            Some(GuestRoot::Disk(disk)) => disks.push(Disk::of_root(Part::Root, disk)),
            Some(GuestRoot::Overlay(layered)) => {
                let layers = layered.layers.iter().enumerate();
                disks.extend(layers.map(|(index, layer)| Disk::of_root(Part::Layer(index), layer)));
                // What else is beside its upper layer is the snapshotter's.
                let upper = layered.upper.as_ref();
                exports.extend(upper.map(|all| root(&all.parent, vec![all.upper.clone(), all.work.clone()])));
                overlay = Some(mount_overlay(id, layered, &rootfs));
            }
            None => exports.push(root(&bundle.rootfs, Vec::new())),
        }
        let (mut tmpfs, mut replaced) = (Vec::new(), Vec::new());
        if let Some(mounts) = spec.mounts_mut() {
            for (index, mount) in mounts.iter_mut().enumerate() {
                if let Some(disk) = Disk::of_mount(mount, index, &bundle.path)? {
                    disks.push(disk);
                    continue;
                }
                let id_map = id_map(mount, index, &bundle.spec)?;
                if id_map.is_none()
                    && let Some(shared) = shared_memory(mount, &bundle.path)
                {
                    tmpfs.push(shared);
                    continue;
                }
                if id_map.is_none()
                    && let Some(volume) = replaced_volume(id, mount, index, &bundle.path)
                {
                    volumes.push(Volume {
                        source: volume.path.clone(),
                        destination: mount.destination().clone(),
                        read_only: true,
                        id_map: None,
                    });
                    replaced.push(volume);
                    continue;
                }
                let export = share(id, mount, index, &bundle.path)?;
                if export.is_none() && id_map.is_some() {
                    let reason = "it is no directory or file of the host that is bind-mounted";
                    return Err(PlanError::IdMap { index, reason });
                }
                if let Some(export) = export.map(|export| Export { id_map, ..export }) {
                    volumes.push(Volume {
                        source: export.path.clone(),
                        destination: mount.destination().clone(),
                        read_only: export.read_only,
                        id_map: export.id_map.clone(),
                    });
                    exports.push(export);
                }
            }
        }
        let view = View { rootfs: bundle.rootfs.clone(), is_elsewhere: bundle.in_guest.is_some(), volumes };
        strip(&mut spec, shared);
        let terminal = spec.process().as_ref().and_then(|process| process.terminal()).unwrap_or_default();
        let most = size.most(options);
        let resources = bundle.spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        let limits = resources.map(Limits::of).unwrap_or_default();
        Ok(Self {
            size,
            most,
            huge_pages: options.huge_pages,
            limits,
            exports,
            tmpfs,
            replaced,
            disks,
            overlay,
            guest_spec: serde_json::to_vec(&spec)?,
            terminal,
            view,
        })
    }

    /// How many places for disks its sandbox needs: some stay empty for what comes later.
    #[must_use]
    pub fn places(&self) -> usize {
        let least = if self.disks.iter().any(|disk| disk.part.is_of_root()) { ROOT_PLACES } else { 0 };
        least.max(self.disks.len() + SPARE_PLACES)
    }

    /// The same with one more file of the host, which the container sees at `destination` and cannot change; as it is
    /// when the bundle mounts something there, or above.
    ///
    /// # Errors
    /// [`PlanError::Json`].
    pub fn with_file(&self, id: &Id, destination: &Path, path: PathBuf) -> Result<Self, PlanError> {
        let mut plan = self.clone();
        let mut spec: Spec = serde_json::from_slice(&plan.guest_spec)?;
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        let above =
            |mount: &Mount| mount.destination() != Path::new("/") && destination.starts_with(mount.destination());
        if mounts.iter().any(above) {
            return Ok(plan);
        }
        let name = format!("{id}.mount-{}", mounts.len());
        let mut mount = Mount::default();
        mount.set_destination(destination.to_owned());
        mount.set_typ(Some("bind".into()));
        mount.set_source(Some(Path::new(SHARED).join(&name)));
        mount.set_options(Some(["bind", "ro", "nosuid", "nodev", "noexec"].map(Into::into).into()));
        mounts.push(mount);
        spec.set_mounts(Some(mounts));
        plan.guest_spec = serde_json::to_vec(&spec)?;
        plan.exports.push(Export { name, path, read_only: true, id_map: None, is_volume: true, only: Vec::new() });
        Ok(plan)
    }
}

/// How the guest mounts layers, as far as it is known before they are attached; `shared` is the name of what it has of the
/// upper one.
fn mount_overlay(id: &Id, layered: &Overlay, shared: &str) -> MountOverlayRequest {
    let path = |name: &String| format!("{SHARED}/{shared}/{name}");
    let upper = layered.upper.as_ref();
    MountOverlayRequest {
        container_id: id.to_string(),
        upper: upper.map(|all| path(&all.upper)).unwrap_or_default(),
        work: upper.map(|all| path(&all.work)).unwrap_or_default(),
        options: layered.options.clone(),
        ..Default::default()
    }
}

/// Whose the files of a mount shall seem to be: by maps of its own, or by those of the container's user namespace.
fn id_map(mount: &Mount, index: usize, spec: &Spec) -> Result<Option<IdMap>, PlanError> {
    let has = |option: &str| mount.options().iter().flatten().any(|other| other == option);
    let (users, groups) = (mount.uid_mappings(), mount.gid_mappings());
    if users.is_none() && groups.is_none() && !has("idmap") && !has("ridmap") {
        return Ok(None);
    }
    let of_container = spec.linux().as_ref();
    let (users, groups) = match (users, groups) {
        (None, None) => (
            of_container.and_then(|linux| linux.uid_mappings().as_ref()),
            of_container.and_then(|linux| linux.gid_mappings().as_ref()),
        ),
        own => (own.0.as_ref(), own.1.as_ref()),
    };
    let ranges = |mappings: &Vec<LinuxIdMapping>| {
        let range =
            |map: &LinuxIdMapping| IdRange { inside: map.container_id(), outside: map.host_id(), size: map.size() };
        mappings.iter().map(range).collect::<Vec<_>>()
    };
    match (users.map(ranges).unwrap_or_default(), groups.map(ranges).unwrap_or_default()) {
        (users, groups) if !users.is_empty() && !groups.is_empty() => {
            Ok(Some(IdMap { users, groups, recursive: has("ridmap") }))
        }
        _ => Err(PlanError::IdMap { index, reason: "there is not both a map of users and one of groups" }),
    }
}

/// Turns an empty tmpfs that an engine has mounted for the shared memory of a container, or of a pod's, into one of the
/// guest: there it is as quick as memory, and counts as the container's. The host's own is left as it is.
fn shared_memory(mount: &mut Mount, bundle: &Path) -> Option<Tmpfs> {
    let source = mount.source().as_ref().filter(|_| is_bind(mount))?;
    let path = bundle.join(source);
    if mount.destination() != Path::new(SHARED_MEMORY) || path == Path::new(SHARED_MEMORY) {
        return None;
    }
    // What cannot be looked at is told of where it is shared.
    let EmptyTmpfs { device: (major, minor), size } = EmptyTmpfs::at(&path).ok().flatten()?;
    let name = format!("shm-{major}-{minor}");
    mount.set_source(Some(Path::new(TMPFS).join(&name)));
    Some(Tmpfs { name, size, ..Default::default() })
}

/// Turns a volume that the kubelet replaces into a copy in the guest. One that the container may write to is none, and
/// one that is too large to be copied is shared as any other.
fn replaced_volume(id: &Id, mount: &mut Mount, index: usize, bundle: &Path) -> Option<Replaced> {
    let source = mount.source().as_ref().filter(|_| is_bind(mount) && is_read_only(mount))?;
    let path = bundle.join(source);
    if !volume::is_replaced(&path) {
        return None;
    }
    if let Err(error) = volume::read(&path)
        && matches!(error.kind(), std::io::ErrorKind::FileTooLarge | std::io::ErrorKind::InvalidData)
    {
        log::warn!("mounts[{index}]: programs in the guest are not told of changes of {}: {error}", path.display());
        return None;
    }
    let name = format!("{id}.mount-{index}");
    mount.set_source(Some(Path::new(REPLACED).join(&name)));
    Some(Replaced { name, path })
}

fn is_read_only(mount: &Mount) -> bool {
    mount.options().iter().flatten().any(|option| option == "ro" || option == "rro")
}

fn is_bind(mount: &Mount) -> bool {
    let has = |option: &str| mount.options().iter().flatten().any(|other| other == option);
    mount.typ().as_deref() == Some("bind") || has("bind") || has("rbind")
}

/// Turns the source of a bind mount into a path of the guest; the export that this takes.
fn share(id: &Id, mount: &mut Mount, index: usize, bundle: &Path) -> Result<Option<Export>, PlanError> {
    if !is_bind(mount) {
        return Ok(None);
    }
    let source = mount.source().as_ref().ok_or(PlanError::NoSource(index))?;
    let path = bundle.join(source);
    let (_, kind) = host::open_shared(&path).map_err(|error| PlanError::Source {
        source_path: path.clone(),
        destination: mount.destination().clone(),
        reason: system_message(&error),
    })?;
    let special = |kind: FileKind| PlanError::Special { index, source_path: path.clone(), kind: kind.name() };
    match kind {
        FileKind::Directory | FileKind::Regular => {
            let name = format!("{id}.mount-{index}");
            let read_only = is_read_only(mount);
            mount.set_source(Some(Path::new(SHARED).join(&name)));
            Ok(Some(Export { name, path, read_only, id_map: None, is_volume: true, only: Vec::new() }))
        }
        FileKind::CharacterDevice(major, minor) => {
            let standard = STANDARD_DEVICES.iter().find(|(a, b, _)| (*a, *b) == (major, minor));
            let (_, _, in_guest) = standard.ok_or_else(|| special(kind))?;
            mount.set_source(Some(in_guest.into()));
            Ok(None)
        }
        other => Err(special(other)),
    }
}

/// Takes out what would have a wrong meaning in the guest; each field is the host's, or one that `config::honoured` warns about.
fn strip(spec: &mut Spec, shared: &SharedNamespaces) {
    let Some(linux) = spec.linux_mut() else { return };
    linux.set_cgroups_path(None);
    linux.set_net_devices(None);
    linux.set_intel_rdt(None);
    linux.set_mount_label(None);
    linux.set_memory_policy(None);
    if let Some(namespaces) = linux.namespaces_mut() {
        // A container without one is in the guest's, whose processes are not for containers: the pod has others.
        namespaces.retain(|namespace| {
            shared.get(&namespace.typ()) != Some(&Owner::Guest) || namespace.typ() == LinuxNamespaceType::Pid
        });
        for namespace in namespaces {
            // The agent knows where the other container's is.
            let owner = match shared.get(&namespace.typ()) {
                Some(Owner::Container(id)) => Some(PathBuf::from(format!("{CONTAINER}{id}"))),
                Some(Owner::Guest) => Some(PathBuf::from(CONTAINER)),
                None => None,
            };
            namespace.set_path(owner.filter(|_| namespace.path().is_some()));
        }
    }
    if shared.get(&LinuxNamespaceType::Uts) == Some(&Owner::Guest) {
        // They are the pod's.
        spec.set_hostname(None);
        spec.set_domainname(None);
    }
    let Some(linux) = spec.linux_mut() else { return };
    if let Some(resources) = linux.resources_mut() {
        limits::keep_guests(resources);
    }
    if let Some(mut personality) = linux.personality().clone() {
        personality.set_flags(None);
        linux.set_personality(Some(personality));
    }
    for mount in spec.mounts_mut().iter_mut().flatten() {
        mount.set_uid_mappings(None);
        mount.set_gid_mappings(None);
        let options = mount.options().clone().unwrap_or_default();
        mount.set_options(Some(options.into_iter().filter(|o| o != "idmap" && o != "ridmap").collect()));
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::net::UnixListener;

    use serde_json::{Value, json};

    use super::*;
    use crate::config::{FileSystem, Upper};

    fn bundle(mounts: Value) -> (tempfile::TempDir, Bundle) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("rootfs")).unwrap();
        fs::create_dir_all(dir.path().join("data")).unwrap();
        fs::write(dir.path().join("file"), "x").unwrap();
        let config = json!({
            "ociVersion": "1.2.0",
            "process": { "user": { "uid": 0, "gid": 0 }, "args": ["sh"], "cwd": "/" },
            "root": { "path": "rootfs" },
            "mounts": mounts,
            "linux": {
                "namespaces": [{ "type": "network", "path": "/run/netns/x" }],
                "resources": { "cpu": { "cpus": "7", "shares": 100 }, "blockIO": { "weight": 10 } },
                "cgroupsPath": "/a/b",
            },
        });
        fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let bundle = Bundle::load(dir.path()).unwrap();
        (dir, bundle)
    }

    fn plan(mounts: Value) -> (Plan, Value) {
        let (_dir, bundle) = bundle(mounts);
        let plan = Plan::new(&"c1".parse().unwrap(), &bundle, SizeOptions::default(), &HashMap::new()).unwrap();
        let spec = serde_json::from_slice(&plan.guest_spec).unwrap();
        (plan, spec)
    }

    #[test]
    fn a_pods_processes_are_no_containers_and_not_the_guests() {
        let mut spec: Spec = serde_json::from_value(json!({
            "ociVersion": "1.2.0", "linux": { "namespaces": [{ "type": "pid", "path": "/proc/1/ns/pid" }] },
        }))
        .unwrap();
        strip(&mut spec, &SharedNamespaces::from([(LinuxNamespaceType::Pid, Owner::Guest)]));
        let spec = serde_json::to_value(spec).unwrap();
        assert_eq!(spec["linux"]["namespaces"], json!([{ "type": "pid", "path": "container:" }]));
    }

    #[test]
    fn shared_namespaces_are_another_containers_or_the_guests() {
        let mut spec: Spec = serde_json::from_value(json!({
            "ociVersion": "1.2.0",
            "hostname": "h",
            "domainname": "d",
            "linux": { "namespaces": [
                { "type": "ipc", "path": "/proc/1/ns/ipc" },
                { "type": "uts", "path": "/proc/1/ns/uts" },
                { "type": "pid", "path": "/proc/1/ns/pid" },
                { "type": "mount" },
            ] },
        }))
        .unwrap();
        let owner = Owner::Container("c0".parse().unwrap());
        let shared = [(LinuxNamespaceType::Uts, Owner::Guest), (LinuxNamespaceType::Ipc, owner)];
        strip(&mut spec, &SharedNamespaces::from(shared));
        let spec = serde_json::to_value(spec).unwrap();
        let expected = json!([{ "type": "ipc", "path": "container:c0" }, { "type": "pid" }, { "type": "mount" }]);
        assert_eq!(spec["linux"]["namespaces"], expected);
        assert!(spec["hostname"].is_null() && spec["domainname"].is_null());
    }

    fn error(mounts: Value) -> String {
        let (_dir, bundle) = bundle(mounts);
        let text = Plan::new(&"c1".parse().unwrap(), &bundle, SizeOptions::default(), &HashMap::new())
            .unwrap_err()
            .to_string();
        text.replace(bundle.path.to_str().unwrap(), "B")
    }

    #[test]
    fn binds_become_exports_and_the_rest_is_the_guests() {
        let (plan, spec) = plan(json!([
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/data", "type": "bind", "source": "data", "options": ["rbind", "ro"] },
            { "destination": "/file", "source": "file", "options": ["bind"] },
            { "destination": "/dev/zero", "type": "none", "source": "/dev/zero", "options": ["bind"] },
        ]));
        let names: Vec<_> = plan.exports.iter().map(|e| (e.name.as_str(), e.read_only)).collect();
        assert_eq!(names, [("c1.rootfs", false), ("c1.mount-1", true), ("c1.mount-2", false)]);
        assert!(plan.exports.iter().all(|export| export.path.is_absolute()));
        assert_eq!(spec["root"]["path"], "/run/katavm/shared/c1.rootfs");
        let sources: Vec<_> = spec["mounts"].as_array().unwrap().iter().map(|m| m["source"].clone()).collect();
        assert_eq!(sources, ["proc", "/run/katavm/shared/c1.mount-1", "/run/katavm/shared/c1.mount-2", "/dev/zero"]);
        assert_eq!(spec["mounts"][1]["options"], json!(["rbind", "ro"]));
    }

    #[test]
    fn a_file_is_added_where_nothing_is_mounted() {
        let id = "c1".parse().unwrap();
        let place = Path::new("/etc/resolv.conf");
        let (plan_before, _) = plan(json!([{ "destination": "/proc", "type": "proc", "source": "proc" }]));
        let more = plan_before.with_file(&id, place, "/state/resolv.conf".into()).unwrap();
        let spec: Value = serde_json::from_slice(&more.guest_spec).unwrap();
        assert_eq!(spec["mounts"][1]["source"], "/run/katavm/shared/c1.mount-1");
        assert_eq!(spec["mounts"][1]["destination"], "/etc/resolv.conf");
        let added = more.exports.last().unwrap();
        assert_eq!((added.name.as_str(), added.read_only), ("c1.mount-1", true));
        for own in ["/etc", "/etc/resolv.conf"] {
            let (before, _) = plan(json!([{ "destination": own, "type": "bind", "source": "data" }]));
            let after = before.with_file(&id, place, "/x".into()).unwrap();
            assert_eq!((after.exports, after.guest_spec), (before.exports, before.guest_spec), "{own}");
        }
    }

    #[test]
    fn file_systems_in_images_are_disks() {
        let (plan, spec) = plan(json!([
            { "destination": "/a", "type": "ext4", "source": "file", "options": ["loop", "noatime"] },
            { "destination": "/b", "type": "erofs", "source": "file" },
            { "destination": "/file", "source": "file", "options": ["bind"] },
        ]));
        let of = |disk: &Disk| (disk.part, disk.read_only, disk.file_system.clone().unwrap_or_default());
        let ext4 = ("ext4".to_owned(), vec!["loop".to_owned(), "noatime".to_owned()]);
        assert_eq!(
            plan.disks.iter().map(of).collect::<Vec<_>>(),
            [(Part::Mount(0), false, ext4), (Part::Mount(1), true, ("erofs".into(), vec!["ro".to_owned()]))]
        );
        assert_eq!(plan.exports.len(), 2, "the root and the last one");
        assert_eq!(spec["mounts"][0]["type"], "bind");
        assert_eq!(spec["mounts"][0]["options"], json!(["noatime", "bind"]));
        let none = json!([{ "destination": "/a", "type": "ext4", "source": "data" }]);
        assert!(error(none).contains("\"B/data\" is a directory"));
        let none = json!([{ "destination": "/a", "type": "ext4", "source": "gone" }]);
        assert!(error(none).contains("stat B/gone: no such file"));
    }

    #[test]
    fn a_root_on_a_disk_is_not_shared() {
        let (_dir, mut bundle) = bundle(json!([{ "destination": "/file", "source": "file", "options": ["bind"] }]));
        let disk = FileSystem { kind: "ext4".into(), source: "/images/1".into(), options: vec!["loop".into()] };
        bundle.in_guest = Some(GuestRoot::Disk(disk.clone()));
        let plan = Plan::new(&"c1".parse().unwrap(), &bundle, SizeOptions::default(), &HashMap::new()).unwrap();
        assert_eq!(plan.exports.iter().map(|export| export.name.as_str()).collect::<Vec<_>>(), ["c1.mount-0"]);
        assert_eq!(plan.disks, [Disk::of_root(Part::Root, &disk)]);
        assert!(plan.view.is_elsewhere);
        assert_eq!((plan.places(), Plan { disks: Vec::new(), ..plan }.places()), (20, 4));
    }

    #[test]
    fn layers_are_disks_and_the_upper_one_is_shared() {
        let (_dir, mut bundle) = bundle(json!([]));
        let layer = |n: usize| FileSystem {
            kind: "erofs".into(),
            source: format!("/s/{n}/layer.erofs").into(),
            options: vec!["ro".into()],
        };
        let upper = Upper { parent: "/s/3".into(), upper: "fs".into(), work: "work".into() };
        let overlay =
            Overlay { layers: vec![layer(2), layer(1)], upper: Some(upper), options: vec!["index=off".into()] };
        bundle.in_guest = Some(GuestRoot::Overlay(overlay.clone()));
        let plan = |bundle: &Bundle| {
            Plan::new(&"c1".parse().unwrap(), bundle, SizeOptions::default(), &HashMap::new()).unwrap()
        };
        let made = plan(&bundle);
        let layers = [(Part::Layer(0), &layer(2)), (Part::Layer(1), &layer(1))];
        assert_eq!(made.disks, layers.map(|(part, layer)| Disk::of_root(part, layer)));
        assert!(made.disks.iter().all(|disk| disk.read_only));
        assert_eq!(made.exports.len(), 1);
        assert_eq!(
            (made.exports[0].path.as_path(), made.exports[0].only.as_slice()),
            (Path::new("/s/3"), ["fs".to_owned(), "work".to_owned()].as_slice())
        );
        let mount = MountOverlayRequest {
            container_id: "c1".into(),
            upper: "/run/katavm/shared/c1.rootfs/fs".into(),
            work: "/run/katavm/shared/c1.rootfs/work".into(),
            options: vec!["index=off".into()],
            ..Default::default()
        };
        assert_eq!(made.overlay, Some(mount));
        assert_eq!((made.view.is_elsewhere, made.places()), (true, 20));
        bundle.in_guest = Some(GuestRoot::Overlay(Overlay { upper: None, ..overlay }));
        let read_only = plan(&bundle);
        assert!(read_only.exports.is_empty());
        assert_eq!(read_only.overlay.map(|mount| mount.upper), Some(String::new()));
    }

    #[test]
    fn what_means_the_host_is_taken_out() {
        let (_, spec) = plan(json!([]));
        assert_eq!(spec["linux"]["namespaces"], json!([{ "type": "network" }]));
        assert_eq!(spec["linux"]["resources"]["cpu"], json!({ "shares": 100 }));
        assert_eq!(spec["linux"]["resources"]["blockIO"], Value::Null);
        assert_eq!(spec["linux"]["cgroupsPath"], Value::Null);
    }

    #[test]
    fn sources_that_cannot_be_shared_are_named() {
        assert_eq!(
            error(json!([{ "destination": "/mnt", "type": "bind", "source": "gone" }])),
            "error mounting \"B/gone\" to rootfs at \"/mnt\": stat B/gone: no such file or directory"
        );
        assert_eq!(error(json!([{ "destination": "/mnt", "type": "bind" }])), "mounts[0]: a bind mount needs a source");
        let (dir, bundle) = bundle(json!([{ "destination": "/s", "type": "bind", "source": "socket" }]));
        let _listener = UnixListener::bind(dir.path().join("socket")).unwrap();
        let text = Plan::new(&"c1".parse().unwrap(), &bundle, SizeOptions::default(), &HashMap::new())
            .unwrap_err()
            .to_string();
        assert!(text.contains("/socket\" is a socket of the host's kernel"), "{text}");
        let text = error(json!([{ "destination": "/k", "type": "bind", "source": "/dev/kmsg" }]));
        assert!(text.contains("\"/dev/kmsg\" is a character device"), "{text}");
    }
}
