//! Extended attributes.

use std::collections::BTreeSet;

use katavm_devices::fs::ExportOptions;

use crate::driver::{Guest, Msg, is_root, scratch, u32_at};

fn names(list: &[u8]) -> BTreeSet<String> {
    list.split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| String::from_utf8(name.into()).unwrap())
        .collect()
}

#[test]
fn set_get_list_remove() {
    let (_dir, path) = scratch();
    let mut guest = Guest::mount(&path, ExportOptions::default());
    let root = guest.root();
    let node = guest.create(root, "f", libc::O_RDWR, 0o644).unwrap().0.node;
    if guest.setxattr(node, "user.a", b"value") == Err(libc::EOPNOTSUPP) {
        println!("SKIPPED: the file system of {} has no extended attributes", path.display());
        return;
    }
    guest.setxattr(node, "user.empty", b"").unwrap();
    assert_eq!(u32_at(&guest.getxattr(node, "user.a", 0).unwrap(), 0), 5);
    assert_eq!(guest.getxattr(node, "user.a", 5).unwrap(), b"value");
    assert_eq!(guest.getxattr(node, "user.a", 4).unwrap_err(), libc::ERANGE);
    assert_eq!(guest.getxattr(node, "user.empty", 10).unwrap(), b"");
    assert_eq!(guest.getxattr(node, "user.none", 10).unwrap_err(), libc::ENODATA);
    let size = u32_at(&guest.listxattr(node, 0).unwrap(), 0);
    assert_eq!(names(&guest.listxattr(node, size).unwrap()), ["user.a", "user.empty"].map(Into::into).into());
    assert_eq!(guest.listxattr(node, size - 1).unwrap_err(), libc::ERANGE);
    // XATTR_CREATE and XATTR_REPLACE.
    let set = |flags: u32, name: &str| Msg::new().u32(1).u32(flags).u64(0).name(name).bytes(b"x");
    assert_eq!(guest.call(21, node, set(1, "user.a")).unwrap_err(), libc::EEXIST);
    assert_eq!(guest.call(21, node, set(2, "user.new")).unwrap_err(), libc::ENODATA);
    guest.call(24, node, Msg::new().name("user.a")).unwrap();
    assert_eq!(guest.call(24, node, Msg::new().name("user.a")).unwrap_err(), libc::ENODATA);
    // On what cannot be opened.
    let link = guest.symlink(root, "l", "f").unwrap().node;
    assert_eq!(guest.listxattr(link, 100).unwrap(), b"", "of the link itself");
    let fifo = guest.mknod(root, "p", libc::S_IFIFO | 0o600, 0).unwrap().node;
    assert_eq!(guest.listxattr(fifo, 100).unwrap(), b"");
}

#[test]
fn hostile_attributes() {
    let (_dir, path) = scratch();
    let mut guest = Guest::mount(&path, ExportOptions::default());
    let root = guest.root();
    let node = guest.create(root, "f", libc::O_RDWR, 0o644).unwrap().0.node;
    let long = format!("user.{}", "x".repeat(300));
    for name in ["security.selinux", "security.ima", "security.evm", "system.other", "plain", "", "btrfs.x", &long] {
        let error = guest.setxattr(node, name, b"x").unwrap_err();
        println!("hostile attribute: {:.30}: errno {error}", name);
        assert!(guest.getxattr(node, name, 10).is_err(), "{name}");
    }
    assert!(guest.setxattr(node, "user.big", &vec![0; 65537]).is_err());
    let lying = Msg::new().u32(1000).u32(0).u64(0).name("user.a").bytes(b"short");
    assert_eq!(guest.call(21, node, lying).unwrap_err(), libc::EINVAL);
    let huge = Msg::new().u32(u32::MAX).u32(0).name("user.a");
    assert!(guest.call_with_room(22, node, &huge, 8).is_err());
}

#[test]
fn file_capabilities_and_acls() {
    let (_dir, path) = scratch();
    let mut guest = Guest::mount(&path, ExportOptions::default());
    let root = guest.root();
    if !is_root() {
        println!("SKIPPED: setting file capabilities needs root");
        return;
    }
    let (entry, fh) = guest.create(root, "f", libc::O_RDWR, 0o755).unwrap();
    // VFS_CAP_REVISION_2 with CAP_NET_RAW.
    let capability = Msg::new().u32(0x0200_0001).u32(1 << 13).u32(0).u32(0).u32(0).0;
    guest.setxattr(entry.node, "security.capability", &capability).unwrap();
    assert_eq!(guest.getxattr(entry.node, "security.capability", 64).unwrap(), capability);
    assert!(names(&guest.listxattr(entry.node, 100).unwrap()).contains("security.capability"));
    // A write takes them away, as on every file system.
    guest.write(entry.node, fh, 0, b"x").unwrap();
    assert_eq!(guest.getxattr(entry.node, "security.capability", 64).unwrap_err(), libc::ENODATA);
    // u::rwx, u:1000:rwx, g::r-x, m::rwx, o::r-x as the default for what is created inside.
    let entries = [(1_u16, 7_u16, u32::MAX), (2, 7, 1000), (4, 5, u32::MAX), (16, 7, u32::MAX), (32, 5, u32::MAX)];
    let mut acl = Msg::new().u32(2);
    for (tag, perm, id) in entries {
        acl = acl.bytes(&tag.to_le_bytes()).bytes(&perm.to_le_bytes()).u32(id);
    }
    let dir = guest.mkdir(root, "d", 0o755).unwrap().node;
    if guest.setxattr(dir, "system.posix_acl_default", &acl.0) == Err(libc::EOPNOTSUPP) {
        println!("SKIPPED: the file system of {} has no ACLs", path.display());
        return;
    }
    let (child, _) = guest.create(dir, "c", libc::O_RDWR, 0o666).unwrap();
    assert_eq!(child.attr.mode & 0o777, 0o664, "the default ACL counts, not the umask");
    assert!(guest.getxattr(child.node, "system.posix_acl_access", 100).is_ok());
}
