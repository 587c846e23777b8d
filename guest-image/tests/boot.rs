//! Boots the kernel that `katavm-guest-image build` made under QEMU's software emulation and looks at it from inside.
//!
//! This shows that the configuration works with no help from katavm's own monitor; it needs no KVM.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use katavm_guest_image::cpio::Archive;
use katavm_guest_image::image::CURRENT;
use katavm_guest_image::support::cache;

const BUSYBOX: &str = "/bin/busybox";

/// Prints one `name: value` line per fact, then resets the machine.
const INIT: &str = r#"#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t cgroup2 cgroup2 /sys/fs/cgroup
$b mount -t devtmpfs dev /dev
echo "release: $($b uname -r)"
echo "controllers: $($b cat /sys/fs/cgroup/cgroup.controllers)"
echo "filesystems: $($b awk '{print $NF}' /proc/filesystems | $b tr '\n' ' ')"
echo "namespaces: $($b ls /proc/self/ns | $b tr '\n' ' ')"
echo "devices: $(cd /dev && $b ls -d console full fuse hwrng loop-control net/tun null ptmx random tty urandom vsock zero 2>&1 | $b tr '\n' ' ')"
echo "absent: $(cd /dev && $b ls -d mem kmem port kvm tty1 2>/dev/null | $b tr '\n' ' ')"
echo "random: $($b cat /sys/class/misc/hw_random/rng_current)"
echo "disk: $($b cat /sys/block/vda/size)"
echo "limits: $($b mkdir /sys/fs/cgroup/x && cd /sys/fs/cgroup && echo '+cpu +memory +io +pids' > cgroup.subtree_control && $b ls x/memory.swap.max x/io.max x/io.weight x/memory.reclaim x/cpu.max x/pids.max x/memory.pressure 2>&1 | $b tr '\n' ' ')"
echo "options: $($b zcat /proc/config.gz | $b grep -c =y)"
echo "end: reached"
$b reboot -f
"#;

/// The kernel's folder, when there are one and the programs to boot it.
fn prerequisites() -> Option<PathBuf> {
    let image =
        std::env::var_os("KATAVM_GUEST_IMAGE").map_or_else(|| cache::root().unwrap().join(CURRENT), PathBuf::from);
    let missing = if !image.join("vmlinux").exists() {
        "no guest image: run `katavm-guest-image build`, or name its folder in KATAVM_GUEST_IMAGE"
    } else if !Path::new(BUSYBOX).exists() {
        "no /bin/busybox: install busybox-static"
    } else if Command::new("qemu-system-x86_64").arg("--version").output().is_err() {
        "no qemu-system-x86_64: install qemu-system-x86"
    } else {
        return Some(image);
    };
    eprintln!("SKIPPED: {missing}");
    None
}

fn boot(kernel: &Path) -> String {
    let folder = tempfile::tempdir().unwrap();
    let mut archive = Archive::new();
    for name in ["bin", "dev", "proc", "sys"] {
        archive.directory(name, 0o755).unwrap();
    }
    archive.character_device("dev/console", 0o600, (5, 1)).unwrap();
    archive.file("bin/busybox", 0o755, &fs::read(BUSYBOX).unwrap()).unwrap();
    archive.file("init", 0o755, INIT.as_bytes()).unwrap();
    let initramfs = folder.path().join("initramfs");
    fs::write(&initramfs, archive.finish()).unwrap();
    let disk = folder.path().join("disk");
    fs::write(&disk, vec![0; 1 << 20]).unwrap();

    let output = Command::new("timeout")
        .args(["--kill-after=5", "150", "qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", "256", "-smp", "2"])
        .args(["-M", "microvm,acpi=off,pit=on,pic=on,rtc=on,isa-serial=on", "-nographic", "-no-reboot"])
        .args(["-device", "virtio-rng-device", "-device", "virtio-blk-device,drive=disk"])
        .args(["-drive", &format!("if=none,id=disk,format=raw,file={}", disk.display())])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(&initramfs)
        // QEMU's microvm has no keyboard controller: there, a triple fault is the way out.
        // On a busy host the emulated timer misses the ticks that the kernel counts to believe in it; under KVM it does not count.
        .args(["-append", "console=ttyS0 quiet reboot=t no_timer_check"])
        .output()
        .unwrap();
    let console = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{}: {}\n{console}", kernel.display(), String::from_utf8_lossy(&output.stderr));
    console
}

fn check(image: &Path, kernel: &str) {
    let console = boot(&image.join(kernel));
    let fact = |name: &str| {
        let line = console.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        line.unwrap_or_else(|| panic!("the guest said nothing of {name}:\n{console}")).trim()
    };
    let has = |name: &str, wanted: &str| {
        let found: Vec<&str> = fact(name).split_whitespace().collect();
        for word in wanted.split_whitespace() {
            assert!(found.contains(&word), "{name} without {word}: {found:?}");
        }
    };
    assert_eq!(fact("release"), fs::read_to_string(image.join("kernel-release")).unwrap().trim());
    assert_eq!(fact("controllers"), "cpuset cpu io memory hugetlb pids rdma misc");
    has(
        "filesystems",
        "overlay tmpfs fuse virtiofs ext4 erofs mqueue devpts proc sysfs cgroup2 bpf hugetlbfs binfmt_misc",
    );
    has("namespaces", "cgroup ipc mnt net pid time user uts");
    has("devices", "console full fuse hwrng loop-control net/tun null ptmx random tty urandom vsock zero");
    assert_eq!(fact("absent"), "");
    assert!(fact("random").starts_with("virtio_rng"), "{}", fact("random"));
    assert_eq!(fact("disk"), "2048");
    has("limits", "x/memory.swap.max x/io.max x/io.weight x/memory.reclaim x/cpu.max x/pids.max x/memory.pressure");
    assert!(fact("options").parse::<u32>().unwrap() > 500);
    assert_eq!(fact("end"), "reached");
}

#[test]
fn the_elf_boots_with_everything_a_container_needs() {
    if let Some(image) = prerequisites() {
        check(&image, "vmlinux");
    }
}

#[test]
fn the_bzimage_boots_too() {
    if let Some(image) = prerequisites() {
        check(&image, "bzImage");
    }
}
