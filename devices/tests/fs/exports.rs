//! Exports: read-only ones, single files, coming and going.

use std::ffi::CString;
use std::fs;
use std::time::Duration;

use katavm_devices::fs::{ExportOptions, Fs, FsShare};

use crate::driver::{ALL_FLAGS, Guest, Msg, open_path, scratch, u32_at};

const READ_ONLY: ExportOptions = ExportOptions {
    read_only: true,
    cache: Duration::from_secs(3600),
    cache_absent: Duration::ZERO,
    cross_mounts: true,
    only: Vec::new(),
    drop_labels: false,
};

#[test]
fn read_only() {
    let (_dir, path) = scratch();
    fs::write(path.join("f"), "text").unwrap();
    fs::create_dir(path.join("d")).unwrap();
    let mut guest = Guest::mount(&path, READ_ONLY);
    let root = guest.root();
    let entry = guest.lookup(root, "f").unwrap();
    let file = entry.node;
    assert_eq!((entry.entry_valid, entry.attr_valid), (3600, 3600));
    let (fh, _) = guest.open(file, libc::O_RDONLY).unwrap();
    let create = || Msg::new().u32(2).u32(0o100_644).u32(0).u32(0);
    let open = |flags: i32| Msg::new().u32(flags.cast_unsigned()).u32(0);
    let write = Msg::new().u64(fh).u64(0).u32(1).u32(0).u64(0).u32(0).u32(0).bytes(b"x");
    let rows: Vec<(&str, u32, u64, Msg)> = vec![
        ("SETATTR", 4, file, Msg::new().u32(1).u32(0).bytes(&[0; 80])),
        ("SYMLINK", 6, root, Msg::new().name("new").name("target")),
        ("MKNOD", 8, root, Msg::new().u32(0o100_644).u32(0).u32(0).u32(0).name("new")),
        ("MKDIR", 9, root, Msg::new().u32(0o755).u32(0).name("new")),
        ("UNLINK", 10, root, Msg::new().name("f")),
        ("RMDIR", 11, root, Msg::new().name("d")),
        ("RENAME", 12, root, Msg::new().u64(root).name("f").name("new")),
        ("RENAME2", 45, root, Msg::new().u64(root).u32(0).u32(0).name("f").name("new")),
        ("LINK", 13, root, Msg::new().u64(file).name("new")),
        ("OPEN for writing", 14, file, open(libc::O_WRONLY)),
        ("OPEN for both", 14, file, open(libc::O_RDWR)),
        ("OPEN to truncate", 14, file, open(libc::O_TRUNC)),
        ("CREATE", 35, root, create().name("new")),
        ("CREATE of what is there", 35, root, create().name("f")),
        ("TMPFILE", 51, root, create().name("/")),
        ("WRITE", 16, file, write),
        ("SETXATTR", 21, file, Msg::new().u32(1).u32(0).u64(0).name("user.a").bytes(b"1")),
        ("REMOVEXATTR", 24, file, Msg::new().name("user.a")),
        ("FALLOCATE", 43, file, Msg::new().u64(fh).u64(0).u64(10).u32(0).u32(0)),
        ("COPY_FILE_RANGE", 47, file, Msg::new().u64(fh).u64(0).u64(file).u64(fh).u64(0).u64(1).u64(0)),
    ];
    for (row, opcode, node, body) in rows {
        let error = guest.call(opcode, node, body).unwrap_err();
        println!("read-only: {row}: errno {error}");
        assert_eq!(error, libc::EROFS, "{row}");
    }
    assert_eq!(guest.read(file, fh, 0, 10).unwrap(), b"text");
    assert_eq!(fs::read_dir(&path).unwrap().count(), 2);
}

#[test]
fn what_is_not_there() {
    let (_dir, path) = scratch();
    let options = ExportOptions { cache_absent: Duration::from_secs(5), ..ExportOptions::default() };
    let mut guest = Guest::mount(&path, options);
    let root = guest.root();
    let entry = guest.lookup(root, "absent").unwrap();
    assert_eq!((entry.node, entry.entry_valid), (0, 5));
    let made = guest.create(root, "absent", libc::O_RDWR, 0o644).unwrap().0.node;
    assert_eq!(guest.lookup(root, "absent").unwrap().node, made);
    assert_eq!(guest.lookup(1, "absent").unwrap_err(), libc::ENOENT, "an export may come any time");
    guest.unlink(root, "absent").unwrap();
    guest.forget(made, 2);
    assert_eq!(guest.share.save().nodes.len(), 1, "no node is made of it");
}

#[test]
fn a_directory_of_which_two_names_are_shown() {
    let (_dir, path) = scratch();
    for name in ["fs", "work", "secret"] {
        fs::create_dir(path.join(name)).unwrap();
    }
    fs::write(path.join("fs/f"), "text").unwrap();
    fs::write(path.join("secret/f"), "text").unwrap();
    let only = ["fs", "work", "none"].map(|name| CString::new(name).unwrap()).to_vec();
    let mut guest = Guest::mount(&path, ExportOptions { only, drop_labels: true, ..ExportOptions::default() });
    let root = guest.root();
    for plus in [false, true] {
        let mut names: Vec<_> = guest.list(root, plus).into_iter().map(|row| row.name).collect();
        names.sort();
        assert_eq!(names, [".", "..", "fs", "work"]);
    }
    let (upper, work) = (guest.lookup(root, "fs").unwrap().node, guest.lookup(root, "work").unwrap().node);
    let file = guest.lookup(upper, "f").unwrap().node;
    for (row, result) in [
        ("MKDIR", guest.mkdir(root, "none", 0o755).map(drop)),
        ("MKNOD", guest.mknod(root, "none", 0o100_644, 0).map(drop)),
        ("CREATE of what is shown", guest.create(root, "fs", libc::O_RDWR, 0o644).map(drop)),
        ("CREATE of what is hidden", guest.create(root, "secret", libc::O_RDWR, 0o644).map(drop)),
        ("TMPFILE", guest.call(51, root, Msg::new().u32(2).u32(0o100_644).u32(0).u32(0).name("/")).map(drop)),
        ("SYMLINK", guest.symlink(root, "layer.erofs", "/etc/passwd").map(drop)),
        ("LINK", guest.call(13, root, Msg::new().u64(file).name("layer.erofs")).map(drop)),
        ("UNLINK", guest.unlink(root, "fs")),
        ("RMDIR", guest.call(11, root, Msg::new().name("work")).map(drop)),
        ("RENAME", guest.call(12, root, Msg::new().u64(root).name("fs").name("none")).map(drop)),
        ("RENAME2 out", guest.rename2((root, "secret"), (upper, "x"), 0)),
        ("RENAME2 in", guest.rename2((upper, "f"), (root, "none"), 0)),
        ("RENAME2 with exchange", guest.rename2((root, "fs"), (root, "secret"), libc::RENAME_EXCHANGE)),
        ("SETATTR", guest.call(4, root, Msg::new().u32(1).u32(0).bytes(&[0; 80])).map(drop)),
        ("SETXATTR", guest.setxattr(root, "user.a", b"1")),
        ("REMOVEXATTR", guest.call(24, root, Msg::new().name("user.a")).map(drop)),
    ] {
        println!("two names: {row}: {result:?}");
        assert_eq!(result.unwrap_err(), libc::EROFS, "{row}");
    }
    assert_eq!(guest.lookup(root, "secret").unwrap_err(), libc::ENOENT);
    assert_eq!(guest.lookup(root, "none").unwrap_err(), libc::ENOENT);
    guest.setxattr(file, "security.selinux", b"label").unwrap();
    assert_eq!(guest.listxattr(file, 100).unwrap(), b"", "it is dropped");
    assert_eq!(guest.setxattr(file, "system.nfs4_acl", b"x").unwrap_err(), libc::EOPNOTSUPP);
    guest.rename2((upper, "f"), (work, "g"), 0).unwrap();
    guest.mkdir(upper, "secret", 0o755).unwrap();
    assert_eq!(guest.list(upper, false).len(), 3, "below, all is as elsewhere");
    guest.call(4, upper, Msg::new().u32(1).u32(0).bytes(&[0; 80])).unwrap();
    assert_eq!(fs::read(path.join("work/g")).unwrap(), b"text");
    assert_eq!(fs::read_dir(&path).unwrap().count(), 3);
}

#[test]
fn the_root_is_fixed() {
    let (_dir, path) = scratch();
    let mut guest = Guest::mount(&path, ExportOptions::default());
    for (row, result) in [
        ("MKDIR", guest.mkdir(1, "new", 0o755).map(drop)),
        ("CREATE", guest.create(1, "new", libc::O_RDWR, 0o644).map(drop)),
        ("RMDIR", guest.call(11, 1, Msg::new().name("x")).map(drop)),
        ("RENAME2", guest.rename2((1, "x"), (1, "y"), 0)),
        ("SETATTR", guest.call(4, 1, Msg::new().u32(1).u32(0).bytes(&[0; 80])).map(drop)),
    ] {
        println!("root: {row}: {result:?}");
        assert_eq!(result.unwrap_err(), libc::EROFS, "{row}");
    }
    assert_eq!(guest.getattr(1).unwrap().mode, 0o40755);
    assert_eq!(guest.getxattr(1, "user.a", 0).unwrap_err(), libc::ENODATA);
    assert_eq!(u32_at(&guest.listxattr(1, 0).unwrap(), 0), 0);
    let fh = guest.opendir(1).unwrap();
    guest.call(29, 1, Msg::new().u64(fh).u32(0).u32(0).u64(0)).unwrap();
    guest.call(17, 1, Msg::new()).unwrap();
    assert_eq!(guest.lookup(1, "..").unwrap_err(), libc::EINVAL);
}

#[test]
fn coming_and_going() {
    let (_dir, path) = scratch();
    fs::create_dir(path.join("a")).unwrap();
    fs::write(path.join("a/f"), "A").unwrap();
    fs::write(path.join("hosts"), "127.0.0.1").unwrap();
    let mut guest = Guest::mount(&path.join("a"), ExportOptions::default());
    let share = guest.share.clone();
    assert_eq!(guest.lookup(1, "hosts").unwrap_err(), libc::ENOENT);
    share.add_export("hosts", open_path(&path.join("hosts")), ExportOptions::default()).unwrap();
    let names =
        |guest: &mut Guest, plus| guest.list(1, plus).into_iter().map(|row| (row.name, row.node)).collect::<Vec<_>>();
    for plus in [false, true] {
        let expected = [".", "..", "x", "hosts"].map(|name| (name.to_owned(), 0));
        assert_eq!(names(&mut guest, plus), expected);
    }
    let hosts = guest.lookup(1, "hosts").unwrap();
    assert_eq!(hosts.attr.mode & libc::S_IFMT, libc::S_IFREG);
    assert_eq!(hosts.attr.flags, 0, "a file is no submount");
    assert!(hosts.attr.ino > 1 << 32);
    assert_eq!(hosts.entry_valid, 0, "an export's name may go any time");
    let (fh, _) = guest.open(hosts.node, libc::O_RDWR).unwrap();
    guest.write(hosts.node, fh, 9, b"!").unwrap();
    assert_eq!(fs::read(path.join("hosts")).unwrap(), b"127.0.0.1!");
    let x = guest.lookup(1, "x").unwrap();
    assert_eq!(x.attr.flags, 1, "an exported directory is a submount");
    let file = guest.lookup(x.node, "f").unwrap();
    assert_eq!(file.attr.flags, 0);
    let (open, _) = guest.open(file.node, libc::O_RDONLY).unwrap();
    let link = guest.call(13, x.node, Msg::new().u64(hosts.node).name("l"));
    assert_eq!(link.unwrap_err(), libc::EXDEV, "from one export to another");

    assert!(share.remove_export("x"));
    assert!(!share.remove_export("x"));
    assert_eq!(guest.lookup(1, "x").unwrap_err(), libc::ENOENT);
    assert_eq!(guest.getattr(x.node).unwrap_err(), libc::ESTALE);
    assert_eq!(guest.lookup(x.node, "f").unwrap_err(), libc::ESTALE);
    assert_eq!(guest.getattr(file.node).unwrap_err(), libc::ESTALE);
    assert_eq!(guest.read(file.node, open, 0, 1).unwrap_err(), libc::EBADF);
    assert_eq!(guest.read(hosts.node, fh, 0, 3).unwrap(), b"127", "the other one lives on");
    guest.forget(file.node, 1);
    guest.forget(x.node, 1);
    share.add_export("x", open_path(&path.join("a")), ExportOptions::default()).unwrap();
    assert_ne!(guest.lookup(1, "x").unwrap().node, x.node);
}

#[test]
fn descriptors_are_closed_with_the_export() {
    let (_dir, path) = scratch();
    fs::create_dir_all(path.join("gone/sub")).unwrap();
    fs::write(path.join("gone/sub/f"), "").unwrap();
    let mut guest = Guest::mount(&path.join("gone"), ExportOptions::default());
    let root = guest.root();
    let sub = guest.lookup(root, "sub").unwrap().node;
    let file = guest.lookup(sub, "f").unwrap().node;
    guest.open(file, libc::O_RDONLY).unwrap();
    guest.opendir(sub).unwrap();
    let held = || {
        let links = fs::read_dir("/proc/self/fd").unwrap().flatten();
        links.filter_map(|link| fs::read_link(link.path()).ok()).filter(|to| to.starts_with(&path)).count()
    };
    assert!(held() >= 5);
    guest.share.remove_export("x");
    assert_eq!(held(), 0);
}

#[test]
fn what_cannot_be_exported() {
    let (_dir, path) = scratch();
    let share = FsShare::new();
    for name in ["", ".", "..", "a/b", "a\0b"] {
        let error = share.add_export(name, open_path(&path), ExportOptions::default()).unwrap_err();
        println!("export name {name:?}: {error}");
    }
    let error = share.add_export("null", open_path("/dev/null".as_ref()), ExportOptions::default()).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
    share.add_export("x", open_path(&path), ExportOptions::default()).unwrap();
    let error = share.add_export("x", open_path(&path), ExportOptions::default()).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::AlreadyExists);
    assert!(Fs::new("", share.clone()).is_err());
    assert!(Fs::new(&"t".repeat(37), share.clone()).is_err());
    let device = Fs::new(&"t".repeat(36), share.clone()).unwrap();
    assert!(Fs::new("second", share.clone()).is_err(), "one device for a share");
    drop(device);
    assert!(Fs::new("second", share).is_ok());
}

#[test]
fn without_submounts_in_the_guest() {
    let (_dir, path) = scratch();
    let share = FsShare::new();
    share.add_export("x", open_path(&path), ExportOptions::default()).unwrap();
    let mut guest = Guest::attach(share);
    guest.init(ALL_FLAGS & !(1 << 27)).unwrap();
    assert_eq!(guest.lookup(1, "x").unwrap().attr.flags, 0);
    guest.reset_device();
}

#[test]
fn mounts_inside_an_export() {
    // Whatever is mounted on this machine: /proc under / is another file system nearly everywhere.
    let mut guest = Guest::mount("/".as_ref(), READ_ONLY);
    let root = guest.root();
    let proc = guest.lookup(root, "proc").unwrap();
    assert_eq!(proc.attr.flags, 1, "/proc is a mount of its own");
    let own = guest.lookup(proc.node, "self").unwrap();
    assert_eq!(own.attr.mode & libc::S_IFMT, libc::S_IFLNK);
    let stay = ExportOptions { cross_mounts: false, ..READ_ONLY };
    let mut guest = Guest::mount("/".as_ref(), stay);
    let root = guest.root();
    assert_eq!(guest.lookup(root, "proc").unwrap_err(), libc::EXDEV);
}
