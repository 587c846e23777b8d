//! Linux' own FUSE client drives the server: real programs on a mount whose requests go through the virtqueues.
//!
//! The client is the same code that a guest runs behind virtio-fs, except for submounts and SYNCFS, which
//! the kernel keeps to virtio-fs.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;
use std::thread::{self, JoinHandle};

use katavm_devices::fs::{ExportOptions, FsShare};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::driver::{Guest, HIPRIO, REQUESTS, is_root, open_path, scratch, u32_at};

/// Carries requests from `/dev/fuse` to the device and replies back, until the file system is unmounted.
fn serve(mut fuse: File, share: FsShare) -> JoinHandle<u64> {
    thread::spawn(move || {
        let mut guest = Guest::attach(share);
        let mut buffer = vec![0; (1 << 20) + (64 << 10)];
        let mut served = 0;
        loop {
            let len = match fuse.read(&mut buffer) {
                Ok(len) => len,
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return served,
                Err(error) => panic!("reading /dev/fuse: {error}"),
            };
            let request = &buffer[..len];
            let (queue, room) = match u32_at(request, 4) {
                2 | 36 | 42 => (HIPRIO, 0),
                15 | 28 | 44 => (REQUESTS, 16 + u32_at(request, 56) as usize),
                22 | 23 => (REQUESTS, 16 + u32_at(request, 40).max(8) as usize),
                _ => (REQUESTS, 16 + 4096),
            };
            let reply = guest.send(queue, request, room);
            served += 1;
            if !reply.is_empty()
                && let Err(error) = fuse.write_all(&reply)
            {
                // ENOENT: the caller was killed meanwhile.
                assert_eq!(error.raw_os_error(), Some(libc::ENOENT), "the kernel takes the reply to {request:?}");
            }
        }
    })
}

/// Has `act` do something in a mount of `share`; how many requests that took. None, with the reason printed, when this
/// machine cannot.
pub fn with_mount(share: &FsShare, act: impl FnOnce(&Path)) -> Option<u64> {
    let Ok(fuse) = File::options().read(true).write(true).open("/dev/fuse") else {
        println!("SKIPPED: no /dev/fuse");
        return None;
    };
    if !is_root() {
        println!("SKIPPED: mounting needs root");
        return None;
    }
    // SAFETY: FS and NEWNS affect this thread's own view of paths, no descriptors.
    if let Err(error) = unsafe { unshare_unsafe(UnshareFlags::FS | UnshareFlags::NEWNS) } {
        println!("SKIPPED: no mount namespace: {error}");
        return None;
    }
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
    let (_dir, at) = scratch();
    let fd = std::os::fd::AsRawFd::as_raw_fd(&fuse);
    let data = format!("fd={fd},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other");
    let data = std::ffi::CString::new(data).unwrap();
    mount("katavm", &at, "fuse", MountFlags::empty(), data.as_c_str()).unwrap();
    let server = serve(fuse, share.clone());
    act(&at);
    // Another test's child may hold a copy of a descriptor between its fork and its exec.
    unmount(&at, UnmountFlags::DETACH).unwrap();
    let served = server.join().unwrap();
    println!("{served} requests served");
    Some(served)
}

pub fn run(directory: &Path, script: &str) -> String {
    let output = Command::new("sh").args(["-euc", script]).current_dir(directory).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{script}\n{}\n{out}\n{err}", output.status);
    out.into_owned()
}

const WORKLOADS: &[(&str, &str)] = &[
    ("copy a tree and compare", "cp -a /etc etc; diff -r --no-dereference /etc etc; tar cf - etc | tar xf - -C /dev/shm -O >/dev/null"),
    (
        "git: 300 files, fsck",
        "mkdir repo; cd repo; export HOME=$PWD GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@b GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@b
         git init -q .; for i in $(seq 300); do echo $i > file-$i; done
         git add .; git commit -qm all; git gc -q; git fsck --strict; test -z \"$(git status --porcelain)\"",
    ),
    ("compile and run", "echo 'int main(){return 42;}' > t.c; gcc -o t t.c; set +e; ./t; test $? = 42"),
    (
        "names and links",
        "mkdir n; cd n; touch a; ln a b; ln -s a c; test $(stat -c %h a) = 2; test $(readlink c) = a
         mv a d; test ! -e a; mkfifo p; (echo through > p &); test $(cat p) = through; rm -r ../n",
    ),
    (
        "a million lines, appended and cut",
        "seq 1000000 > big; seq 1000000 | cmp - big; truncate -s 1000 big; test $(stat -c %s big) = 1000
         for i in 1 2 3; do echo x >> big; done; test $(stat -c %s big) = 1006",
    ),
    ("thousand files in a directory", "mkdir m; (cd m; seq 1000 | xargs touch); test $(ls m | wc -l) = 1000; ls -l m >/dev/null; rm -r m"),
    ("holes", "truncate -s 10M h; printf x | dd of=h bs=1 seek=5M conv=notrunc status=none; fallocate -p -o 0 -l 1M h; cp --sparse=always h h2; cmp h h2"),
    ("owners and modes", "touch o; chown 123:456 o; test $(stat -c %u:%g o) = 123:456; chmod 4711 o; test $(stat -c %a o) = 4711; chown 1 o; test $(stat -c %a o) = 711"),
    ("another user", "mkdir -m 777 pub; setpriv --reuid 1001 --regid 1002 --clear-groups sh -c 'umask 077; echo x > pub/mine; mkdir pub/d'
         test $(stat -c %u:%g:%a pub/mine) = 1001:1002:600; ! setpriv --reuid 1003 --regid 1003 --clear-groups cat pub/mine 2>/dev/null"),
    ("sync", "echo x > s; sync s; sync -d s; sync -f s"),
];

const PYTHON: &str = r#"
import ctypes, fcntl, mmap, os, threading
with open("map", "wb") as f: f.truncate(1 << 20)
fd = os.open("map", os.O_RDWR | os.O_APPEND)
m = mmap.mmap(fd, 1 << 20)
m[5000:5005] = b"hello"; m[0:1] = b"!"
m.flush(); m.close(); os.close(fd)
data = open("map", "rb").read()
assert len(data) == 1 << 20 and data[5000:5005] == b"hello" and data[0:1] == b"!", "a mapping of an O_APPEND file"
os.setxattr("map", "user.k", b"v" * 1000)
assert os.getxattr("map", "user.k") == b"v" * 1000 and os.listxattr("map") == ["user.k"]
os.removexattr("map", "user.k")
fd = os.open(".", os.O_TMPFILE | os.O_RDWR)
os.write(fd, b"nameless")
libc = ctypes.CDLL(None, use_errno=True)
assert libc.linkat(-100, b"/proc/self/fd/%d" % fd, -100, b"named", 0x400) == 0
assert open("named").read() == "nameless"
src = os.open("map", os.O_RDONLY); dst = os.open("copy", os.O_RDWR | os.O_CREAT)
assert os.copy_file_range(src, dst, 1 << 20) == 1 << 20 and os.fstat(dst).st_size == 1 << 20
open("x1", "w").write("1"); open("x2", "w").write("2")
assert libc.renameat2(-100, b"x1", -100, b"x2", 2) == 0 and open("x1").read() == "2", "exchange"
assert libc.renameat2(-100, b"x1", -100, b"x2", 1) == -1 and ctypes.get_errno() == 17, "noreplace"
f = open("x1"); fcntl.flock(f, fcntl.LOCK_EX)
with open("x1") as g:
    try: fcntl.flock(g, fcntl.LOCK_EX | fcntl.LOCK_NB); raise SystemExit("locked twice")
    except BlockingIOError: pass
fd = os.open("gone", os.O_RDWR | os.O_CREAT); os.unlink("gone"); os.write(fd, b"still"); assert os.pread(fd, 5, 0) == b"still"
def work(i):
    for j in range(50):
        name = f"t{i}-{j}"
        open(name, "w").write(name * 100); os.rename(name, name + "r"); assert open(name + "r").read() == name * 100; os.unlink(name + "r")
threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
for bad in ("a" * 256, "..", "x1/y"):
    try: os.mkdir(bad); raise SystemExit(bad)
    except OSError: pass
"#;

#[test]
fn real_programs() {
    let (_dir, path) = scratch();
    let share = FsShare::new();
    share.add_export("x", open_path(&path), ExportOptions::default()).unwrap();
    let hosts = Path::new("/etc/passwd");
    share
        .add_export("passwd", open_path(hosts), ExportOptions { read_only: true, ..ExportOptions::default() })
        .unwrap();
    with_mount(&share, |at| {
        assert_eq!(run(at, "ls -a"), ".\n..\npasswd\nx\n");
        assert_eq!(run(at, "cat passwd"), fs::read_to_string(hosts).unwrap());
        run(at, "! touch new 2>/dev/null; ! sh -c 'echo x >> passwd' 2>/dev/null");
        for (name, script) in WORKLOADS {
            let start = std::time::Instant::now();
            run(&at.join("x"), script);
            println!("workload: {name}: ok ({:.2} s)", start.elapsed().as_secs_f64());
        }
        fs::write(path.join("t.py"), PYTHON).unwrap();
        run(&at.join("x"), "python3 t.py");
        println!("workload: python: ok");
        run(&at.join("x"), "rm -rf ./* ./.[!.]*; test -z \"$(ls -A)\"");
    });
    assert_eq!(fs::read_dir(&path).unwrap().count(), usize::from(!is_root()));
}

#[test]
fn changes_on_the_host_show() {
    let (_dir, path) = scratch();
    let share = FsShare::new();
    let fresh = ExportOptions { cache: std::time::Duration::ZERO, ..ExportOptions::default() };
    share.add_export("x", open_path(&path), fresh).unwrap();
    with_mount(&share, |at| {
        let inside = at.join("x/f");
        for text in ["one", "two", "three", "four!"] {
            fs::write(path.join("f"), text).unwrap();
            assert_eq!(fs::read_to_string(&inside).unwrap(), text);
        }
        fs::rename(path.join("f"), path.join("g")).unwrap();
        assert!(fs::metadata(&inside).is_err());
        fs::write(&inside, "inside").unwrap();
        assert_eq!(fs::read_to_string(path.join("f")).unwrap(), "inside");
        share.remove_export("x");
        assert!(fs::read(&inside).is_err());
    });
}

/// Requests, not time: they cost the same on every machine.
#[test]
fn few_requests_do() {
    let look = "for i in $(seq 50); do ! cat absent-1 absent-2 absent-3 2>/dev/null; done";
    let walk = "find . | wc -l >/dev/null; find . | wc -l >/dev/null";
    let long = std::time::Duration::from_secs(60);
    let plain = ExportOptions { cache: long, ..ExportOptions::default() };
    let absent = ExportOptions { cache_absent: long, ..plain.clone() };
    let none = ExportOptions { cache: std::time::Duration::ZERO, ..plain.clone() };
    // Each from 20 directories with 20 files, and its bound: what was measured, and some more.
    for (row, options, script, most) in [
        ("names that are not there, not cached", plain.clone(), look, 200),
        ("names that are not there, cached", absent, look, 40),
        ("a walk and another, nothing cached", none, walk, 700),
        ("a walk and another, cached", plain, walk, 180),
    ] {
        let (_dir, path) = scratch();
        for directory in 0..20 {
            fs::create_dir(path.join(directory.to_string())).unwrap();
            (0..20).for_each(|file| fs::write(path.join(format!("{directory}/{file}")), "").unwrap());
        }
        let share = FsShare::new();
        share.add_export("x", open_path(&path), options).unwrap();
        let Some(served) = with_mount(&share, |at| drop(run(&at.join("x"), script))) else { return };
        println!("requests: {row}: {served}");
        assert!(served <= most, "{row}: {served} requests");
    }
}
