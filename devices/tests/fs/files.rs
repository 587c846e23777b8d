//! The life of files.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};

use katavm_devices::fs::ExportOptions;

use crate::driver::{ALL_FLAGS, Guest, Msg, attr_at, is_root, scratch, u32_at, u64_at};

#[test]
fn what_is_negotiated() {
    let (_dir, path) = scratch();
    let share = katavm_devices::fs::FsShare::new();
    share.add_export("x", crate::driver::open_path(&path), ExportOptions::default()).unwrap();
    let mut guest = Guest::attach(share);
    let config = guest.config();
    assert_eq!(&config[..5], b"test\0");
    assert_eq!(u32_at(&config, 36), 1);
    assert_eq!(guest.lookup(1, "x").unwrap_err(), libc::EIO, "before INIT");
    let reply = guest.init(ALL_FLAGS).unwrap();
    assert_eq!((u32_at(&reply, 0), u32_at(&reply, 4)), (7, 41));
    let flags = u64::from(u32_at(&reply, 12)) | u64::from(u32_at(&reply, 32)) << 32;
    assert_eq!(u32_at(&reply, 20), 1 << 20, "max_write");
    assert_eq!(u32_at(&reply, 28) & 0xffff, 256, "max_pages");
    // No remote locks (1, 10), no lookups of "." and ".." (4), no writeback cache (16), no open-less files (17, 24).
    assert_eq!(flags & (1 << 1 | 1 << 4 | 1 << 10 | 1 << 16 | 1 << 17 | 1 << 24), 0);
    for bit in [0, 3, 5, 6, 12, 13, 14, 15, 18, 20, 22, 23, 27, 28, 29, 30, 34] {
        assert_ne!(flags & 1 << bit, 0, "flag {bit}");
    }
    assert_eq!(guest.init(ALL_FLAGS).unwrap_err(), libc::EINVAL, "a second INIT");
    assert!(guest.lookup(1, "x").is_ok());
    guest.call(38, 0, Msg::new()).unwrap();
    assert_eq!(guest.lookup(1, "x").unwrap_err(), libc::EIO, "after DESTROY");
    assert!(guest.init(ALL_FLAGS).is_ok());
}

#[test]
fn a_file_from_create_to_unlink() {
    let (_dir, path) = scratch();
    let mut guest = Guest::mount(&path, ExportOptions::default());
    let root = guest.root();
    let (entry, fh) = guest.create(root, "f", libc::O_RDWR, 0o666).unwrap();
    assert_eq!(entry.attr.mode, 0o100_644, "umask of the caller");
    assert_eq!((entry.entry_valid, entry.attr_valid), (1, 1));
    let data: Vec<u8> = (0..1 << 20).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    assert_eq!(guest.write(entry.node, fh, 0, &data).unwrap(), 1 << 20);
    assert_eq!(fs::read(path.join("f")).unwrap(), data);
    assert_eq!(guest.read(entry.node, fh, 0, 1 << 20).unwrap(), data);
    assert_eq!(guest.read(entry.node, fh, (1 << 20) - 10, 4096).unwrap(), &data[(1 << 20) - 10..]);
    assert!(guest.read(entry.node, fh, 1 << 20, 4096).unwrap().is_empty(), "end of file");
    assert_eq!(guest.read(entry.node, fh, u64::MAX, 1).unwrap_err(), libc::EINVAL);
    assert_eq!(guest.read(root, fh, 0, 1).unwrap_err(), libc::EBADF, "another node's handle");
    guest.call(25, entry.node, Msg::new().u64(fh).u32(0).u32(0).u64(0)).unwrap();
    for datasync in [0, 1] {
        guest.call(20, entry.node, Msg::new().u64(fh).u32(datasync).u32(0)).unwrap();
    }
    guest.unlink(root, "f").unwrap();
    assert_eq!(guest.getattr(entry.node).unwrap().nlink, 0);
    assert_eq!(guest.read(entry.node, fh, 0, 8).unwrap(), &data[..8], "deleted but open");
    guest.release(entry.node, fh).unwrap();
    assert_eq!(guest.release(entry.node, fh).unwrap_err(), libc::EBADF);
    guest.forget(entry.node, 1);
    assert_eq!(guest.getattr(entry.node).unwrap_err(), libc::ESTALE);
    assert_eq!(guest.lookup(root, "f").unwrap_err(), libc::ENOENT);
}

#[test]
fn lookups_are_counted() {
    let (_dir, path) = scratch();
    fs::write(path.join("f"), "").unwrap();
    let mut guest = Guest::mount(&path, ExportOptions::default());
    let root = guest.root();
    let node = guest.lookup(root, "f").unwrap().node;
    assert_eq!(guest.lookup(root, "f").unwrap().node, node);
    guest.forget(node, 1);
    assert!(guest.getattr(node).is_ok());
    let batch = Msg::new().u32(2).u32(0).u64(node).u64(1).u64(999).u64(1);
    let request = guest.request(42, 0, &batch);
    guest.send(crate::driver::HIPRIO, &request, 0);
    assert_eq!(guest.getattr(node).unwrap_err(), libc::ESTALE);
    assert_ne!(guest.lookup(root, "f").unwrap().node, node, "node ids are not given again");
    guest.forget(node, u64::MAX);
    guest.forget(1, u64::MAX);
    assert!(guest.getattr(1).is_ok());
}

#[test]
fn hard_links_are_one_node() {
    let (_dir, path) = scratch();
    let mut guest = Guest::mount(&path, ExportOptions::default());
    let root = guest.root();
    let (entry, _) = guest.create(root, "a", libc::O_RDWR, 0o644).unwrap();
    let link = guest.call(13, root, Msg::new().u64(entry.node).name("b")).unwrap();
    let link = crate::driver::entry_of(&link);
    assert_eq!((link.node, link.attr.nlink), (entry.node, 2));
    let sub = guest.mkdir(root, "d", 0o755).unwrap();
    assert_eq!(guest.call(13, root, Msg::new().u64(sub.node).name("e")).unwrap_err(), libc::EPERM);
    let sym = guest.symlink(root, "s", "/nowhere").unwrap();
    let link = guest.call(13, sub.node, Msg::new().u64(sym.node).name("s2")).unwrap();
    assert_eq!(crate::driver::entry_of(&link).node, sym.node, "the link itself, not its target");
}

#[test]
fn rename_flags() {
    const NOREPLACE: u32 = 1;
    const EXCHANGE: u32 = 2;
    let (_dir, path) = scratch();
    let mut guest = Guest::mount(&path, ExportOptions::default());
    let root = guest.root();
    let sub = guest.mkdir(root, "d", 0o755).unwrap().node;
    for name in ["a", "b"] {
        fs::write(path.join(name), name).unwrap();
    }
    assert_eq!(guest.rename2((root, "a"), (root, "b"), NOREPLACE).unwrap_err(), libc::EEXIST);
    guest.rename2((root, "a"), (root, "b"), EXCHANGE).unwrap();
    assert_eq!(fs::read_to_string(path.join("a")).unwrap(), "b");
    guest.rename2((root, "a"), (sub, "c"), NOREPLACE).unwrap();
    assert_eq!(fs::read_to_string(path.join("d/c")).unwrap(), "b");
    assert_eq!(guest.rename2((root, "b"), (sub, "c"), 0x80).unwrap_err(), libc::EINVAL);
    // The old RENAME.
    guest.call(12, root, Msg::new().u64(sub).name("b").name("c")).unwrap();
    assert_eq!(fs::read_to_string(path.join("d/c")).unwrap(), "a");
    assert_eq!(guest.rename2((root, "d"), (sub, "d"), 0).unwrap_err(), libc::EINVAL, "into itself");
    assert_eq!(guest.rename2((root, "d"), (1, "d"), 0).unwrap_err(), libc::EROFS, "out of the export");
}

#[test]
fn special_files_and_links() {
    let (_dir, path) = scratch();
    let mut guest = Guest::mount(&path, ExportOptions::default());
    let root = guest.root();
    let fifo = guest.mknod(root, "p", libc::S_IFIFO | 0o666, 0).unwrap();
    assert!(fs::metadata(path.join("p")).unwrap().file_type().is_fifo());
    assert_eq!(guest.open(fifo.node, libc::O_RDONLY).unwrap_err(), libc::ENXIO, "the guest's own business");
    // A pipe where CREATE finds it must not block either.
    assert_eq!(guest.create(root, "p", libc::O_WRONLY, 0o600).unwrap_err(), libc::ENXIO);
    assert_eq!(guest.create(root, "p", libc::O_WRONLY | libc::O_EXCL, 0o600).unwrap_err(), libc::EEXIST);
    guest.mknod(root, "s", libc::S_IFSOCK | 0o600, 0).unwrap();
    guest.mknod(root, "r", libc::S_IFREG | 0o600, 0).unwrap();
    assert_eq!(guest.mknod(root, "d", libc::S_IFDIR | 0o700, 0).unwrap_err(), libc::EINVAL);
    let target = "t".repeat(4095);
    let link = guest.symlink(root, "l", &target).unwrap();
    assert_eq!(guest.call(5, link.node, Msg::new()).unwrap(), target.as_bytes());
    assert_eq!(guest.symlink(root, "l2", &"t".repeat(4096)).unwrap_err(), libc::ENAMETOOLONG);
    assert_eq!(guest.call(5, fifo.node, Msg::new()).unwrap_err(), libc::EINVAL);
    if is_root() {
        let null = guest.mknod(root, "null", libc::S_IFCHR | 0o666, 0x103).unwrap();
        assert_eq!(null.attr.rdev, 0x103);
        assert_eq!(fs::metadata(path.join("null")).unwrap().rdev(), libc::makedev(1, 3));
        assert_eq!(guest.open(null.node, libc::O_RDWR).unwrap_err(), libc::ENXIO);
    }
}

#[test]
fn attributes() {
    let (_dir, path) = scratch();
    let mut guest = Guest::mount(&path, ExportOptions::default());
    let root = guest.root();
    let (entry, fh) = guest.create(root, "f", libc::O_RDWR, 0o644).unwrap();
    let set = |valid: u32, fh: u64, size: u64, time: u64, nsec: u32, mode: u32| {
        let head = Msg::new().u32(valid).u32(0).u64(fh).u64(size).u64(0).u64(time).u64(time).u64(0);
        head.u32(nsec).u32(nsec).u32(0).u32(mode).u32(0).u32(0).u32(0).u32(0)
    };
    let reply = guest.call(4, entry.node, set(1, 0, 0, 0, 0, 0o100_751)).unwrap();
    assert_eq!(attr_at(&reply, 16).mode, 0o100_751);
    for (valid, fh, size) in [(8, 0, 5), (8 | 64, fh, 9), (8 | 64, 77, 3)] {
        let reply = guest.call(4, entry.node, set(valid, fh, size, 0, 0, 0)).unwrap();
        assert_eq!(attr_at(&reply, 16).size, size);
    }
    let reply = guest.call(4, entry.node, set(16 | 32, 0, 0, 12345, 678, 0)).unwrap();
    assert_eq!(attr_at(&reply, 16).mtime, 12345);
    assert_eq!(guest.call(4, entry.node, set(32, 0, 0, 1, 1_073_741_823, 0)).unwrap_err(), libc::EINVAL, "UTIME_NOW");
    let reply = guest.call(4, entry.node, set(32 | 256, 0, 0, 0, 0, 0)).unwrap();
    assert!(attr_at(&reply, 16).mtime > 1_000_000_000);
    // Before 1970.
    let reply = guest.call(4, entry.node, set(32, 0, 0, (-5_i64).cast_unsigned(), 0, 0)).unwrap();
    assert_eq!(attr_at(&reply, 16).mtime.cast_signed(), -5);
    let statx = guest.call(52, entry.node, Msg::new().u32(0).u32(0).u64(0).u32(0).u32(0xfff)).unwrap();
    assert_eq!(statx.len(), 32 + 256);
    assert_ne!(u32_at(&statx, 32) & 0x800, 0, "time of birth");
    assert!(u64_at(&statx, 32 + 80) > 1_000_000_000);
    let link = guest.symlink(root, "l", "f").unwrap();
    let reply = guest.call(4, link.node, set(16 | 32, 0, 0, 777, 0, 0)).unwrap();
    assert_eq!(attr_at(&reply, 16).mtime, 777, "of the link itself");
    let statfs = guest.call(17, entry.node, Msg::new()).unwrap();
    assert!(u64_at(&statfs, 0) > 0 && u32_at(&statfs, 44) == 255);
}

#[test]
fn append_sync_and_mapped_pages() {
    let (_dir, path) = scratch();
    let mut guest = Guest::mount(&path, ExportOptions::default());
    let root = guest.root();
    let (entry, fh) = guest.create(root, "f", libc::O_RDWR | libc::O_APPEND, 0o644).unwrap();
    guest.write_with(entry.node, fh, 0, b"one", 0, libc::O_APPEND).unwrap();
    // The host appended meanwhile, so the guest's idea of the end is old.
    fs::OpenOptions::new()
        .append(true)
        .open(path.join("f"))
        .and_then(|mut f| std::io::Write::write_all(&mut f, b"two"))
        .unwrap();
    guest.write_with(entry.node, fh, 3, b"three", 0, libc::O_APPEND).unwrap();
    assert_eq!(fs::read(path.join("f")).unwrap(), b"onetwothree");
    // Pages of a mapping go where they belong.
    guest.write_with(entry.node, fh, 0, b"ONE", 1, libc::O_APPEND).unwrap();
    assert_eq!(fs::read(path.join("f")).unwrap(), b"ONEtwothree");
    guest.write_with(entry.node, fh, 0, b"1", 0, libc::O_SYNC).unwrap();
    guest.write_with(entry.node, fh, 1, b"2", 0, libc::O_DSYNC).unwrap();
    assert_eq!(&fs::read(path.join("f")).unwrap()[..3], b"12E");
}

#[test]
fn holes_and_copies() {
    let (_dir, path) = scratch();
    let mut guest = Guest::mount(&path, ExportOptions::default());
    let root = guest.root();
    let (a, fa) = guest.create(root, "a", libc::O_RDWR, 0o644).unwrap();
    let (b, fb) = guest.create(root, "b", libc::O_RDWR, 0o644).unwrap();
    let fallocate = |fh: u64, offset: u64, len: u64, mode: i32| {
        Msg::new().u64(fh).u64(offset).u64(len).u32(mode.cast_unsigned()).u32(0)
    };
    guest.call(43, a.node, fallocate(fa, 0, 1 << 20, 0)).unwrap();
    assert_eq!(guest.getattr(a.node).unwrap().size, 1 << 20);
    guest.write(a.node, fa, 0, &vec![7; 1 << 20]).unwrap();
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    guest.call(43, a.node, fallocate(fa, 1 << 16, 1 << 16, punch)).unwrap();
    assert_eq!(guest.call(43, a.node, fallocate(fa, u64::MAX, 1, 0)).unwrap_err(), libc::EINVAL);
    let lseek = |fh: u64, offset: u64, whence: u32| Msg::new().u64(fh).u64(offset).u32(whence).u32(0);
    assert_eq!(u64_at(&guest.call(46, a.node, lseek(fa, 0, 4)).unwrap(), 0), 1 << 16, "SEEK_HOLE");
    assert_eq!(u64_at(&guest.call(46, a.node, lseek(fa, 1 << 16, 3)).unwrap(), 0), 1 << 17, "SEEK_DATA");
    assert_eq!(guest.call(46, a.node, lseek(fa, 0, 0)).unwrap_err(), libc::EINVAL);
    let copy = Msg::new().u64(fa).u64(0).u64(b.node).u64(fb).u64(0).u64(1 << 20).u64(0);
    assert_eq!(u32_at(&guest.call(47, a.node, copy).unwrap(), 0), 1 << 20);
    assert_eq!(fs::read(path.join("a")).unwrap(), fs::read(path.join("b")).unwrap());
    guest.call(50, root, Msg::new().u64(0)).unwrap();
    guest.call(50, 1, Msg::new().u64(0)).unwrap();
}

#[test]
fn nameless_files() {
    let (_dir, path) = scratch();
    let mut guest = Guest::mount(&path, ExportOptions::default());
    let root = guest.root();
    let make = Msg::new().u32(libc::O_RDWR.cast_unsigned()).u32(0o100_600).u32(0).u32(0).name("/");
    let reply = guest.call(51, root, make).unwrap();
    let (entry, fh) = (crate::driver::entry_of(&reply), u64_at(&reply, 128));
    assert_eq!((entry.attr.nlink, entry.attr.mode), (0, 0o100_600));
    guest.write(entry.node, fh, 0, b"text").unwrap();
    assert_eq!(fs::read_dir(&path).unwrap().count(), 0);
    let link = guest.call(13, root, Msg::new().u64(entry.node).name("named")).unwrap();
    assert_eq!(crate::driver::entry_of(&link).node, entry.node);
    assert_eq!(fs::read(path.join("named")).unwrap(), b"text");
}

#[test]
fn pages_are_kept_while_the_file_is_the_same() {
    const KEEP_CACHE: u32 = 2;
    const NOFLUSH: u32 = 32;
    let (_dir, path) = scratch();
    fs::write(path.join("f"), "one").unwrap();
    let mut guest = Guest::mount(&path, ExportOptions::default());
    let root = guest.root();
    let node = guest.lookup(root, "f").unwrap().node;
    assert_eq!(guest.open(node, libc::O_RDONLY).unwrap().1, KEEP_CACHE | NOFLUSH);
    assert_eq!(guest.open(node, libc::O_RDWR).unwrap().1, KEEP_CACHE);
    fs::write(path.join("f"), "three").unwrap();
    assert_eq!(guest.open(node, libc::O_RDONLY).unwrap().1, NOFLUSH, "changed on the host");
    assert_eq!(guest.open(node, libc::O_RDONLY).unwrap().1, KEEP_CACHE | NOFLUSH);
    fs::set_permissions(path.join("f"), fs::Permissions::from_mode(0o600)).unwrap();
    guest.getattr(node).unwrap();
    assert_eq!(guest.open(node, libc::O_RDONLY | libc::O_TRUNC).unwrap().1 & KEEP_CACHE, 0);
    assert_eq!(fs::read(path.join("f")).unwrap(), b"");
}
