//! Guests that the `vmm` crate boots directly: every way to start and to end.

use std::fs;
use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use katavm_devices::rng::Rng;
use katavm_guest_image::cpio::Archive;
use katavm_vmm::{ExitReason, Microvm, MicrovmConfig};

use super::{Context, Row, Verdict};

/// The table.
pub const CASES: (&str, &[Row]) = (
    "boot",
    &[
        ("an_elf_kernel_runs_init", elf),
        ("a_bzimage_runs_init", bzimage),
        ("four_cpus_come_up", four_cpus),
        ("memory_above_the_gap_is_usable", memory_above_the_gap),
        ("the_kernel_has_its_options", kernel_options),
        ("virtualization_is_hidden", virtualization_hidden),
        ("random_numbers_come_from_the_host", random),
        ("a_panic_is_a_panic", panic),
        ("a_reboot_is_a_reboot", reboot),
        ("power_off_is_noticed", power_off),
        ("a_halt_is_noticed", halt),
        ("a_paused_guest_stands_still", pause),
        ("two_guests_in_one_process", two_guests),
        ("a_stopped_guest_ends_at_once", stop),
        ("a_file_that_is_no_kernel_is_refused", no_kernel),
        ("too_little_memory_is_refused", too_little_memory),
    ],
);

/// What a guest did.
struct Ran {
    reason: ExitReason,
    console: String,
    exits: u64,
}

/// How long any guest of this table may take, emulated and on a busy machine.
const LIMIT: Duration = Duration::from_secs(120);

/// An initramfs with busybox and a shell script as init, which writes to the console.
pub(super) fn initramfs(context: &Context, script: &str) -> Result<PathBuf> {
    let mut archive = Archive::new();
    for folder in ["bin", "dev", "proc", "sys", "tmp"] {
        archive.directory(folder, 0o755)?;
    }
    archive.character_device("dev/console", 0o600, (5, 1))?;
    archive.file("bin/busybox", 0o755, &fs::read("/bin/busybox").context("the lab needs busybox-static")?)?;
    let init = format!(
        "#!/bin/busybox sh\nexport PATH=/bin\n/bin/busybox --install -s /bin\nmount -t proc proc /proc\n\
         mount -t sysfs sys /sys\nmount -t devtmpfs dev /dev\n{script}\n"
    );
    archive.file("init", 0o755, init.as_bytes())?;
    let path = context.scratch().join("initramfs");
    fs::write(&path, archive.finish())?;
    Ok(path)
}

fn config(context: &Context, script: &str) -> Result<MicrovmConfig> {
    let initramfs = Some(initramfs(context, script)?);
    Ok(MicrovmConfig { kernel: context.image("vmlinux")?, initramfs, ..Default::default() })
}

fn build(config: MicrovmConfig) -> Result<Microvm> {
    Ok(Microvm::builder(config).rng(Rng::new()?).build()?)
}

/// Waits for the guest's end, and stops it when that does not come.
fn finish(context: &Context, vm: &Microvm) -> Result<Ran> {
    let (sender, receiver) = channel();
    let reason = std::thread::scope(|scope| {
        scope.spawn(|| sender.send(vm.wait()));
        receiver.recv_timeout(LIMIT).inspect_err(|_| vm.stop())
    });
    let console = vm.console().tail();
    context.note("console", console.clone());
    let reason = reason.with_context(|| format!("the guest did not end; its console:\n{console}"))?;
    Ok(Ran { reason, console, exits: vm.exits() })
}

fn boot(context: &Context, config: MicrovmConfig) -> Result<Ran> {
    let vm = build(config)?;
    vm.start()?;
    finish(context, &vm)
}

/// Boots `script` and asks for a word on the console, for the reason of the end, and for a guest that really ran.
fn expect(context: &Context, config: MicrovmConfig, reason: &ExitReason, words: &[&str]) -> Result<Verdict> {
    let ran = boot(context, config)?;
    ensure!(&ran.reason == reason, "ended because {:?}, expected {reason:?}; console:\n{}", ran.reason, ran.console);
    for word in words {
        ensure!(ran.console.contains(word), "{word:?} is not on the console:\n{}", ran.console);
    }
    ensure!(ran.exits > 100, "KVM counted {} exits: no guest ran", ran.exits);
    Ok(Verdict::Passed)
}

fn uname(context: &Context, kernel: &str) -> Result<Verdict> {
    let mut config = config(context, "echo kernel $(uname -r) pid $$; reboot -f")?;
    config.kernel = context.image(kernel)?;
    let line = format!("kernel {} pid 1", context.kernel_release()?);
    expect(context, config, &ExitReason::Reset, &[&line])
}

fn elf(context: &Context) -> Result<Verdict> {
    uname(context, "vmlinux")
}

fn bzimage(context: &Context) -> Result<Verdict> {
    uname(context, "bzImage")
}

fn four_cpus(context: &Context) -> Result<Verdict> {
    let mut config = config(context, "echo $(nproc) cpus on $(grep -c ^processor /proc/cpuinfo); reboot -f")?;
    config.vcpus = 4;
    expect(context, config, &ExitReason::Reset, &["4 cpus on 4"])
}

/// 3584 MiB: half a GiB of it lies above 4 GiB. A file in it is written, read back and compared by checksum.
fn memory_above_the_gap(context: &Context) -> Result<Verdict> {
    let script = "grep MemTotal /proc/meminfo; grep 'System RAM' /proc/iomem; \
                  mount -t tmpfs -o size=100% t /tmp; head -c 67108864 /dev/zero | sha256sum; \
                  head -c 67108864 /dev/zero > /tmp/f; sha256sum < /tmp/f; reboot -f";
    let mut config = config(context, script)?;
    config.memory_mib = 3584;
    let ran = boot(context, config)?;
    ensure!(ran.reason == ExitReason::Reset, "{:?}\n{}", ran.reason, ran.console);
    let total: u64 = ran
        .console
        .lines()
        .find_map(|line| line.trim().strip_prefix("MemTotal:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .context("no MemTotal on the console")?;
    ensure!(total > 3_400_000, "the guest has {total} KiB");
    ensure!(ran.console.contains("100000000-11fffffff"), "no memory above 4 GiB:\n{}", ran.console);
    let sums = ran.console.matches("3b6a07d0d404fab4e23b6d34bc6696a6a312dd92821332385e5af7c01c421351").count();
    ensure!(sums == 2, "checksums differ:\n{}", ran.console);
    Ok(Verdict::Passed)
}

fn kernel_options(context: &Context) -> Result<Verdict> {
    let script = "mkdir -p /cg; mount -t cgroup2 c /cg; echo controllers $(cat /cg/cgroup.controllers); \
                  echo filesystems $(cut -f2 /proc/filesystems); ls /proc/self/ns | tr '\\n' ' '; \
                  ls /sys/bus/virtio/drivers | tr '\\n' ' '; reboot -f";
    let ran = boot(context, config(context, script)?)?;
    let words = [
        "cpuset",
        "cpu",
        "io",
        "memory",
        "hugetlb",
        "pids",
        "overlay",
        "ext4",
        "erofs",
        "fuse",
        "virtiofs",
        "tmpfs",
        "cgroup",
        "ipc",
        "mnt",
        "net",
        "pid",
        "time",
        "user",
        "uts",
        "virtio_blk",
        "virtio_net",
        "virtio_rng",
        "virtio_balloon",
        "virtio_mem",
        "vmw_vsock_virtio_transport",
    ];
    let missing: Vec<_> = words.iter().filter(|word| !ran.console.contains(**word)).collect();
    ensure!(missing.is_empty(), "missing: {missing:?}; console:\n{}", ran.console);
    Ok(Verdict::Passed)
}

fn virtualization_hidden(context: &Context) -> Result<Verdict> {
    let script =
        "grep -m1 -o hypervisor /proc/cpuinfo; grep -m1 -wE -o 'svm|vmx' /proc/cpuinfo || echo neither; reboot -f";
    expect(context, config(context, script)?, &ExitReason::Reset, &["hypervisor", "neither"])
}

fn random(context: &Context) -> Result<Verdict> {
    let script = "cat /sys/class/misc/hw_random/rng_current; head -c 4096 /dev/hwrng | wc -c; reboot -f";
    expect(context, config(context, script)?, &ExitReason::Reset, &["virtio_rng", "4096"])
}

fn panic(context: &Context) -> Result<Verdict> {
    let config = config(context, "exit 3")?;
    expect(
        context,
        config,
        &ExitReason::Panic,
        &["Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000300"],
    )
}

fn reboot(context: &Context) -> Result<Verdict> {
    expect(context, config(context, "echo on purpose; reboot -f")?, &ExitReason::Reset, &["on purpose"])
}

fn power_off(context: &Context) -> Result<Verdict> {
    expect(context, config(context, "poweroff -f")?, &ExitReason::Halted, &["reboot: "])
}

fn halt(context: &Context) -> Result<Verdict> {
    expect(context, config(context, "halt -f")?, &ExitReason::Halted, &["reboot: System halted"])
}

/// A guest that counts aloud says nothing while it is paused, and goes on after.
fn pause(context: &Context) -> Result<Verdict> {
    let script = "i=0; while [ $i -lt 3000 ]; do i=$((i+1)); echo count $i; done; echo all counted; reboot -f";
    let vm = build(config(context, script)?)?;
    vm.start()?;
    wait_for(&vm, "count 5")?;
    for _ in 0..5 {
        vm.pause()?;
        let (before, exits) = (vm.console().tail(), vm.exits());
        std::thread::sleep(Duration::from_millis(200));
        ensure!(vm.console().tail() == before, "the guest wrote while it was paused");
        ensure!(vm.exits() == exits, "KVM ran the guest while it was paused");
        vm.resume()?;
        std::thread::sleep(Duration::from_millis(20));
    }
    let ran = finish(context, &vm)?;
    ensure!(ran.reason == ExitReason::Reset && ran.console.contains("all counted"), "{:?}", ran.reason);
    Ok(Verdict::Passed)
}

fn wait_for(vm: &Microvm, words: &str) -> Result<()> {
    let start = std::time::Instant::now();
    while !vm.console().tail().contains(words) {
        ensure!(start.elapsed() < LIMIT, "{words:?} never came; console:\n{}", vm.console().tail());
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn two_guests(context: &Context) -> Result<Verdict> {
    let first = build(config(context, "echo first; reboot -f")?)?;
    let second = build(config(context, "echo second; poweroff -f")?)?;
    first.start()?;
    second.start()?;
    let (first, second) = (finish(context, &first)?, finish(context, &second)?);
    ensure!(
        first.reason == ExitReason::Reset && second.reason == ExitReason::Halted,
        "{:?} {:?}",
        first.reason,
        second.reason
    );
    // The second initramfs replaced the first one's file only after that was loaded.
    ensure!(
        first.console.contains("first") && second.console.contains("second"),
        "{}{}",
        first.console,
        second.console
    );
    Ok(Verdict::Passed)
}

fn stop(context: &Context) -> Result<Verdict> {
    let vm = build(config(context, "echo spinning; while :; do :; done")?)?;
    vm.start()?;
    wait_for(&vm, "spinning")?;
    vm.stop();
    let ran = finish(context, &vm)?;
    ensure!(ran.reason == ExitReason::Stopped, "{:?}", ran.reason);
    Ok(Verdict::Passed)
}

fn refused(config: MicrovmConfig, words: &str) -> Result<Verdict> {
    match Microvm::builder(config).build() {
        Ok(_) => bail!("it was built"),
        Err(error) => {
            let text = error.to_string();
            ensure!(text.contains(words), "{text:?} does not say {words:?}");
            Ok(Verdict::Passed)
        }
    }
}

fn no_kernel(_: &Context) -> Result<Verdict> {
    refused(MicrovmConfig { kernel: "/bin/busybox.nothing".into(), ..Default::default() }, "cannot read the kernel")?;
    refused(MicrovmConfig { kernel: "/etc/passwd".into(), ..Default::default() }, "is no kernel")
}

fn too_little_memory(context: &Context) -> Result<Verdict> {
    let mut config = config(context, "reboot -f")?;
    config.memory_mib = 8;
    refused(config, "too small")
}
