//! What of a container the guest has as disks: file systems on block devices and in image files of the host, and block
//! devices themselves.

use std::fmt;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Mount;

use super::plan::PlanError;
use crate::config::FileSystem;
use crate::host::{self, FileKind, system_message};

/// A block device or image file of the host that the guest has as a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// What of the container it is.
    pub part: Part,
    /// On the host.
    pub path: PathBuf,
    /// Whether the guest may not change it.
    pub read_only: bool,
    /// Type and options of the file system that is mounted; none where it is the block device itself.
    pub file_system: Option<(String, Vec<String>)>,
}

/// What of a container is on a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Its root file system.
    Root,
    /// The layer of this number of its root file system, the uppermost first.
    Layer(usize),
    /// The mount of this number.
    Mount(usize),
}

impl Part {
    /// Whether it is the root file system, or some of that.
    #[must_use]
    pub fn is_of_root(self) -> bool {
        !matches!(self, Self::Mount(_))
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Root => f.write_str("the root file system"),
            Self::Layer(index) => write!(f, "layer {index} of the root file system"),
            Self::Mount(index) => write!(f, "mounts[{index}]"),
        }
    }
}

/// Options of mount(8) that are one mount's, and not its file system's.
const MOUNT_OPTIONS: [&str; 19] = [
    "ro",
    "rw",
    "nosuid",
    "suid",
    "nodev",
    "dev",
    "noexec",
    "exec",
    "noatime",
    "nodiratime",
    "relatime",
    "strictatime",
    "private",
    "rprivate",
    "slave",
    "rslave",
    "unbindable",
    "runbindable",
    "defaults",
];

/// File systems on disks that the guest's kernel has.
const FILE_SYSTEMS: [&str; 4] = ["ext2", "ext3", "ext4", "erofs"];

/// Whether the guest can mount a file system of this type from a disk.
#[must_use]
pub fn is_known(kind: &str) -> bool {
    FILE_SYSTEMS.contains(&kind)
}

impl Disk {
    /// That of a container's root file system, or of a layer of it.
    #[must_use]
    pub fn of_root(part: Part, root: &FileSystem) -> Self {
        let FileSystem { kind, source, options } = root;
        let (read_only, file_system) = file_system(kind, options);
        Self { part, path: source.clone(), read_only, file_system: Some(file_system) }
    }

    /// What of mount `index` the guest can have as a disk: a file system on a block device or in an image, or a block
    /// device itself. The mount is turned into a bind mount of what the agent mounts.
    ///
    /// # Errors
    /// [`PlanError::Source`] and [`PlanError::Special`].
    pub fn of_mount(mount: &mut Mount, index: usize, bundle: &Path) -> Result<Option<Self>, PlanError> {
        let options = mount.options().clone().unwrap_or_default();
        let has = |option: &str| options.iter().any(|other| other == option);
        let kind = mount.typ().clone().unwrap_or_default();
        let is_node = kind == "bind" || has("bind") || has("rbind");
        let Some(source) = mount.source().as_ref().filter(|_| is_node || is_known(&kind)) else {
            return Ok(None);
        };
        let path = bundle.join(source);
        let found = match host::open_shared(&path) {
            Ok((_, found)) => found,
            // That there is nothing to be bound is told elsewhere.
            Err(_) if is_node => return Ok(None),
            Err(error) => {
                let (destination, reason) = (mount.destination().clone(), system_message(&error));
                return Err(PlanError::Source { source_path: path, destination, reason });
            }
        };
        match (is_node, found) {
            (_, FileKind::BlockDevice) | (false, FileKind::Regular) => {}
            (true, _) => return Ok(None),
            (false, other) => return Err(PlanError::Special { index, source_path: path, kind: other.name() }),
        }
        let part = Part::Mount(index);
        if is_node {
            let read_only = has("ro") || has("rro");
            return Ok(Some(Self { part, path, read_only, file_system: None }));
        }
        let (read_only, file_system) = file_system(&kind, &options);
        let of_the_mount = options.iter().filter(|option| MOUNT_OPTIONS.contains(&option.as_str())).cloned();
        let of_the_mount = of_the_mount.chain(["bind".to_owned()]).collect();
        mount.set_typ(Some("bind".into()));
        mount.set_options(Some(of_the_mount));
        Ok(Some(Self { part, path, read_only, file_system: Some(file_system) }))
    }
}

/// Whether a disk with such a file system is read-only, and how the agent mounts that.
fn file_system(kind: &str, options: &[String]) -> (bool, (String, Vec<String>)) {
    let has = |option: &str| options.iter().any(|other| other == option);
    let read_only = has("ro") || has("rro") || kind == "erofs";
    let mut options = options.to_owned();
    if read_only && !has("ro") {
        // The disk is so, and the kernel does not mount it otherwise.
        options.push("ro".into());
    }
    (read_only, (kind.to_owned(), options))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(kind: &str, options: &[&str]) -> Disk {
        let options = options.iter().map(|option| (*option).to_owned()).collect();
        Disk::of_root(Part::Root, &FileSystem { kind: kind.into(), source: "/dev/mapper/snap-1".into(), options })
    }

    #[test]
    fn a_root_is_as_read_only_as_its_file_system() {
        let ext4 = root("ext4", &["loop", "rw"]);
        assert_eq!(
            (ext4.part, ext4.read_only, ext4.part.to_string()),
            (Part::Root, false, "the root file system".into())
        );
        assert_eq!(ext4.file_system, Some(("ext4".into(), vec!["loop".into(), "rw".into()])));
        assert!(root("ext4", &["ro"]).read_only);
        let erofs = root("erofs", &[]);
        assert_eq!((erofs.read_only, erofs.file_system), (true, Some(("erofs".into(), vec!["ro".into()]))));
    }
}
