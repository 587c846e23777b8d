//! The host's side: initramfs, QEMU, results.

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio, exit};
use std::time::Duration;

const QEMU: &str = "qemu-system-x86_64";
/// What isa-debug-exit makes of the byte 1 (RESET_ORDERLY): (1 << 1) | 1.
const ORDERLY: i32 = 3;
const LIMIT: Duration = Duration::from_secs(540);

fn skip(reason: &str) -> ! {
    println!("SKIPPED guest: {reason}");
    exit(0)
}

fn kernel() -> PathBuf {
    let home = PathBuf::from(env::var_os("HOME").unwrap_or_default());
    let cache = env::var_os("XDG_CACHE_HOME").map_or_else(|| home.join(".cache"), PathBuf::from);
    let image = cache.join("katavm/guest-image/current");
    let named = env::var_os("KATAVM_TEST_KERNEL").map(PathBuf::from);
    let candidates = named.into_iter().chain([image.join("bzImage"), image.join("vmlinux")]);
    candidates.into_iter().find(|path| path.exists()).unwrap_or_else(|| {
        skip("no guest kernel: build the guest image, or name one by KATAVM_TEST_KERNEL");
    })
}

pub fn run() {
    let installed = |program: &str| Command::new(program).arg("--help").output().is_ok();
    if !installed(QEMU) {
        skip("qemu-system-x86_64 is not installed (Debian: qemu-system-x86)");
    }
    let busybox = Path::new("/bin/busybox");
    let is_static = fs::read(busybox).is_ok_and(|bytes| !bytes.windows(10).any(|part| part == b"/ld-linux-"));
    if !is_static {
        skip("/bin/busybox is missing or not static (Debian: busybox-static)");
    }
    let kernel = kernel();
    let folder = tempfile::tempdir().expect("a folder");
    let initramfs = folder.path().join("initramfs.cpio");
    fs::write(&initramfs, archive(busybox)).expect("the initramfs is written");
    let filter = env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect::<Vec<_>>().join(",");
    exit(boot(&kernel, &initramfs, &filter));
}

fn boot(kernel: &Path, initramfs: &Path, filter: &str) -> i32 {
    let mut line = "console=ttyS0 quiet panic=-1 katavm.transport=unix".to_owned();
    if env::var_os("KATAVM_TEST_LOG").is_some() {
        line += " katavm.log=debug";
    }
    if let Ok(more) = env::var("KATAVM_TEST_CMDLINE") {
        line += &format!(" {more}");
    }
    if !filter.is_empty() {
        line += &format!(" katavm.test={filter}");
    }
    let mut qemu = Command::new(QEMU)
        .args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "1024"])
        .args(["-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"])
        .args(["-device", "isa-debug-exit,iobase=0x5f0,iosize=1"])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initramfs)
        .args(["-append", &line])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("QEMU starts");
    let pid = qemu.id();
    std::thread::spawn(move || {
        std::thread::sleep(LIMIT);
        println!("FAILED guest: no end within {LIMIT:?}");
        let _ = Command::new("kill").arg(pid.to_string()).status();
    });
    let (mut passed, mut failed) = (0, 0);
    for line in BufReader::new(qemu.stdout.take().expect("piped")).split(b'\n') {
        let line = String::from_utf8_lossy(&line.expect("QEMU's output")).trim_end().to_owned();
        println!("{line}");
        passed += u32::from(line.starts_with("ok "));
        failed += u32::from(line.starts_with("FAILED "));
    }
    let status = qemu.wait().expect("QEMU ends").code();
    println!("guest: {passed} passed, {failed} failed, QEMU's status {status:?} (orderly: {ORDERLY})");
    i32::from(passed == 0 || failed != 0 || status != Some(ORDERLY))
}

/// A cpio archive ("newc", Documentation/driver-api/early-userspace/buffer-format.rst).
fn archive(busybox: &Path) -> Vec<u8> {
    // Another build of the agent: the static one, say.
    let named = env::var_os("KATAVM_TEST_AGENT").map(PathBuf::from);
    let agent = &*named.unwrap_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_katavm-agent")));
    let test = env::current_exe().expect("this program");
    let mut cpio = Cpio::default();
    for folder in ["rootfs", "rootfs/bin", "rootfs/etc", "rootfs/proc", "rootfs/sys", "rootfs/dev", "rootfs/tmp"] {
        cpio.add(folder, 0o40755, b"");
    }
    cpio.file("init", &test);
    cpio.file("agent", agent);
    for library in libraries(&[agent, &test]) {
        let name = library.strip_prefix("/").expect("absolute").to_owned();
        for above in name.ancestors().skip(1).collect::<Vec<_>>().into_iter().rev() {
            cpio.add(&above.to_string_lossy(), 0o40755, b"");
        }
        cpio.file(&name.to_string_lossy(), &library);
    }
    cpio.file("rootfs/bin/busybox", busybox);
    let applets = Command::new(busybox).arg("--list").output().expect("busybox runs");
    for applet in String::from_utf8_lossy(&applets.stdout).lines().filter(|applet| *applet != "busybox") {
        cpio.add(&format!("rootfs/bin/{applet}"), 0o120_777, b"busybox");
    }
    cpio.add("rootfs/etc/passwd", 0o100_644, b"root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n");
    cpio.add("rootfs/etc/plain", 0o100_644, b"no program\n");
    cpio.add("rootfs/etc/broken", 0o100_755, b"\x7fELF but not really\n");
    cpio.add("rootfs/etc/escape", 0o120_777, b"../../../../../../agent-was-here");
    cpio.add("rootfs/absolute", 0o120_777, b"/etc");
    cpio.add("TRAILER!!!", 0, b"");
    cpio.bytes
}

/// The shared libraries of the programs; none when they are static.
fn libraries(programs: &[&Path]) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    for program in programs {
        let output = Command::new("ldd").arg(program).output().expect("ldd runs");
        for word in String::from_utf8_lossy(&output.stdout).split_whitespace().filter(|word| word.starts_with('/')) {
            found.insert(PathBuf::from(word));
        }
    }
    found
}

#[derive(Default)]
struct Cpio {
    bytes: Vec<u8>,
    names: BTreeSet<String>,
}

impl Cpio {
    fn file(&mut self, name: &str, path: &Path) {
        let mode = fs::metadata(path).expect("a file of the archive").mode();
        self.add(name, mode, &fs::read(path).expect("a file of the archive"));
    }

    fn add(&mut self, name: &str, mode: u32, content: &[u8]) {
        if name.is_empty() || !self.names.insert(name.to_owned()) {
            return;
        }
        let (inode, size, name_size) = (self.names.len(), content.len(), name.len() + 1);
        write!(self.bytes, "070701{inode:08x}{mode:08x}{:08x}{:08x}{:08x}{:08x}{size:08x}", 0, 0, 1, 0).expect("a Vec");
        write!(self.bytes, "{:08x}{:08x}{:08x}{:08x}{name_size:08x}{:08x}", 0, 0, 0, 0, 0).expect("a Vec");
        write!(self.bytes, "{name}\0").expect("a Vec");
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}
