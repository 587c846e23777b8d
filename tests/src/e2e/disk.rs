//! Disks: what a guest writes is what the host has, by both engines; limits, faults, and disks that come and go while
//! it runs.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use katavm_devices::block::{Block, BlockConfig, BlockOptions, EngineKind};
use katavm_devices::rate::{Limits, Rate};
use katavm_protocol::agent::{AttachDiskRequest, DetachDiskRequest};
use katavm_vmm::MicrovmBuilder;
use serde_json::json;

use super::guest::{Guest, Running};
use super::rebuild;
use super::run::{bundle, katavm};
use super::{Context, Table, Verdict};

/// The table.
pub const CASES: Table = (
    "disk",
    &[
        ("what_is_written_is_there_by_both_engines", written),
        ("a_host_that_fails_gives_the_guest_errors", faults),
        ("a_disk_may_grow", grown),
        ("a_disk_leaves_under_a_guest_that_uses_it", surprise),
        ("busy_disks_stand_still_and_go_on", paused),
        ("a_container_mounts_file_systems_in_images", volumes),
    ],
);

const MIB: u64 = 1 << 20;
/// The devices that every guest has before its disks: sockets, files, randomness, the balloon.
const FIRST_PLACE: usize = 4;

/// A sparse file that a disk is on.
pub(super) fn image(context: &Context, name: &str, mib: u64) -> Result<PathBuf> {
    let path = context.scratch().join(name);
    File::create(&path)?.set_len(mib * MIB)?;
    Ok(path)
}

pub(super) fn disk(path: &Path, options: BlockOptions) -> Result<BlockConfig> {
    let serial = path.file_stem().unwrap_or_default().to_string_lossy();
    Ok(BlockConfig::open(path, false, &serial)?.with(options))
}

pub(super) fn by(engine: EngineKind) -> BlockOptions {
    BlockOptions { engine, ..BlockOptions::default() }
}

/// A guest with these disks and `places` empty ones.
fn guest(context: &Context, disks: Vec<BlockConfig>, places: usize) -> Result<Guest> {
    let add = |mut builder: MicrovmBuilder| {
        for disk in disks {
            builder = builder.block(Block::new(disk)?);
        }
        for _ in 0..places {
            builder = builder.block(Block::slot(1)?);
        }
        Ok(builder)
    };
    let guest = Guest::boot_on(context, add, |config| config.memory_mib = 512)?;
    guest.sandbox()?;
    Ok(guest)
}

/// Starts a script beside the programs of the lab and the block devices of the guest.
pub(super) fn start(guest: &Guest, id: &str, script: &str) -> Result<Running> {
    let script = format!("exec 2>&1; set -eu; mount -t devtmpfs dev /dev; mount -t sysfs sys /sys; cd /tmp; {script}");
    guest.start_privileged(id, Path::new("/"), &["/bin/sh", "-c", &script])
}

/// Runs one to its end, which must be a good one; its output.
pub(super) fn run(guest: &Guest, id: &str, script: &str) -> Result<String> {
    let (output, exit) = start(guest, id, script)?.wait(guest)?;
    let output = String::from_utf8_lossy(&output).into_owned();
    ensure!(exit.status == 0, "{script}: status {}, {output}\nconsole:\n{}", exit.status, guest.vm.console().tail());
    Ok(output)
}

/// What is done to a disk: pattern, length, depth, size.
const PATTERNS: [(&str, &str, u32, &str); 5] = [
    ("randrw", "4k", 32, "4M"),
    ("rw", "1M", 1, "16M"),
    ("randrw", "4k", 1, "1M"),
    ("randwrite", "1M", 32, "16M"),
    ("write", "4k", 32, "4M"),
];

/// A run of `fio` on `device` for each of these, all that is read checked.
fn fio(device: &str, patterns: &[(&str, &str, u32, &str)]) -> String {
    let mut script = String::new();
    for (pattern, len, depth, size) in patterns {
        script += &format!(
            "fio --name={pattern}-{len}-{depth} --filename={device} --ioengine=libaio --direct=1 --rw={pattern} --bs={len} \
             --iodepth={depth} --size={size} --verify=crc32c --verify_fatal=1 --verify_state_save=0 --randrepeat=1 \
             --output-format=terse > fio.out || {{ cat fio.out; exit 1; }}; "
        );
    }
    script
}

fn written(context: &Context) -> Result<Verdict> {
    let (ring, plain) = (image(context, "ring", 64)?, image(context, "plain", 64)?);
    let queues = BlockOptions { queues: 2, ..by(EngineKind::IoUring) };
    let disks = vec![disk(&ring, queues)?, disk(&plain, by(EngineKind::Blocking))?];
    let guest = guest(context, disks, 0)?;
    let facts = "for d in vda vdb; do echo $d $(cat /sys/block/$d/serial) $(ls /sys/block/$d/mq | wc -l) \
                 $(cat /sys/block/$d/queue/write_cache); done";
    // A guest with one CPU uses one of the queues.
    ensure!(
        run(&guest, "facts", facts)? == "vda ring 1 write back\nvdb plain 1 write back\n",
        "the disks look different"
    );
    // One request after the other is what the plain engine does, whatever the pattern.
    for (device, file, patterns) in [("/dev/vda", &ring, &PATTERNS[..]), ("/dev/vdb", &plain, &PATTERNS[..2])] {
        let begun = Instant::now();
        run(&guest, &format!("fio-{}", &device[5..]), &fio(device, patterns))?;
        context.note("took", format!("{device}: {:?}\n", begun.elapsed()));
        // The guest's own sum, past its cache, against the bytes of the file.
        let script = format!(
            "head -c 16M /dev/urandom > r; dd if=r of={device} bs=1M oflag=direct,sync status=none; sha256sum < r"
        );
        let sum = run(&guest, &format!("sum-{}", &device[5..]), &script)?;
        let mut bytes = vec![0; 16 << 20];
        File::open(file)?.read_exact_at(&mut bytes, 0)?;
        let copy = context.scratch().join("copy");
        fs::write(&copy, bytes)?;
        let host = Command::new("sha256sum").stdin(File::open(&copy)?).output()?.stdout;
        ensure!(
            sum.as_bytes() == host,
            "{device}: the guest wrote {sum}, the file has {}",
            String::from_utf8_lossy(&host)
        );
    }
    guest.end()?;
    Ok(Verdict::Passed)
}

fn faults(context: &Context) -> Result<Verdict> {
    let cut = image(context, "cut", 16)?;
    let other = image(context, "other", 16)?;
    // A descriptor that cannot be written stands for a device that fails: the device is told that it may write.
    let failing = BlockConfig::new(File::open(image(context, "failing", 16)?)?, false, "failing");
    let disks = vec![
        disk(&cut, by(EngineKind::IoUring))?,
        failing.with(by(EngineKind::Blocking)),
        disk(&other, by(EngineKind::Automatic))?,
    ];
    let guest = guest(context, disks, 0)?;
    File::options().write(true).open(&cut)?.set_len(4 * MIB)?;
    let script = "dd if=/dev/vda of=/dev/null bs=1M iflag=direct && exit 1; \
                  dd if=/dev/vda of=/dev/null bs=1M count=4 iflag=direct && \
                  dd if=/dev/zero of=/dev/vdb bs=4k count=1 oflag=direct && exit 1; \
                  dd if=/dev/vdb of=/dev/null bs=4k count=1 iflag=direct; dd if=/dev/vdc of=/dev/null bs=1M iflag=direct";
    let output = run(&guest, "faults", script)?;
    let errors = ["error reading '/dev/vda': Input/output error", "error writing '/dev/vdb': Input/output error"];
    ensure!(errors.iter().all(|error| output.contains(error)), "{output}");

    // Limits: a tenth of a second's worth at once, and then as fast as was said.
    let place = FIRST_PLACE + 2;
    let bandwidth = Some(Rate::steady(2 * MIB));
    guest.vm.limit_disk(place, Limits { bandwidth, operations: None })?;
    let took = timed(&guest, "bandwidth", "dd if=/dev/vdc of=/dev/null bs=256k count=24 iflag=direct status=none")?;
    ensure!((2.5..20.0).contains(&took), "6 MiB at 2 MiB/s took {took} s");
    let operations = Some(Rate::steady(100));
    guest.vm.limit_disk(place, Limits { bandwidth: None, operations })?;
    let took = timed(&guest, "operations", "dd if=/dev/vdc of=/dev/null bs=4k count=300 iflag=direct status=none")?;
    ensure!((2.5..20.0).contains(&took), "300 operations at 100/s took {took} s");
    guest.end()?;
    Ok(Verdict::Passed)
}

/// How long a command takes by the guest's clock, in seconds.
fn timed(guest: &Guest, id: &str, command: &str) -> Result<f64> {
    let script = format!("a=$(date +%s.%N); {command}; b=$(date +%s.%N); echo \"$b - $a\" | awk '{{print $1 - $3}}'");
    let output = run(guest, id, &script)?;
    output.trim().parse().with_context(|| output.clone())
}

/// Puts a disk into an empty place and has the guest look; the place, and the device's name in the guest.
pub(super) fn attach(guest: &Guest, disk: BlockConfig) -> Result<(u32, String)> {
    let place = guest.vm.attach_disk(disk)? as u32;
    let request = AttachDiskRequest { place, ..Default::default() };
    Ok((place, guest.ask(guest.agent.attach_disk(Guest::soon(), &request))?.device))
}

pub(super) fn detach(guest: &Guest, place: u32) -> Result<()> {
    let request = DetachDiskRequest { place, ..Default::default() };
    guest.ask(guest.agent.detach_disk(Guest::soon(), &request))?;
    Ok(guest.vm.detach_disk(place as usize)?)
}

/// One place, and a disk in it that grows while the guest has it.
fn grown(context: &Context) -> Result<Verdict> {
    let path = image(context, "small", 1)?;
    let guest = guest(context, Vec::new(), 1)?;
    let empty = AttachDiskRequest { place: FIRST_PLACE as u32, ..Default::default() };
    let refused = guest.runtime.block_on(guest.agent.attach_disk(Guest::soon(), &empty));
    ensure!(refused.as_ref().is_err_and(|error| error.to_string().contains("is empty")), "{refused:?}");
    let (place, device) = attach(&guest, disk(&path, by(EngineKind::Automatic))?)?;
    let other = image(context, "other", 1)?;
    let more = guest.vm.attach_disk(disk(&other, by(EngineKind::Automatic))?);
    ensure!(more.as_ref().is_err_and(|error| error.to_string().contains("no place left")), "{more:?}");
    File::options().write(true).open(&path)?.set_len(7 * MIB)?;
    guest.vm.resize_disk(place as usize)?;
    run(&guest, "grown", &format!("while [ $(blockdev --getsize64 {device}) != {} ]; do sleep 0.1; done", 7 * MIB))?;
    detach(&guest, place)?;
    guest.end()?;
    Ok(Verdict::Passed)
}

/// Writes and reads all the time, what is read checked, until [`finish`].
pub(super) fn work(device: &str) -> String {
    format!(
        "fio --name=w --filename={device} --ioengine=libaio --direct=1 --rw=randrw --bs=4k --iodepth=8 --size=8M \
         --verify=crc32c --verify_fatal=1 --verify_state_save=0 --loops=1000000 >fio.out & w=$!
         until [ $(awk '{{ print $1 + $5 }}' /sys/class/block/$(basename {device})/stat) -gt 100 ]; do sleep 0.1; done; echo works
         while [ ! -e /dev/stop ] && kill -0 $w 2>/dev/null; do sleep 0.2; done
         kill -INT $w || {{ cat fio.out; exit 1; }}; wait $w || true; cat fio.out; ! grep -qi 'verify:' fio.out"
    )
}

/// Ends all work, in which nothing may have been wrong.
pub(super) fn finish(guest: &Guest, works: impl IntoIterator<Item = Running>) -> Result<()> {
    run(guest, "stop", "touch /dev/stop")?;
    for work in works {
        let (output, exit) = work.wait(guest)?;
        ensure!(exit.status == 0, "the work: {}, {}", exit.status, String::from_utf8_lossy(&output));
    }
    Ok(())
}

/// Pauses, snapshots and another machine from the bytes, with requests under way by both engines.
fn paused(context: &Context) -> Result<Verdict> {
    const PAUSES: usize = 5;
    let (ring, plain) = (image(context, "ring", 8)?, image(context, "plain", 8)?);
    let disks = || Ok(vec![disk(&ring, by(EngineKind::IoUring))?, disk(&plain, by(EngineKind::Blocking))?]);
    let mut guest = Guest::boot_on(
        context,
        |builder| disks()?.into_iter().try_fold(builder, |builder, disk| Ok(builder.block(Block::new(disk)?))),
        |_| (),
    )?;
    guest.sandbox()?;
    let mut works = Vec::new();
    for device in ["/dev/vda", "/dev/vdb"] {
        let mut running = start(&guest, &format!("work-{}", &device[5..]), &work(device))?;
        running.read_until(b"works")?;
        works.push(running);
    }
    for round in 0..PAUSES {
        std::thread::sleep(Duration::from_millis(100 + 37 * round as u64));
        let begun = Instant::now();
        guest.vm.pause()?;
        guest.vm.save()?;
        guest.vm.resume()?;
        ensure!(begun.elapsed() < Duration::from_secs(20), "pause {round} took {:?}", begun.elapsed());
    }
    let exports = ["work-vda", "work-vdb"].map(|id| (id, Path::new("/")));
    guest = rebuild::here(context, guest, &exports, disks)?;
    finish(&guest, works)?;
    // A machine that is dropped waits for what is under way.
    let mut running = start(&guest, "last", &format!("rm /dev/stop; {}", work("/dev/vda")))?;
    running.read_until(b"works")?;
    drop(guest);
    Ok(Verdict::Passed)
}

fn surprise(context: &Context) -> Result<Verdict> {
    let path = image(context, "gone", 16)?;
    let guest = guest(context, Vec::new(), 1)?;
    for round in 0..2 {
        let (place, device) = attach(&guest, disk(&path, by(EngineKind::Automatic))?)?;
        let script = format!(
            "echo reads; while dd if={device} of=/dev/null bs=64k iflag=direct 2> error; do :; done; cat error"
        );
        let mut reads = start(&guest, &format!("reads-{round}"), &script)?;
        reads.read_until(b"reads\n")?;
        std::thread::sleep(Duration::from_millis(300));
        // Not a word to the guest.
        guest.vm.detach_disk(place as usize)?;
        let (output, exit) = reads.wait(&guest)?;
        let output = String::from_utf8_lossy(&output);
        ensure!(exit.status == 0 && output.contains("Input/output error"), "{}: {output}", exit.status);
        // The guest lives, its driver lets go, and the place can be used again.
        detach(&guest, place)?;
    }
    guest.end()?;
    Ok(Verdict::Passed)
}

/// `katavm run` with file systems in images, which the guest mounts by itself.
fn volumes(context: &Context) -> Result<Verdict> {
    let (content, ext4, erofs) =
        ["content", "volume.ext4", "layer.erofs"].map(|name| context.scratch().join(name)).into();
    fs::create_dir(&content)?;
    fs::write(content.join("hello"), "from the host\n")?;
    image(context, "volume.ext4", 8)?;
    for (program, args) in [
        ("mkfs.ext4", [OsStr::new("-qd"), content.as_ref(), ext4.as_ref()].as_slice()),
        ("mkfs.erofs", &["--quiet".as_ref(), erofs.as_ref(), content.as_ref()]),
    ] {
        let made = Command::new(program).args(args).output()?;
        ensure!(made.status.success(), "{program}: {}", String::from_utf8_lossy(&made.stderr));
    }
    let script = "cat /volume/hello /layer/hello; echo from the guest > /volume/answer; \
                  grep -c '^/dev/vd.* \\(ext4 rw\\|erofs ro\\)' /proc/mounts; echo x > /layer/x 2>/dev/null || echo read-only";
    let mount = |to: &str, kind: &str, source: &Path| json!({"destination": to, "type": kind, "source": source, "options": ["loop"]});
    let bundle = bundle(context, &["sh", "-c", script], |config| {
        if let Some(mounts) = config["mounts"].as_array_mut() {
            mounts.extend([mount("/volume", "ext4", &ext4), mount("/layer", "erofs", &erofs)]);
        }
    })?;
    let output = katavm::run(context, &bundle, b"")?;
    katavm::expect(&output, 0, "from the host\nfrom the host\n2\nread-only\n", "")?;
    let answer = Command::new("debugfs").arg("-R").arg("cat answer").arg(&ext4).output()?;
    ensure!(answer.stdout == b"from the guest\n", "{answer:?}");
    let check = Command::new("e2fsck").arg("-fn").arg(&ext4).output()?;
    ensure!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
    Ok(Verdict::Passed)
}
