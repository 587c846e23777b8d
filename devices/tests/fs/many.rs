//! More files than the process may have descriptors: they are let go of and opened again.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use katavm_devices::fs::{ExportOptions, FsShare};

use crate::driver::{Guest, is_root, open_path, scratch};
use crate::kernel::{run, with_mount};

const DIRECTORIES: usize = 40;
const FILES: usize = 50;
/// Of descriptors, in the child.
const LIMIT: usize = 160;

/// The tests of this file in a process of their own with few descriptors, once with and once without file handles.
#[test]
fn few_descriptors() {
    let limit = format!("ulimit -n {LIMIT}; exec \"$@\"");
    let without = ["setpriv", "--bounding-set", "-dac_read_search", "--inh-caps", "-dac_read_search"];
    for (row, wrapper) in [("by handle", &[][..]), ("by name", &without[..])] {
        if !wrapper.is_empty() && !is_root() {
            println!("SKIPPED: {row}: only root has capabilities to drop");
            continue;
        }
        let mut child = Command::new("sh");
        child.args(["-c", &limit, "sh"]).args(wrapper).arg(std::env::current_exe().unwrap());
        // Nothing beside: a limit is the whole process'.
        child.args(["--ignored", "--test-threads=1", "--nocapture", "many::in_child"]);
        let output = child.output().unwrap();
        let text = format!("{}\n{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        println!("{row}: {text}");
        assert!(output.status.success(), "{row}: {text}");
        assert!(text.contains("5 passed"), "{row}: {text}");
    }
}

fn name(directory: usize, file: usize) -> String {
    format!("{directory}-{file}")
}

/// A tree and a guest that knows all of it: the nodes of directories and of files.
fn walked(path: &Path) -> (Guest, Vec<u64>, Vec<u64>) {
    for directory in 0..DIRECTORIES {
        let at = path.join(format!("d{directory}"));
        fs::create_dir(&at).unwrap();
        for file in 0..FILES {
            fs::write(at.join(name(directory, file)), name(directory, file)).unwrap();
        }
    }
    let mut guest = Guest::mount(path, ExportOptions::default());
    let root = guest.root();
    let (mut directories, mut files) = (Vec::new(), Vec::new());
    for directory in 0..DIRECTORIES {
        let node = guest.lookup(root, &format!("d{directory}")).unwrap().node;
        directories.push(node);
        files.extend((0..FILES).map(|file| guest.lookup(node, &name(directory, file)).unwrap().node));
        assert!(descriptors() < LIMIT * 3 / 4);
    }
    (guest, directories, files)
}

fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
#[ignore = "run by few_descriptors in a process of its own"]
fn in_child_all_are_served() {
    let (_dir, path) = scratch();
    let (mut guest, directories, files) = walked(&path);
    // In another order than that in which they came.
    for at in (0..files.len()).rev().chain((0..files.len()).step_by(7)) {
        let (directory, file) = (at / FILES, at % FILES);
        let attr = guest.getattr(files[at]).unwrap();
        let host = path.join(format!("d{directory}")).join(name(directory, file));
        assert_eq!(attr.ino, fs::metadata(host).unwrap().ino());
        let (fh, _) = guest.open(files[at], libc::O_RDONLY).unwrap();
        assert_eq!(guest.read(files[at], fh, 0, 100).unwrap(), name(directory, file).as_bytes());
        guest.release(files[at], fh).unwrap();
        assert_eq!(guest.lookup(directories[directory], &name(directory, file)).unwrap().node, files[at]);
        assert!(descriptors() < LIMIT * 3 / 4);
    }
    for (directory, node) in directories.iter().enumerate() {
        let rows = guest.list(*node, true);
        assert_eq!(rows.len(), FILES + 2);
        assert!(rows.iter().all(|row| row.node == 0 || files[directory * FILES..][..FILES].contains(&row.node)));
    }
    // What the guest has open counts as well, up to the limit, and then it is told.
    let mut open = Vec::new();
    let error = loop {
        match guest.open(files[open.len()], libc::O_RDONLY) {
            Ok((fh, _)) => open.push(fh),
            Err(error) => break error,
        }
    };
    println!("{} files open at once", open.len());
    assert_eq!(error, libc::ENFILE);
    assert!(open.len() > LIMIT / 2 && descriptors() < LIMIT - 20, "{} are left to others", LIMIT - descriptors());
    assert_eq!(guest.read(files[0], open[0], 0, 100).unwrap(), name(0, 0).as_bytes());
    for (at, fh) in open.into_iter().enumerate() {
        guest.release(files[at], fh).unwrap();
    }
    for node in files.iter().rev() {
        guest.getattr(*node).unwrap();
        guest.forget(*node, 100);
    }
    assert_eq!(guest.getattr(files[0]).unwrap_err(), libc::ESTALE);
}

#[test]
#[ignore = "run by few_descriptors in a process of its own"]
fn in_child_names_change() {
    let (_dir, path) = scratch();
    let (mut guest, directories, files) = walked(&path);
    let root = guest.root();
    // By the guest: what it knows stays what it is.
    guest.rename2((root, "d3"), (root, "moved"), 0).unwrap();
    guest.rename2((directories[4], &name(4, 1)), (directories[5], "moved"), 0).unwrap();
    guest.rename2((directories[6], &name(6, 1)), (directories[7], &name(7, 1)), 2).unwrap();
    walk_again(&mut guest, &files);
    for file in [3 * FILES, 4 * FILES + 1, 6 * FILES + 1, 7 * FILES + 1] {
        guest.getattr(files[file]).unwrap();
    }
    assert_eq!(guest.lookup(directories[7], &name(7, 1)).unwrap().node, files[6 * FILES + 1]);
    // By the host: after a lookup at the latest, which Linux does by itself on ESTALE.
    fs::rename(path.join("d8"), path.join("d8-moved")).unwrap();
    let node = guest.lookup(root, "d8-moved").unwrap().node;
    assert_eq!(node, directories[8]);
    guest.getattr(files[8 * FILES]).unwrap();
    // A file that is removed by the guest stays for who has it in use there.
    guest.unlink(directories[9], &name(9, 0)).unwrap();
    guest.rename2((directories[9], &name(9, 1)), (directories[9], &name(9, 2)), 0).unwrap();
    walk_again(&mut guest, &files[..9 * FILES]);
    for file in [9 * FILES, 9 * FILES + 2] {
        assert_eq!(guest.getattr(files[file]).unwrap().nlink, 0);
        let (fh, _) = guest.open(files[file], libc::O_RDONLY).unwrap();
        assert!(!guest.read(files[file], fh, 0, 100).unwrap().is_empty());
    }
    guest.getattr(files[9 * FILES + 1]).unwrap();
    // One that the host removes is gone; what gets its inode number is another.
    let gone = path.join("d10").join(name(10, 0));
    let before = guest.lookup(directories[10], &name(10, 0)).unwrap().node;
    walk_again(&mut guest, &files[..9 * FILES]);
    fs::remove_file(&gone).unwrap();
    fs::write(&gone, "another").unwrap();
    let reused = fs::metadata(&gone).unwrap().ino();
    let now = guest.lookup(directories[10], &name(10, 0)).unwrap();
    println!("inode number {reused} again: {}", now.attr.ino == reused);
    assert_ne!(now.node, before);
    assert_eq!(guest.getattr(before).unwrap_err(), libc::ESTALE);
    // A directory with the inode number of a file, or not: never the file's node.
    walk_again(&mut guest, &files[..9 * FILES]);
    fs::remove_file(&gone).unwrap();
    fs::create_dir(&gone).unwrap();
    assert_ne!(guest.lookup(directories[10], &name(10, 0)).unwrap().node, now.node);
    // A cycle of remembered places leads nowhere.
    let a = guest.mkdir(root, "a", 0o755).unwrap().node;
    let b = guest.mkdir(a, "b", 0o755).unwrap().node;
    walk_again(&mut guest, &files[..9 * FILES]);
    fs::rename(path.join("a/b"), path.join("b")).unwrap();
    fs::rename(path.join("a"), path.join("b/a")).unwrap();
    for node in [a, b] {
        println!("after a turn: {:?}", guest.getattr(node).map(|attr| attr.ino));
    }
    assert_eq!(guest.lookup(root, "b").unwrap().node, b);
    assert_eq!(guest.lookup(b, "a").unwrap().node, a);
}

fn walk_again(guest: &mut Guest, files: &[u64]) {
    for node in files {
        guest.getattr(*node).unwrap();
    }
}

#[test]
#[ignore = "run by few_descriptors in a process of its own"]
fn in_child_a_deep_tree() {
    let (_dir, path) = scratch();
    let mut guest = Guest::mount(&path, ExportOptions::default());
    let root = guest.root();
    let mut nodes = vec![root];
    for _ in 0..1000 {
        nodes.push(guest.mkdir(nodes[nodes.len() - 1], "d", 0o755).unwrap().node);
    }
    for node in nodes.iter().rev().chain(&nodes) {
        assert_eq!(guest.getattr(*node).unwrap().mode & libc::S_IFMT, libc::S_IFDIR);
    }
    for at in (1..nodes.len()).rev() {
        guest.call(11, nodes[at - 1], crate::driver::Msg::new().name("d")).unwrap();
        // In use still, and so held; Linux forgets it with its last user.
        guest.getattr(nodes[at]).unwrap();
        guest.forget(nodes[at], 1);
    }
}

#[test]
#[ignore = "run by few_descriptors in a process of its own"]
fn in_child_saved_and_restored() {
    let (_dir, path) = scratch();
    let (mut guest, directories, files) = walked(&path);
    let fd = open_path(&path);
    let root = guest.root();
    guest.rename2((root, "d3"), (root, "moved"), 0).unwrap();
    let state = guest.share.save();
    assert_eq!((state.nodes.len(), state.unreachable()), (1 + DIRECTORIES * (FILES + 1), 0));
    drop(guest);
    let share = FsShare::new();
    share.add_export("x", fd.as_fd().try_clone_to_owned().unwrap(), ExportOptions::default()).unwrap();
    let report = share.restore(&state);
    assert_eq!((report.nodes, report.stale_nodes), (state.nodes.len(), 0));
    assert!(descriptors() < LIMIT * 3 / 4);
    let mut guest = Guest::attach(share);
    walk_again(&mut guest, &files);
    walk_again(&mut guest, &directories);
    assert_eq!(guest.share.save(), state);
}

#[test]
#[ignore = "run by few_descriptors in a process of its own"]
fn in_child_linux_is_the_client() {
    let (_dir, path) = scratch();
    let share = FsShare::new();
    share.add_export("x", open_path(&path), ExportOptions::default()).unwrap();
    with_mount(&share, |at| {
        let script = "mkdir t; cd t; for d in $(seq 20); do mkdir $d; (cd $d; seq 50 | xargs touch; echo $d >1); done
            test $(find . | wc -l) = 1021; mv 3 three; mv 4 three/four; mv 5/1 6/moved
            test $(cat three/four/1 6/moved | tr -d '\\n') = 45; ls -lR . >/dev/null
            cp -a . ../copy; diff -r . ../copy; (cd 8; rm -r ../8; ! ls . 2>/dev/null | grep .)
            test $(tar c . | tar t | wc -l) = 970; find . -newer three -exec stat {} + >/dev/null; cd ..; rm -r t copy";
        println!("{}", run(&at.join("x"), script));
    });
    assert_eq!(fs::read_dir(&path).unwrap().count(), 0);
}
