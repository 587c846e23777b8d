//! Names and links with which a hostile guest tries to get out.

use std::fs;
use std::os::unix::fs::symlink;

use katavm_devices::fs::ExportOptions;

use crate::driver::{Guest, Msg, scratch};

/// Sends `name` where each operation takes one; gives the operations that accepted it.
fn accepted(guest: &mut Guest, root: u64, file: u64, name: &[u8]) -> Vec<&'static str> {
    let good = |m: Msg| m.name("good");
    let rows: Vec<(&str, u32, Msg)> = vec![
        ("LOOKUP", 1, Msg::new().bytes(name)),
        ("SYMLINK", 6, Msg::new().bytes(name).name("target")),
        ("MKNOD", 8, Msg::new().u32(0o100_644).u32(0).u32(0).u32(0).bytes(name)),
        ("MKDIR", 9, Msg::new().u32(0o755).u32(0).bytes(name)),
        ("UNLINK", 10, Msg::new().bytes(name)),
        ("RMDIR", 11, Msg::new().bytes(name)),
        ("RENAME from", 12, good(Msg::new().u64(root).bytes(name))),
        ("RENAME to", 12, Msg::new().u64(root).name("good").bytes(name)),
        ("RENAME2 from", 45, good(Msg::new().u64(root).u32(0).u32(0).bytes(name))),
        ("RENAME2 to", 45, Msg::new().u64(root).u32(0).u32(0).name("good").bytes(name)),
        ("LINK", 13, Msg::new().u64(file).bytes(name)),
        ("CREATE", 35, Msg::new().u32(2).u32(0o100_644).u32(0).u32(0).bytes(name)),
    ];
    let mut accepted = Vec::new();
    for (operation, opcode, body) in rows {
        if guest.call(opcode, root, body).is_ok() {
            accepted.push(operation);
        }
    }
    accepted
}

#[test]
fn hostile_names() {
    let (_dir, path) = scratch();
    fs::create_dir(path.join("export")).unwrap();
    fs::write(path.join("outside"), "secret").unwrap();
    fs::write(path.join("export/good"), "").unwrap();
    fs::create_dir(path.join("export/sub")).unwrap();
    let mut guest = Guest::mount(&path.join("export"), ExportOptions::default());
    let root = guest.root();
    let file = guest.lookup(root, "good").unwrap().node;
    let long = vec![b'x'; 256];
    let rows: Vec<(&str, Vec<u8>)> = vec![
        ("empty", b"\0".to_vec()),
        ("dot", b".\0".to_vec()),
        ("dot dot", b"..\0".to_vec()),
        ("parent path", b"../outside\0".to_vec()),
        ("absolute path", b"/etc/passwd\0".to_vec()),
        ("slash alone", b"/\0".to_vec()),
        ("slash inside", b"sub/new\0".to_vec()),
        ("slash at the end", b"sub/\0".to_vec()),
        ("256 bytes", [long.as_slice(), b"\0"].concat()),
        ("longer than any path", [vec![b'x'; 9000].as_slice(), b"\0"].concat()),
        ("no terminator", b"good".to_vec()),
        ("bytes after the terminator", b"new\0..\0".to_vec()),
        ("nothing at all", Vec::new()),
    ];
    for (row, name) in rows {
        let mut accepted = accepted(&mut guest, root, file, &name);
        if row == "bytes after the terminator" || row == "nothing at all" || row == "no terminator" {
            // Framing, not names: with two strings in one message these are other messages.
            accepted.retain(|operation| !matches!(*operation, "SYMLINK" | "RENAME from" | "RENAME2 from"));
        }
        println!("hostile name: {row}: accepted by {accepted:?}");
        assert!(accepted.is_empty(), "{row}: {accepted:?}");
    }
    assert_eq!(fs::read_to_string(path.join("outside")).unwrap(), "secret");
    assert_eq!(fs::read_dir(&path).unwrap().count(), 2);
    // What looks odd but is a name.
    for name in ["...", " ", "a\nb", "\u{fc}\u{200d}", "-rf", "con:"] {
        println!("harmless name: {name:?}");
        guest.create(root, name, libc::O_RDWR, 0o644).unwrap();
        guest.unlink(root, name).unwrap();
    }
}

#[test]
fn links_lead_nowhere_on_the_host() {
    let (_dir, path) = scratch();
    let export = path.join("export");
    fs::create_dir(&export).unwrap();
    fs::write(path.join("outside"), "secret").unwrap();
    for (name, target) in [
        ("absolute", "/etc/passwd"),
        ("relative", "../outside"),
        ("directory", "/etc"),
        ("up", ".."),
        ("proc", "/proc/self/root"),
        ("loop", "loop"),
    ] {
        symlink(target, export.join(name)).unwrap();
        let mut guest = Guest::mount(&export, ExportOptions::default());
        let root = guest.root();
        let entry = guest.lookup(root, name).unwrap();
        println!("link: {name} -> {target}");
        assert_eq!(entry.attr.mode & libc::S_IFMT, libc::S_IFLNK, "{name}: shown as a link");
        assert_eq!(guest.call(5, entry.node, Msg::new()).unwrap(), target.as_bytes());
        assert_eq!(guest.open(entry.node, libc::O_RDONLY).unwrap_err(), libc::ELOOP, "{name}: OPEN");
        assert_eq!(guest.opendir(entry.node).unwrap_err(), libc::ENOTDIR, "{name}: OPENDIR");
        assert_eq!(guest.lookup(entry.node, "passwd").unwrap_err(), libc::ENOTDIR, "{name}: LOOKUP through it");
        assert_eq!(guest.create(root, name, libc::O_RDWR, 0o600).unwrap_err(), libc::ELOOP, "{name}: CREATE");
        assert_eq!(guest.create(entry.node, "new", libc::O_RDWR, 0o600).unwrap_err(), libc::ENOTDIR);
        assert_eq!(guest.mkdir(root, name, 0o755).unwrap_err(), libc::EEXIST);
        // chmod, truncate, chown of what it points to.
        let setattr = |valid: u32| Msg::new().u32(valid).u32(0).bytes(&[0; 80]);
        assert_eq!(guest.call(4, entry.node, setattr(8)).unwrap_err(), libc::ELOOP, "{name}: truncate");
        let _whatever_the_file_system_says = guest.call(4, entry.node, setattr(1));
        guest.call(13, root, Msg::new().u64(entry.node).name("hard")).unwrap();
        assert!(fs::symlink_metadata(export.join("hard")).unwrap().is_symlink(), "{name}: LINK");
        fs::remove_file(export.join("hard")).unwrap();
    }
    assert_eq!(fs::read_to_string(path.join("outside")).unwrap(), "secret");
    assert!(fs::metadata("/etc/passwd").unwrap().len() > 0);
}

#[test]
fn a_directory_swapped_for_a_link() {
    let (_dir, path) = scratch();
    fs::create_dir_all(path.join("export/d")).unwrap();
    fs::write(path.join("secret"), "secret").unwrap();
    let mut guest = Guest::mount(&path.join("export"), ExportOptions::default());
    let root = guest.root();
    let dir = guest.lookup(root, "d").unwrap().node;
    fs::rename(path.join("export/d"), path.join("export/old")).unwrap();
    symlink("..", path.join("export/d")).unwrap();
    // The node is still the directory, wherever its name leads now.
    assert_eq!(guest.lookup(dir, "secret").unwrap_err(), libc::ENOENT);
    guest.create(dir, "new", libc::O_RDWR, 0o644).unwrap();
    assert!(path.join("export/old/new").exists());
}
