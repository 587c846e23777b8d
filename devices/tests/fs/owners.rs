//! Whose files they become.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};

use katavm_devices::fs::ExportOptions;

use crate::driver::{Guest, Msg, is_root, scratch};

#[test]
fn created_files_belong_to_the_caller() {
    let (_dir, path) = scratch();
    if !is_root() {
        println!("SKIPPED: changing owners needs root");
        return;
    }
    let mut guest = Guest::mount(&path, ExportOptions::default());
    let root = guest.root();
    // The guest's kernel has checked permissions, so the directory's mode does not matter here.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
    (guest.uid, guest.gid) = (1234, 2345);
    guest.create(root, "f", libc::O_RDWR, 0o644).unwrap();
    guest.mkdir(root, "d", 0o755).unwrap();
    guest.symlink(root, "l", "f").unwrap();
    guest.mknod(root, "p", libc::S_IFIFO | 0o600, 0).unwrap();
    let make = Msg::new().u32(2).u32(0o100_600).u32(0).u32(0).name("/");
    let tmpfile = guest.call(51, root, make).unwrap();
    assert_eq!(crate::driver::entry_of(&tmpfile).attr.uid, 1234);
    for name in ["f", "d", "l", "p"] {
        let meta = fs::symlink_metadata(path.join(name)).unwrap();
        assert_eq!((meta.uid(), meta.gid()), (1234, 2345), "{name}");
    }
    assert!(guest.mknod(root, "null", libc::S_IFCHR | 0o600, 0x103).is_err(), "a device is for root");
    (guest.uid, guest.gid) = (0, 0);
    guest.create(root, "r", libc::O_RDWR, 0o644).unwrap();
    let meta = fs::metadata(path.join("r")).unwrap();
    assert_eq!((meta.uid(), meta.gid()), (0, 0), "the thread is itself again");
    (guest.uid, guest.gid) = (0, 77);
    guest.create(root, "g", libc::O_RDWR, 0o644).unwrap();
    let meta = fs::metadata(path.join("g")).unwrap();
    assert_eq!((meta.uid(), meta.gid()), (0, 77));
    (guest.uid, guest.gid) = (u32::MAX, 0);
    assert_eq!(guest.create(root, "nobody", libc::O_RDWR, 0o644).unwrap_err(), libc::EINVAL);
}

#[test]
fn chown_and_set_id_bits() {
    let (_dir, path) = scratch();
    if !is_root() {
        println!("SKIPPED: changing owners needs root");
        return;
    }
    let mut guest = Guest::mount(&path, ExportOptions::default());
    let root = guest.root();
    let (entry, fh) = guest.create(root, "f", libc::O_RDWR, 0o755).unwrap();
    let suid = |path: &std::path::Path| fs::set_permissions(path, fs::Permissions::from_mode(0o6755)).unwrap();
    let mode = |path: &std::path::Path| fs::metadata(path).unwrap().mode() & 0o7777;
    let file = path.join("f");
    let set = |valid: u32, uid: u32, gid: u32| {
        Msg::new().u32(valid).u32(0).bytes(&[0; 48]).bytes(&[0; 12]).u32(0).u32(0).u32(uid).u32(gid).u32(0)
    };
    suid(&file);
    guest.call(4, entry.node, set(2 | 4, 10, 20)).unwrap();
    let meta = fs::metadata(&file).unwrap();
    assert_eq!((meta.uid(), meta.gid(), mode(&file)), (10, 20, 0o755), "chown clears the bits");
    assert_eq!(guest.call(4, entry.node, set(2, u32::MAX, 0)).unwrap_err(), libc::EINVAL);
    suid(&file);
    guest.write(entry.node, fh, 0, b"x").unwrap();
    assert_eq!(mode(&file), 0o6755, "written by one with CAP_FSETID");
    guest.write_with(entry.node, fh, 0, b"x", 4, 0).unwrap();
    assert_eq!(mode(&file), 0o755, "FUSE_WRITE_KILL_SUIDGID");
    suid(&file);
    guest.call(4, entry.node, set(8 | 2048, 0, 0)).unwrap();
    assert_eq!(mode(&file), 0o755, "truncated with FATTR_KILL_SUIDGID");
    suid(&file);
    let open = Msg::new().u32((libc::O_WRONLY | libc::O_TRUNC).cast_unsigned()).u32(1);
    guest.call(14, entry.node, open).unwrap();
    assert_eq!(mode(&file), 0o755, "FUSE_OPEN_KILL_SUIDGID");
    // What the guest has left of a chown to nobody else, by the owner, root and a stranger.
    for (uid, expected) in [(10, 0o755), (0, 0o755), (1000, 0o6755)] {
        guest.uid = uid;
        suid(&file);
        guest.call(4, entry.node, set(1 << 10, 0, 0)).unwrap();
        assert_eq!(mode(&file), 0o6755, "another change");
        guest.call(4, entry.node, set(0, 0, 0)).unwrap();
        assert_eq!(mode(&file), expected, "nothing to change, by {uid}");
        guest.call(43, entry.node, Msg::new().u64(fh).u64(0).u64(1).u32(0).u32(0)).unwrap();
        assert_eq!(mode(&file), 0o755, "fallocate by {uid}");
    }
    // A set-group-ID bit without the group's right to execute says something else (inode(7)), to a member of the group.
    for (gid, expected) in [(20, 0o2745), (30, 0o745)] {
        fs::set_permissions(&file, fs::Permissions::from_mode(0o6745)).unwrap();
        (guest.uid, guest.gid) = (10, gid);
        guest.write_with(entry.node, fh, 0, b"x", 4, 0).unwrap();
        assert_eq!(mode(&file), expected, "group {gid}");
    }
    (guest.uid, guest.gid) = (0, 0);
    // And the thread has its capability back.
    suid(&file);
    guest.write(entry.node, fh, 0, b"x").unwrap();
    assert_eq!(mode(&file), 0o6755);
}

#[test]
fn groups_of_the_caller() {
    let (_dir, path) = scratch();
    if !is_root() {
        println!("SKIPPED: changing owners needs root");
        return;
    }
    let shared = path.join("shared");
    fs::create_dir(&shared).unwrap();
    chown(&shared, Some(0), Some(500)).unwrap();
    fs::set_permissions(&shared, fs::Permissions::from_mode(0o2775)).unwrap();
    let mut guest = Guest::mount(&path, ExportOptions::default());
    let root = guest.root();
    let dir = guest.lookup(root, "shared").unwrap().node;
    (guest.uid, guest.gid) = (1000, 1000);
    for (name, with_group, expected) in [("without", false, 0o0775), ("with", true, 0o2775)] {
        let ext = Msg::new().u32(16).u32(32).u32(1).u32(500);
        let ext = if with_group { ext } else { Msg::new() };
        let body = Msg::new().u32(2).u32(0o102_775).u32(0).u32(0).name(name);
        // Extensions are 8-byte aligned and counted in the header.
        let mut bytes = body.0;
        bytes.extend(&ext.0);
        let mut request = guest.request(35, dir, &Msg(bytes));
        request[36..38].copy_from_slice(&((ext.0.len() / 8) as u16).to_le_bytes());
        let reply = guest.send(crate::driver::REQUESTS, &request, 4096);
        assert!(reply.len() > 16, "created");
        let meta = fs::metadata(shared.join(name)).unwrap();
        assert_eq!((meta.uid(), meta.gid()), (1000, 500), "{name}: the group of a set-group-id directory");
        assert_eq!(meta.mode() & 0o7777, expected, "{name}");
    }
    assert!(!rustix::process::getgroups().unwrap().iter().any(|gid| gid.as_raw() == 500), "given back");
}
