//! Save and restore under open files.

use std::collections::BTreeMap;
use std::fs;

use katavm_devices::fs::{ExportOptions, FsShare, FsState};

use crate::driver::{Guest, open_path, scratch};

#[test]
fn everything_comes_back() {
    let (_dir, path) = scratch();
    let export = path.join("export");
    fs::create_dir_all(export.join("d/deep")).unwrap();
    for i in 0..100 {
        fs::write(export.join(format!("d/deep/{i}")), i.to_string()).unwrap();
    }
    let mut guest = Guest::mount(&export, ExportOptions::default());
    let hosts = path.join("hosts");
    fs::write(&hosts, "127.0.0.1").unwrap();
    guest.share.add_export("hosts", open_path(&hosts), ExportOptions::default()).unwrap();
    let root = guest.root();
    let single = guest.lookup(1, "hosts").unwrap().node;
    let dir = guest.lookup(root, "d").unwrap().node;
    let deep = guest.lookup(dir, "deep").unwrap().node;
    let (file, fh) = guest.create(deep, "open", libc::O_RDWR, 0o644).unwrap();
    guest.write(file.node, fh, 0, b"before").unwrap();
    guest.lookup(deep, "open").unwrap();
    let (lost, lost_fh) = guest.create(deep, "lost", libc::O_RDWR, 0o644).unwrap();
    guest.unlink(deep, "lost").unwrap();
    let fh_dir = guest.opendir(deep).unwrap();
    let first = guest.readdir(deep, fh_dir, 0, 1024, false).unwrap();
    // The directory moves after the guest has learnt of it.
    guest.rename2((root, "d"), (root, "moved"), 0).unwrap();

    let state = guest.share.save();
    assert_eq!(state.unreachable(), 1);
    let bytes = postcard::to_stdvec(&state).unwrap();
    let state: FsState = postcard::from_bytes(&bytes).unwrap();
    drop(guest);

    // Another share, another device, exports added in another order.
    let share = FsShare::new();
    share.add_export("new", open_path(&path), ExportOptions::default()).unwrap();
    share.add_export("hosts", open_path(&hosts), ExportOptions::default()).unwrap();
    share.add_export("x", open_path(&export), ExportOptions::default()).unwrap();
    let mut guest = Guest::attach(share);
    let report = guest.share.restore(&state);
    println!("{report:?}");
    assert_eq!((report.nodes, report.stale_nodes, report.handles, report.stale_handles), (5, 1, 2, 1));
    // No INIT: the guest goes on.
    assert_eq!(guest.read(file.node, fh, 0, 10).unwrap(), b"before");
    guest.write(file.node, fh, 6, b" after").unwrap();
    assert_eq!(fs::read(export.join("moved/deep/open")).unwrap(), b"before after");
    assert_eq!(guest.lookup(root, "moved").unwrap().node, dir, "the same node for the same file");
    assert_eq!(guest.lookup(1, "hosts").unwrap().node, single);
    assert_eq!(guest.getattr(lost.node).unwrap_err(), libc::ESTALE);
    assert_eq!(guest.read(lost.node, lost_fh, 0, 1).unwrap_err(), libc::EBADF);
    guest.forget(lost.node, 1);
    // The listing goes on where it was.
    let mut rows = first;
    loop {
        let more = guest.readdir(deep, fh_dir, rows.last().unwrap().next, 1024, false).unwrap();
        if more.is_empty() {
            break;
        }
        rows.extend(more);
    }
    let names: BTreeMap<_, _> = rows.iter().map(|row| (row.name.as_str(), row.ino)).collect();
    assert_eq!((rows.len(), names.len()), (103, 103));
    // Lookups were counted: two for the file.
    guest.forget(file.node, 1);
    assert!(guest.getattr(file.node).is_ok());
    guest.forget(file.node, 1);
    assert_eq!(guest.getattr(file.node).unwrap_err(), libc::ESTALE);
    let (entry, new_fh) = guest.create(deep, "new", libc::O_RDWR, 0o644).unwrap();
    assert!(entry.node > lost.node && new_fh > fh_dir, "numbers go on");
    // And once more.
    let again = guest.share.save();
    assert_eq!(again.session, state.session);
}

#[test]
fn another_file_under_the_name() {
    let (_dir, path) = scratch();
    fs::write(path.join("f"), "old").unwrap();
    fs::write(path.join("same"), "same").unwrap();
    let mut guest = Guest::mount(&path, ExportOptions::default());
    let root = guest.root();
    let file = guest.lookup(root, "f").unwrap().node;
    let same = guest.lookup(root, "same").unwrap().node;
    let (fh, _) = guest.open(file, libc::O_RDONLY).unwrap();
    let state = guest.share.save();
    fs::rename(path.join("f"), path.join("kept")).unwrap();
    fs::write(path.join("f"), "new").unwrap();
    let report = guest.share.restore(&state);
    assert_eq!((report.nodes, report.stale_nodes, report.stale_handles), (2, 1, 1));
    assert_eq!(guest.read(file, fh, 0, 10).unwrap_err(), libc::EBADF);
    assert_eq!(guest.getattr(file).unwrap_err(), libc::ESTALE);
    assert_eq!(guest.getattr(same).unwrap().size, 4);
    let new = guest.lookup(root, "f").unwrap().node;
    assert!(new > same, "not the old node");
}

#[test]
fn a_hostile_snapshot() {
    let (_dir, path) = scratch();
    fs::create_dir(path.join("export")).unwrap();
    fs::write(path.join("outside"), "secret").unwrap();
    fs::write(path.join("export/f"), "text").unwrap();
    std::os::unix::fs::symlink("../outside", path.join("export/link")).unwrap();
    let mut guest = Guest::mount(&path.join("export"), ExportOptions { read_only: true, ..Default::default() });
    let root = guest.root();
    guest.lookup(root, "f").unwrap();
    let good = guest.share.save();
    let ino = std::os::unix::fs::MetadataExt::ino(&fs::metadata(path.join("outside")).unwrap());
    for bad in ["../outside", "/etc/passwd", "..", "link", "f/../../outside", "f\0g", "."] {
        let mut state = good.clone();
        let file = state.nodes[1].file.as_mut().unwrap();
        (file.path, file.ino) = (bad.as_bytes().to_vec(), ino);
        let report = guest.share.restore(&state);
        println!("hostile snapshot path {bad:?}: {report:?}");
        assert_eq!(report.stale_nodes, 1, "{bad}");
    }
    let mut state = good.clone();
    state.handles.push(katavm_devices::fs::HandleState { fh: 9, node: state.nodes[1].id, flags: u32::MAX });
    state.handles.push(katavm_devices::fs::HandleState { fh: 8, node: state.nodes[1].id, flags: 1 });
    state.handles.push(katavm_devices::fs::HandleState { fh: 7, node: 1, flags: 0 });
    let report = guest.share.restore(&state);
    assert_eq!((report.handles, report.stale_handles), (0, 3), "a read-only export stays one");
    let mut state = good.clone();
    (state.nodes[1].id, state.exports[0].0) = (u64::MAX, u64::MAX);
    guest.share.restore(&state);
    let mut state = good;
    (state.last_node, state.last_handle, state.last_export) = (u64::MAX, u64::MAX, u64::MAX);
    guest.share.restore(&state);
    guest.lookup(root, "link").unwrap();
    guest.opendir(root).unwrap();
    guest.share.add_export("y", open_path(&path), ExportOptions::default()).unwrap();
    assert_eq!(guest.list(1, true).len(), 4);
}
