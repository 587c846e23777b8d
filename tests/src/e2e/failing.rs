//! Guests that fail are reported as what they are, with their consoles' last lines; those that only work hard are not.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::boot::initramfs;
use super::process::{Finished, Started};
use super::run::bundle;
use super::{Context, Table, Verdict};

/// The table.
pub const CASES: Table = (
    "failing",
    &[
        ("a_panic_is_told_with_its_cause", panic),
        ("a_reboot_is_told", reboot),
        ("a_power_off_is_told", power_off),
        ("a_foreign_init_that_ends_is_told", foreign_init),
        ("a_container_that_reboots_itself_ends_alone", reboot_of_its_own),
        ("a_container_over_its_limit_is_137_and_told", over_the_limit),
        ("a_guest_that_runs_dry_is_told", dry),
        ("a_silent_agent_is_told_and_a_busy_container_left_alone", silent_and_busy),
    ],
);

/// For `katavm-e2e --long`.
pub const LONG: Table = ("failing", &[("an_init_that_never_gets_ready_is_told", never_ready)]);

/// How long a guest may take to boot and fail.
const LIMIT: Duration = Duration::from_secs(240);
/// How long a silent agent is waited for: twice the patience of the runtime's heartbeat.
const LOST: Duration = Duration::from_secs(2 * 30);
/// The consoles' words are introduced by these.
const LAST_LINES: &str = "the last lines of its console:\n  | ";

/// A bundle whose container is privileged: every capability, every device, the guest's own process namespace.
fn privileged(context: &Context, script: &str) -> Result<PathBuf> {
    let path = bundle(context, &["sh", "-c", script], |config| {
        let all = json!(["CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_MKNOD", "CAP_KILL", "CAP_DAC_OVERRIDE"]);
        let sets = json!({"bounding": all, "effective": all, "permitted": all});
        config["process"]["capabilities"] = sets;
        config["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "uts"}, {"type": "network"}]);
        config["linux"]["resources"] = json!({"devices": [{"allow": true, "access": "rwm"}]});
    })?;
    applets(&path)?;
    Ok(path)
}

/// More of busybox than other cases need.
fn applets(bundle: &Path) -> Result<()> {
    for applet in ["reboot", "poweroff", "mknod", "mount", "sleep", "tail", "dd", "kill"] {
        let link = bundle.join("rootfs/bin").join(applet);
        if !link.is_symlink() {
            symlink("busybox", link)?;
        }
    }
    Ok(())
}

fn run(context: &Context, bundle: &Path, options: &[&str]) -> Result<Finished> {
    let mut arguments = vec![OsStr::new("run")];
    arguments.extend(options.iter().map(OsStr::new));
    arguments.push(bundle.as_os_str());
    let run = Started::katavm(&arguments)?.finish(LIMIT)?;
    context.note("stdout", run.stdout.clone());
    context.note("stderr", run.stderr.clone());
    Ok(run)
}

/// Asks for a failure of katavm's own, in one message, with a reason and words of the guest's console.
fn failed(run: &Finished, reason: &str, console: &str) -> Result<Verdict> {
    run.expect(1, &[&format!("katavm: {reason}"), LAST_LINES, console])?;
    let messages = run.stderr.lines().filter(|line| line.starts_with("katavm:")).count();
    ensure!(messages == 1, "{messages} messages:\n{}", run.stderr);
    Ok(Verdict::Passed)
}

/// What the agent has read from the container's pipe arrives; what it has not is gone with the kernel, so it gets a second.
fn panic(context: &Context) -> Result<Verdict> {
    let bundle = privileged(context, "echo before; sleep 1; echo c > /proc/sysrq-trigger; sleep 1000")?;
    let run = run(context, &bundle, &[])?;
    ensure!(run.stdout == "before\n", "stdout {:?}", run.stdout);
    failed(&run, "the guest kernel panicked", "Kernel panic - not syncing: sysrq triggered crash")
}

/// By reboot(2) in the guest's first process namespace.
fn reboot(context: &Context) -> Result<Verdict> {
    let script = "mknod /dev/kmsg c 1 11; echo '<3>here it ends' > /dev/kmsg; reboot -f; sleep 1000";
    let run = run(context, &privileged(context, script)?, &[])?;
    failed(&run, "the guest rebooted", "here it ends")
}

fn power_off(context: &Context) -> Result<Verdict> {
    let run = run(context, &privileged(context, "poweroff -f; sleep 1000")?, &[])?;
    failed(&run, "the guest halted or powered off", "reboot: ")
}

/// No agent at all.
fn foreign_init(context: &Context) -> Result<Verdict> {
    let bundle = bundle(context, &["true"], |_| ())?;
    for (script, reason, console) in [
        ("echo strange init > /dev/console; reboot -f", "the guest rebooted", "strange init"),
        ("poweroff -f", "the guest halted or powered off", "reboot: "),
    ] {
        let initrd = initramfs(context, script)?;
        let run = run(context, &bundle, &["--initrd", &initrd.to_string_lossy()])?;
        failed(&run, reason, console)?;
    }
    Ok(Verdict::Passed)
}

/// In a process namespace of its own, reboot(2) ends only that (pid_namespaces(7)): as with other runtimes.
fn reboot_of_its_own(context: &Context) -> Result<Verdict> {
    let bundle = bundle(context, &["sh", "-c", "reboot -f & wait; sleep 1000"], |config| {
        let boot = json!(["CAP_SYS_BOOT"]);
        config["process"]["capabilities"] = json!({"bounding": boot, "effective": boot, "permitted": boot});
    })?;
    applets(&bundle)?;
    run(context, &bundle, &[])?.expect(128 + Signal::HUP.as_raw(), &[])?;
    Ok(Verdict::Passed)
}

const TOLD: &str = "out of memory: the guest's kernel killed a process of the container";

fn over_the_limit(context: &Context) -> Result<Verdict> {
    let bundle = bundle(context, &["tail", "/dev/zero"], |config| {
        config["linux"]["resources"] = json!({"memory": {"limit": 32 << 20}});
    })?;
    applets(&bundle)?;
    run(context, &bundle, &[])?.expect(137, &[TOLD, "limit is 32 MiB"])?;
    Ok(Verdict::Passed)
}

/// Without a limit the guest itself runs out: by processes, and by files in memory. The agent lives on to tell.
fn dry(context: &Context) -> Result<Verdict> {
    let path = bundle(context, &["sh", "-c", "tail /dev/zero; code=$?; echo eaten; exit $code"], |config| {
        let all = json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["size=100%"]});
        config["mounts"].as_array_mut().into_iter().for_each(|mounts| mounts.push(all.clone()));
    })?;
    applets(&path)?;
    let told = [TOLD, "the whole guest has 128 MiB"];
    let output = run(context, &path, &["--memory", "128"])?;
    output.expect(137, &told)?;
    // The shell outlived it.
    ensure!(output.stdout == "eaten\n", "stdout {:?}", output.stdout);
    // Memory in files is free again only with the container.
    let config = fs::read_to_string(path.join("config.json"))?;
    let mut config: Value = serde_json::from_str(&config)?;
    config["process"]["args"] = json!(["dd", "if=/dev/zero", "of=/tmp/f", "bs=64k"]);
    fs::write(path.join("config.json"), config.to_string())?;
    run(context, &path, &["--memory", "128"])?.expect(137, &told)?;
    Ok(Verdict::Passed)
}

/// A privileged container freezes PID 1 in a control group. Meanwhile another one takes all CPUs, many times over, for
/// longer than an agent may be silent.
fn silent_and_busy(context: &Context) -> Result<Verdict> {
    let freeze = "mknod /dev/kmsg c 1 11; mkdir /cg; mount -t cgroup2 none /cg; mkdir /cg/cold; \
                  echo 1 > /cg/cold/cgroup.procs; echo '<3>it gets cold' > /dev/kmsg; \
                  echo 1 > /cg/cold/cgroup.freeze; sleep 1000";
    let silent = privileged(context, freeze)?;
    let busy = context.scratch().join("busy");
    fs::create_dir(&busy)?;
    let config = fs::read_to_string(silent.join("config.json"))?;
    let mut config: Value = serde_json::from_str(&config)?;
    let spin =
        "trap 'exit 42' TERM; for i in 1 2 3 4 5 6; do while :; do :; done & done; echo spinning; while :; do :; done";
    config["process"]["args"] = json!(["sh", "-c", spin]);
    config["root"]["path"] = json!(silent.join("rootfs"));
    fs::write(busy.join("config.json"), config.to_string())?;

    let busy = Started::katavm(&["run".as_ref(), "--cpus=2".as_ref(), busy.as_os_str()])?;
    busy.read_until("spinning", LIMIT)?;
    let spinning = Instant::now();
    let run = Started::katavm(&["run".as_ref(), silent.as_os_str()])?.finish(LIMIT)?;
    context.note("silent.stderr", run.stderr.clone());
    failed(&run, "the guest stopped answering", "it gets cold")?;
    ensure!(spinning.elapsed() > LOST, "it was given up after {:?} already", spinning.elapsed());

    busy.signal(Signal::TERM);
    let run = busy.finish(LIMIT)?;
    context.note("busy.stderr", run.stderr.clone());
    run.expect(42, &[])?;
    Ok(Verdict::Passed)
}

/// An init that says nothing and does not end.
fn never_ready(context: &Context) -> Result<Verdict> {
    let bundle = bundle(context, &["true"], |_| ())?;
    let initrd = initramfs(context, "echo waiting for nothing > /dev/console; sleep 100000")?;
    let run = run(context, &bundle, &["--initrd", &initrd.to_string_lossy()])?;
    failed(&run, "the guest did not get ready within 120 s", "waiting for nothing")
}
