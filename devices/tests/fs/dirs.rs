//! Reading directories.

use std::collections::HashSet;
use std::fs;

use katavm_devices::fs::ExportOptions;

use crate::driver::{Guest, scratch};

const MANY: usize = 10_000;

fn many() -> (tempfile::TempDir, std::path::PathBuf) {
    let (dir, path) = scratch();
    for i in 0..MANY {
        fs::write(path.join(format!("file-{i:05}")), "").unwrap();
    }
    (dir, path)
}

/// Makes room for as many descriptors as there are entries, if this process may.
fn raise_limit() -> bool {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    maximum.is_none_or(|limit| limit > 2 * MANY as u64)
}

#[test]
fn ten_thousand_entries() {
    let enough = raise_limit();
    let (_dir, path) = many();
    let mut guest = Guest::mount(&path, ExportOptions::default());
    let root = guest.root();
    for plus in [false, true] {
        let rows = guest.list(root, plus);
        let names: HashSet<_> = rows.iter().map(|row| row.name.as_str()).collect();
        assert_eq!((rows.len(), names.len()), (MANY + 2, MANY + 2), "plus: {plus}");
        assert!(names.contains("."), "plus: {plus}");
        for row in rows.iter().filter(|row| !row.name.starts_with('.')) {
            assert_eq!(row.kind, u32::from(libc::DT_REG));
            // Without enough descriptors the rest is left to LOOKUP.
            assert!(!plus || !enough || row.node > 1, "{row:?}");
        }
        for row in rows.iter().filter(|row| row.name.starts_with('.')) {
            assert_eq!(row.node, 0, "no lookup is counted for {}", row.name);
        }
        for row in rows.iter().filter(|row| row.node > 1) {
            guest.forget(row.node, 1);
        }
        if let Some(row) = rows.iter().find(|row| row.node > 1) {
            assert_eq!(guest.getattr(row.node).unwrap_err(), libc::ESTALE, "one lookup each");
        }
    }
}

#[test]
fn offsets_hold_while_files_go() {
    raise_limit();
    let (_dir, path) = many();
    let mut guest = Guest::mount(&path, ExportOptions::default());
    let root = guest.root();
    let fh = guest.opendir(root).unwrap();
    let mut seen: HashSet<String> = HashSet::new();
    let mut deleted = HashSet::new();
    let mut offset = 0;
    loop {
        let rows = guest.readdir(root, fh, offset, 4096, true).unwrap();
        let Some(last) = rows.last() else { break };
        offset = last.next;
        for row in &rows {
            assert!(seen.insert(row.name.clone()), "{} came twice", row.name);
            if row.node > 1 {
                guest.forget(row.node, 1);
            }
        }
        // Some of what was seen, some of what was not.
        for i in (seen.len() % 499..MANY).step_by(499).take(10) {
            let name = format!("file-{i:05}");
            if fs::remove_file(path.join(&name)).is_ok() {
                deleted.insert(name);
            }
        }
    }
    assert!(deleted.len() > 100);
    for i in 0..MANY {
        let name = format!("file-{i:05}");
        assert!(seen.contains(&name) || deleted.contains(&name), "{name} was there all the time");
    }
}

#[test]
fn any_offset_and_size() {
    let (_dir, path) = scratch();
    for i in 0..300 {
        fs::write(path.join(format!("{i:0>200}")), "").unwrap();
    }
    let mut guest = Guest::mount(&path, ExportOptions::default());
    let root = guest.root();
    let rows = guest.list(root, false);
    assert_eq!(rows.len(), 302);
    let fh = guest.opendir(root).unwrap();
    for at in [200, 17, 0, 299, 18, 100] {
        let next = guest.readdir(root, fh, rows[at].next, 1024, false).unwrap();
        assert_eq!(next[0].name, rows[at + 1].name, "after entry {at}");
    }
    assert!(guest.readdir(root, fh, rows[301].next, 1024, false).unwrap().is_empty());
    assert_eq!(guest.readdir(root, fh, 0, 8, false).unwrap_err(), libc::EINVAL, "too small for one");
    assert!(guest.readdir(root, fh, u64::MAX, 1024, false).is_err());
    // Rewound, it shows what is new.
    fs::write(path.join("new"), "").unwrap();
    assert!(guest.list(root, false).iter().any(|row| row.name == "new"));
    let file = guest.lookup(root, "new").unwrap().node;
    assert_eq!(guest.opendir(file).unwrap_err(), libc::ENOTDIR);
    let (file_fh, _) = guest.open(file, libc::O_RDONLY).unwrap();
    assert_eq!(guest.readdir(file, file_fh, 0, 1024, false).unwrap_err(), libc::ENOTDIR);
}

#[test]
fn nothing_above_the_export_shows() {
    let (_dir, path) = scratch();
    fs::create_dir_all(path.join("export/sub")).unwrap();
    let mut guest = Guest::mount(&path.join("export"), ExportOptions::default());
    let root = guest.root();
    let own = guest.getattr(root).unwrap().ino;
    for plus in [false, true] {
        for row in guest.list(root, plus).iter().filter(|row| row.name.starts_with('.')) {
            assert_eq!(row.ino, own, "{}", row.name);
        }
    }
    let sub = guest.lookup(root, "sub").unwrap().node;
    let up = guest.list(sub, false).into_iter().find(|row| row.name == "..").unwrap();
    assert_eq!(up.ino, own);
}
