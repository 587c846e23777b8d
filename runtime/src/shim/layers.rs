//! Layers of a root file system that the guest can have as disks: an overlay of the host whose lower layers are EROFS, each on
//! a block device or in a file, as containerd's snapshotter erofs makes it.

use std::fs::File;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use crate::config::{FileSystem, Overlay, Upper};
use crate::host::{self, MountSource};

/// The most layers that the guest gets as disks, so that there are places for a volume or two and the other devices as well.
const MOST: usize = 12;
/// File systems that do what overlayfs asks of an upper layer that it does not have by itself (RENAME_WHITEOUT, extended
/// attributes, types in directories), by their numbers for statfs(2): ext4, XFS, Btrfs, tmpfs, F2FS.
const FOR_UPPER: [i64; 5] = [0xef53, 0x5846_5342, 0x9123_683e, 0x0102_1994, 0xf2f5_2010];
/// Options that the guest's overlayfs knows as the host's does, or that say no more than what it does anyway.
const KNOWN: [&str; 13] = [
    "ro",
    "rw",
    "nosuid",
    "nodev",
    "noexec",
    "noatime",
    "nodiratime",
    "relatime",
    "volatile",
    "index=off",
    "xino=off",
    "metacopy=off",
    "redirect_dir=off",
];
/// Options of an EROFS that is more than one device or file from its beginning, or is mounted for others.
const NOT_WHOLE: [&str; 4] = ["device=", "fsoffset=", "fsid=", "domain_id="];

/// The overlay that these options of mount(8) describe, if the guest can have it.
pub fn overlay(options: &[String]) -> Option<Overlay> {
    let (mut lower, mut upper, mut work, mut others) = (None, None, None, Vec::new());
    for option in options {
        match option.split_once('=') {
            Some(("lowerdir", list)) => lower = Some(list),
            Some(("upperdir", path)) => upper = Some(Path::new(path)),
            Some(("workdir", path)) => work = Some(Path::new(path)),
            _ if KNOWN.contains(&option.as_str()) => others.push(option.clone()),
            _ => return None,
        }
    }
    let lower: Vec<&str> = lower?.split(':').collect();
    if lower.len() > MOST {
        return None;
    }
    let mounts = host::mount_sources().ok()?;
    let layers = lower.into_iter().map(|folder| layer(&mounts, Path::new(folder))).collect::<Option<_>>()?;
    let upper = match (upper, work) {
        (Some(upper), Some(work)) => Some(shared(upper, work)?),
        (None, None) => None,
        _ => return None,
    };
    Some(Overlay { layers, upper, options: others })
}

/// What is mounted at `folder`, if that is the whole of one EROFS that the guest's kernel can read.
fn layer(mounts: &[MountSource], folder: &Path) -> Option<FileSystem> {
    let (mount, device) = host::mount_of(folder).ok()?;
    let mount = mounts.iter().find(|other| other.id == mount && other.device == device)?;
    source(mount).filter(|_| Path::new(&mount.path) == folder)
}

/// What the whole of one EROFS is mounted from.
fn source(mount: &MountSource) -> Option<FileSystem> {
    let is_whole = mount.root == "/"
        && !mount.options.split(',').any(|option| NOT_WHOLE.iter().any(|name| option.starts_with(name)));
    // Owners are others in such a mount.
    let is_mapped = mount.flags.split(',').any(|flag| flag == "idmapped");
    if mount.kind != "erofs" || !is_whole || is_mapped {
        return None;
    }
    let source = Path::new(&mount.source);
    let found = source.metadata().ok().filter(|_| source.is_absolute())?;
    let is_it = if found.file_type().is_block_device() { found.rdev() == mount.device } else { found.is_file() };
    (is_it && is_readable(source)).then(|| FileSystem {
        kind: mount.kind.clone(),
        source: source.to_owned(),
        options: vec!["ro".to_owned()],
    })
}

/// Whether the EROFS there is one that the guest's kernel, with its compressions, reads from one device. Its superblock is
/// described in the kernel's fs/erofs/erofs_fs.h.
fn is_readable(source: &Path) -> bool {
    const AT: u64 = 1024;
    const MAGIC: u32 = 0xe0f5_e1e2;
    const PAGE_BITS: u8 = 12;
    /// Features of Linux 6.12.
    const FEATURES: u32 = 0x7f;
    /// There is a list of compressions; without it all is LZ4.
    const COMPRESSIONS: u32 = 0x2;
    /// LZ4 and Zstandard.
    const LZ4_AND_ZSTD: u16 = 0b1001;
    let mut block = [0; 128];
    if File::open(source).and_then(|file| file.read_exact_at(&mut block, AT)).is_err() {
        return false;
    }
    let long = |at: usize| u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
    let short = |at: usize| u16::from_le_bytes([block[at], block[at + 1]]);
    let (magic, block_bits, features, compressions, more_devices) =
        (long(0), block[12], long(80), short(84), short(86));
    magic == MAGIC
        && block_bits <= PAGE_BITS
        && features & !FEATURES == 0
        && (features & COMPRESSIONS == 0 || compressions & !LZ4_AND_ZSTD == 0)
        && more_devices == 0
}

/// An upper layer that the guest can have with its work folder.
fn shared(upper: &Path, work: &Path) -> Option<Upper> {
    let parent = upper.parent().filter(|parent| parent.is_absolute() && work.parent() == Some(parent))?;
    let are_folders = [upper, work].iter().all(|path| path.symlink_metadata().is_ok_and(|found| found.is_dir()));
    let kind = rustix::fs::statfs(parent).ok()?.f_type;
    let names = Upper { parent: PathBuf::from(parent), upper: name(upper)?, work: name(work)? };
    (are_folders && FOR_UPPER.contains(&kind) && names.upper != names.work).then_some(names)
}

/// The last part of a path, if it can stand in an option as it is.
fn name(path: &Path) -> Option<String> {
    let is_plain = |name: &&str| name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    path.file_name()?.to_str().filter(is_plain).map(Into::into)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// A file that begins as an EROFS of these features, compressions and further devices does.
    fn image(path: &Path, features: u32, compressions: u16, more_devices: u16) {
        let mut bytes = vec![0; 4096];
        for (at, value) in [
            (0, &0xe0f5_e1e2_u32.to_le_bytes()[..]),
            (12, &[12]),
            (80, &features.to_le_bytes()),
            (84, &compressions.to_le_bytes()),
            (86, &more_devices.to_le_bytes()),
        ] {
            bytes[1024 + at..][..value.len()].copy_from_slice(value);
        }
        fs::write(path, bytes).unwrap();
    }

    #[test]
    fn a_layer_is_the_whole_of_one_erofs() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("layer.erofs");
        image(&path, 0x1, 0, 0);
        let good = MountSource {
            id: 7,
            path: "/s/1/fs".into(),
            root: "/".into(),
            flags: "ro,relatime".into(),
            device: 0,
            kind: "erofs".into(),
            source: path.to_str().unwrap().into(),
            options: "ro,user_xattr,acl".into(),
        };
        let expected = FileSystem { kind: "erofs".into(), source: path.clone(), options: vec!["ro".into()] };
        assert_eq!(source(&good), Some(expected));
        for bad in [
            MountSource { kind: "ext4".into(), ..good.clone() },
            MountSource { root: "/sub".into(), ..good.clone() },
            MountSource { flags: "ro,idmapped".into(), ..good.clone() },
            MountSource { options: "ro,fsoffset=4096".into(), ..good.clone() },
            MountSource { source: "/dev/null".into(), ..good.clone() },
            MountSource { source: "layer.erofs".into(), ..good.clone() },
        ] {
            assert_eq!(source(&bad), None, "{bad:?}");
        }
        assert_eq!(layer(&[good], dir.path()), None, "nothing is mounted there");
    }

    #[test]
    fn the_guests_kernel_can_read_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("layer.erofs");
        for (features, compressions, more_devices, expected) in [
            (0x7f, 0b1001, 0, true),
            (0x1, 64, 0, true),
            (0x8, 0, 1, false),
            (0x82, 0b1, 0, false),
            (0x2, 0b10, 0, false),
            (0x2, 0b101, 0, false),
        ] {
            image(&path, features, compressions, more_devices);
            assert_eq!(is_readable(&path), expected, "{features:#x} {compressions:#b} {more_devices}");
        }
        fs::write(&path, [0; 4096]).unwrap();
        assert!(!is_readable(&path));
        fs::write(&path, "short").unwrap();
        assert!(!is_readable(&path));
    }

    #[test]
    fn an_upper_layer_has_its_work_folder_beside_it() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["fs", "work", "f,s", "sub/work"] {
            fs::create_dir_all(at(name)).unwrap();
        }
        std::os::unix::fs::symlink("work", at("link")).unwrap();
        let upper = Upper { parent: dir.path().into(), upper: "fs".into(), work: "work".into() };
        assert_eq!(shared(&at("fs"), &at("work")), Some(upper));
        for (upper, work) in [("fs", "fs"), ("fs", "sub/work"), ("f,s", "work"), ("fs", "link"), ("fs", "none")] {
            assert_eq!(shared(&at(upper), &at(work)), None, "{upper} {work}");
        }
        assert_eq!(shared(Path::new("/proc/self"), Path::new("/proc/1")), None, "no file system for this");
        assert_eq!(shared(Path::new("fs"), Path::new("work")), None);
    }

    #[test]
    fn other_overlays_are_not_for_the_guest() {
        let folder = "lowerdir=/etc:/usr";
        for options in [&[folder][..], &[folder, "upperdir=/a/fs"], &["upperdir=/a/fs", "workdir=/a/work"], &[]] {
            let options: Vec<_> = options.iter().map(|option| (*option).to_owned()).collect();
            assert_eq!(overlay(&options), None, "{options:?}");
        }
    }
}
