//! Sandboxes that grow with what their containers may use, and shrink again.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use katavm_devices::mem::Mem;
use katavm_protocol::agent::ResizeRequest;
use katavm_vmm::MicrovmBuilder;
use serde_json::json;

use super::agent::whole_rootfs;
use super::guest::{Guest, Running};
use super::leftovers::Traces;
use super::run::bundle;
use super::shell::{expect, script};
use super::{Context, Table, Verdict, rebuild};

/// The table.
pub const CASES: Table = (
    "grow",
    &[
        ("memory_and_cpus_follow_updates", updates),
        ("a_sandbox_whose_size_was_said_stays_as_it_is", said),
        ("memory_grows_eightfold_and_shrinks_under_load", under_load),
        ("a_guest_that_has_grown_is_rebuilt_as_it_was", rebuilt),
    ],
);

/// How long a guest may take for the next piece.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the scripts have in common.
const WORDS: &str = "
    total() { katavm exec c1 awk '/^MemTotal/ { print int($2 / 1024) }' /proc/meminfo </dev/null; }
    cpus() { katavm exec c1 grep -c ^processor /proc/cpuinfo </dev/null; }
    until_() { for i in $(seq 100); do if eval \"$1\"; then return; fi; sleep 0.3; done; echo \"not $1: $(total) MiB\" >&2; exit 1; }
    host_limit() { echo $(($(cat /sys/fs/cgroup/grown/c1/memory.max) >> 20)); }
";

fn with_limit(context: &Context, mib: u64) -> Result<()> {
    whole_rootfs(context)?;
    bundle(context, &["sleep", "100000"], |config| {
        config["linux"]["resources"] = json!({ "memory": { "limit": mib << 20 } });
        config["linux"]["cgroupsPath"] = json!("/grown/c1");
        let tmpfs = json!({ "destination": "/mnt", "type": "tmpfs", "source": "tmpfs", "options": ["size=2g"] });
        config["mounts"].as_array_mut().expect("the bundle has mounts").push(tmpfs);
    })?;
    Ok(())
}

fn updates(context: &Context) -> Result<Verdict> {
    with_limit(context, 160)?;
    let traces = Traces::of(context.scratch());
    let output = script(
        context,
        &format!(
            "{WORDS}
             trap 'rmdir /sys/fs/cgroup/grown' EXIT
             katavm run -d --log log c1 </dev/null >out 2>&1
             before=$(total); echo cpus $(cpus) host $(host_limit)
             katavm update --memory 512M --cpu-quota 200000 c1
             [ $(($(total) - before)) -ge 340 ] && echo grown; echo cpus $(cpus) host $(host_limit)
             fill() {{ katavm exec c1 sh -c 'dd if=/dev/zero of=/mnt/a bs=1M count=250 2>/dev/null && wc -c </mnt/a; e=$?; rm -f /mnt/a; exit $e' </dev/null; }}
             fill
             katavm update --memory 160M --cpu-quota 100000 c1
             until_ '[ $(total) -le $((before + 128)) ]'; until_ '[ $(cpus) = 1 ]'; echo shrunk
             fill || echo killed
             # Once more, as what was given back is zeroes now.
             katavm update --memory 512M c1; fill
             cat log >&2
             katavm delete --force c1"
        ),
    )?;
    let lines = ["cpus 1 host 371", "grown", "cpus 2 host 729", "262144000", "shrunk", "killed", "262144000"];
    expect(&output, &lines)?;
    traces.expect_nothing_new()?;
    Ok(Verdict::Passed)
}

fn said(context: &Context) -> Result<Verdict> {
    with_limit(context, 160)?;
    let traces = Traces::of(context.scratch());
    let output = script(
        context,
        &format!(
            "{WORDS}
             trap 'rmdir /sys/fs/cgroup/grown' EXIT
             katavm run -d --memory 256M --cpus 1 --log log c1 </dev/null >out 2>&1
             before=$(total)
             katavm update --memory 1G --cpu-quota 200000 c1
             [ $(total) = $before ] && cpus; grep -c 'may use more than' log
             katavm delete --force c1"
        ),
    )?;
    expect(&output, &["1", "1"])?;
    traces.expect_nothing_new()?;
    Ok(Verdict::Passed)
}

/// A container that does a step whenever it is told to.
struct Holder {
    running: Running,
    stdin: UnixStream,
}

impl Holder {
    fn start(guest: &Guest, rootfs: &Path, steps: &[&str]) -> Result<Self> {
        let steps = format!(
            "exec 2>&1; mkdir -p /mnt; mount -t tmpfs -o size=100% tmpfs /mnt; cd /mnt; {}",
            steps.join("; read go; ")
        );
        let args = ["sh", "-uec", &steps];
        let (running, stdin) = guest.start_privileged_with_input("holder", rootfs, &args)?;
        Ok(Self { running, stdin })
    }

    /// Waits for the end of a step, which is told by `word`.
    fn until(&mut self, word: &str) -> Result<()> {
        self.running.read_until(word.as_bytes())
    }

    /// Has it go on.
    fn go(&mut self) -> Result<()> {
        Ok(self.stdin.write_all(b"go\n")?)
    }

    /// What it said in all; it has ended well.
    fn end(self, guest: &Guest) -> Result<String> {
        let (output, exit) = self.running.wait(guest)?;
        let output = String::from_utf8(output)?;
        ensure!(exit.status == 0, "{exit:?}: {output}");
        Ok(output)
    }
}

fn under_load(context: &Context) -> Result<Verdict> {
    let rootfs = whole_rootfs(context)?;
    let mem = |builder: MicrovmBuilder| Ok(builder.mem(Mem::new(2048 - 256)?));
    let guest = Guest::boot_on(context, mem, |config| config.memory_mib = 256)?;
    guest.sandbox()?;
    grow(&guest, 1, 2048)?;
    let steps = [
        "awk '/^MemTotal/ { print int($2 / 1024) }' /proc/meminfo
         head -c 50m /dev/urandom >a; cp a b; echo ready",
        "for i in 1 2 3; do cmp a b; done; echo same",
        "rm a b; echo removed",
    ];
    let mut holder = Holder::start(&guest, &rootfs, &steps)?;
    holder.until("ready")?;
    // It looks at its 100 MiB while they are moved out of the way.
    holder.go()?;
    let in_use = guest.vm.resize_memory(512, PATIENCE)?;
    holder.until("same")?;
    holder.go()?;
    holder.until("removed")?;
    let at_rest = guest.vm.resize_memory(256, PATIENCE)?;
    println!("  {in_use} MiB are left with 100 in use, {at_rest} at rest");
    ensure!((512..768).contains(&in_use), "{in_use} MiB are left with 100 in use");
    ensure!(at_rest <= 512, "{at_rest} MiB are left");
    grow(&guest, 1, 2048)?;
    let output = holder.end(&guest)?;
    let total: u32 = output.lines().next().context("it said nothing")?.parse()?;
    ensure!(total > 1900, "the kernel had {total} MiB");
    guest.end()?;
    Ok(Verdict::Passed)
}

fn rebuilt(context: &Context) -> Result<Verdict> {
    let rootfs = whole_rootfs(context)?;
    let mem = |builder: MicrovmBuilder| Ok(builder.mem(Mem::new(768)?));
    let guest = Guest::boot_on(context, mem, |config| config.max_vcpus = rebuild::MAX_VCPUS)?;
    guest.sandbox()?;
    let range = guest.vm.memory_range();
    let wanted = range.start() + 512;
    grow(&guest, 2, wanted)?;
    let steps = [
        // More than the memory that it began with.
        "head -c 300m /dev/urandom >a; md5sum a >sum; echo ready",
        "md5sum -c sum; grep -c ^processor /proc/cpuinfo",
    ];
    let mut holder = Holder::start(&guest, &rootfs, &steps)?;
    holder.until("ready")?;
    let exports = [("holder", rootfs.as_path())];
    let guest = rebuild::here(context, guest, &exports, || Ok(Vec::new()))?;
    ensure!(guest.vm.resize_memory(wanted, PATIENCE)? == wanted);
    holder.go()?;
    let output = holder.end(&guest)?;
    ensure!(output == "ready\na: OK\n2\n", "{output:?}");
    // It goes on as if it had not been taken to pieces.
    grow(&guest, rebuild::MAX_VCPUS, *range.end())?;
    let cpus = guest.run("cpus", &rootfs, &["grep", "-c", "^processor", "/proc/cpuinfo"])?;
    ensure!(cpus.stdout == b"3\n", "{:?}", String::from_utf8_lossy(&cpus.stdout));
    guest.end()?;
    Ok(Verdict::Passed)
}

/// Has the guest have so many CPUs and MiB of memory.
fn grow(guest: &Guest, vcpus: u8, mib: u32) -> Result<()> {
    guest.vm.add_vcpus(vcpus)?;
    let got = guest.vm.resize_memory(mib, PATIENCE)?;
    ensure!(got == mib, "the guest has {got} MiB, not {mib}");
    let plugged = u64::from(mib - guest.vm.memory_range().start()) << 20;
    let request = ResizeRequest { cpus: vcpus.into(), plugged, ..Default::default() };
    guest.ask(guest.agent.resize(Guest::soon(), &request)).map(drop)
}
