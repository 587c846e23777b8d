//! Limits bite: what a container is not to have, it does not get, and its end says so.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::agent::whole_rootfs;
use super::leftovers::Traces;
use super::run::bundle;
use super::shell::{expect, script};
use super::{Context, Table, Verdict};

/// The table.
pub const CASES: Table = (
    "limits",
    &[
        ("a_fork_bomb_is_held_by_pids_max", fork_bomb),
        ("an_allocation_is_ended_by_memory_max", allocation),
        ("a_busy_loop_gets_its_share_by_cpu_max", busy_loop),
        ("a_write_is_slowed_by_io_max", write),
        ("a_forbidden_system_call_is_refused_or_ends_the_process", seccomp),
        ("what_mknod_made_is_held_by_the_device_rules", devices),
    ],
);

/// A bundle with a shell script as the process, all of busybox, and the container's own control group to look at.
fn limited(context: &Context, text: &str, change: impl FnOnce(&mut Value)) -> Result<()> {
    whole_rootfs(context)?;
    bundle(context, &["sh", "-c", text], |config| {
        let group = json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]});
        config["mounts"].as_array_mut().into_iter().for_each(|mounts| mounts.push(group.clone()));
        change(config);
    })?;
    Ok(())
}

/// The number that a line `NAME NUMBER` has.
fn number<T: std::str::FromStr>(output: &str, name: &str) -> Result<T> {
    let word = output.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    word.and_then(|word| word.parse().ok()).with_context(|| format!("no number of {name} in {output:?}"))
}

fn fork_bomb(context: &Context) -> Result<Verdict> {
    // Processes that cannot fork end: it may come to rest with fewer than there may be, and with no room for another to
    // ask. The first one looks, without a fork, whether somebody was refused.
    limited(
        context,
        "bomb() { (bomb) & (bomb) & sleep 1000; }; (bomb) 2>/dev/null & refused=0
         until [ $refused -gt 0 ]; do read -r max refused </sys/fs/cgroup/pids.events; done; echo refused
         exec sleep 1000",
        |config| {
            config["linux"]["resources"]["pids"] = json!({"limit": 40});
        },
    )?;
    let traces = Traces::of(context.scratch());
    let output = script(
        context,
        "katavm run -d c1 </dev/null >out 2>&1
         until grep -q refused out; do
             [ \"$(katavm state c1 | jq -r .status)\" = running ] || { cat out; exit 1; }
         done
         for i in $(seq 20); do katavm events --stats c1 | jq .data.pids.current; done | sort -n | tail -n 1
         katavm delete --force c1; cat out",
    )?;
    let lines: Vec<_> = output.lines().collect();
    let &[most, refused] = &*lines else { anyhow::bail!("{lines:?}") };
    ensure!(refused == "refused" && (10..=40).contains(&most.parse::<u32>()?), "{lines:?}");
    traces.expect_nothing_new()?;
    Ok(Verdict::Passed)
}

fn allocation(context: &Context) -> Result<Verdict> {
    let hog = "head -c 200000000 /dev/zero | tail -c 190000000 >/dev/null";
    let text = format!("sh -c '{hog}'; echo code $?; grep oom_kill' ' /sys/fs/cgroup/memory.events; {hog}; exit $?");
    limited(context, &text, |config| {
        config["linux"]["resources"]["memory"] = json!({"limit": 64 << 20, "swap": 64 << 20});
    })?;
    let output = script(context, "katavm run --memory 512 --id c1 . </dev/null || echo ended $?")?;
    ensure!(output.starts_with("code 137\n"), "{output:?}");
    ensure!(number::<u32>(&output, "oom_kill")? >= 1 && output.ends_with("ended 137\n"), "{output:?}");
    Ok(Verdict::Passed)
}

fn busy_loop(context: &Context) -> Result<Verdict> {
    // The guest's clock, and the use that its kernel counts: both as the container itself could see them.
    let look =
        "now() { read -r up rest </proc/uptime; echo uptime ${up%.*}${up#*.}; head -n 1 /sys/fs/cgroup/cpu.stat; }";
    let text = format!("{look}; while :; do :; done & sleep 1; now; sleep 10; now");
    limited(context, &text, |config| {
        config["linux"]["resources"]["cpu"] = json!({"quota": 30_000, "period": 100_000});
    })?;
    let output = script(context, "katavm run --id c1 . </dev/null")?;
    let (before, after) = output.rmatch_indices("uptime").next().map(|(at, _)| output.split_at(at)).context("none")?;
    let passed = |name| -> Result<f64> { Ok(number::<f64>(after, name)? - number::<f64>(before, name)?) };
    // Hundredths of seconds and microseconds.
    let share = passed("usage_usec")? / (passed("uptime")? * 10_000.0);
    println!("  share {share:.3} of 0.300");
    ensure!((0.27..=0.33).contains(&share), "it got {share}: {output}");
    Ok(Verdict::Passed)
}

fn write(context: &Context) -> Result<Verdict> {
    let text = "read -r start rest </proc/uptime; dd if=/dev/zero of=$FILE bs=1M count=8 conv=fsync 2>/dev/null; \
                read -r end rest </proc/uptime; echo took $((${end%.*} - ${start%.*})); wc -c <$FILE";
    limited(context, text, |config| {
        // Who writes back a file is settled for a while by who wrote it first.
        config["process"]["env"] = json!(["PATH=/bin", "FILE=/data/free"]);
        let data = json!({"destination": "/data", "type": "bind", "source": "data", "options": ["rbind", "rw"]});
        config["mounts"].as_array_mut().into_iter().for_each(|mounts| mounts.push(data.clone()));
        config["linux"]["cgroupsPath"] = json!("/limited/c1");
    })?;
    let output = script(
        context,
        "modprobe loop; truncate -s 64M disk; mkfs.ext4 -q disk; loop=$(losetup --find --show disk); mkdir data
         trap 'umount data; losetup -d $loop; rm disk; rmdir /sys/fs/cgroup/limited' EXIT
         mount $loop data
         katavm run --id c1 . </dev/null
         number=$(stat -c %r $loop); rate=\"{\\\"major\\\": $((number >> 8)), \\\"minor\\\": $((number & 255)), \\\"rate\\\": 1048576}\"
         jq \".linux.resources.blockIO = {throttleWriteBpsDevice: [$rate]} | .process.env[1] = \\\"FILE=/data/limited\\\"\" config.json >new; mv new config.json
         katavm run --id c1 . </dev/null | sed s/^/limited:/",
    )?;
    let lines: Vec<_> = output.lines().collect();
    ensure!(lines.get(1) == Some(&"8388608") && lines.get(3) == Some(&"limited:8388608"), "{lines:?}");
    let (free, limited): (u32, u32) = (number(&output, "took")?, number(&output, "limited:took")?);
    println!("  8 MiB took {free} s, at 1 MiB/s {limited} s");
    ensure!((6..=30).contains(&limited) && free < limited / 2, "{lines:?}");
    Ok(Verdict::Passed)
}

fn seccomp(context: &Context) -> Result<Verdict> {
    let text = "mkdir /tmp/d 2>&1; sh -c 'exec chroot / true'; echo code $?; grep Seccomp: /proc/self/status";
    limited(context, text, |config| {
        config["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [
                {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28},
                {"names": ["chroot"], "action": "SCMP_ACT_KILL_PROCESS"},
            ],
        });
    })?;
    let output = script(context, "katavm run --id c1 . </dev/null")?;
    let lines = ["mkdir: can't create directory '/tmp/d': No space left on device", "code 159", "Seccomp:\t2"];
    expect(&output, &lines)?;
    Ok(Verdict::Passed)
}

fn devices(context: &Context) -> Result<Verdict> {
    // As with runc, any device may be made and not every one used.
    let text = "cd /dev; mknod good c 1 3 && echo >good && echo made; mknod mute c 1 11 && head -c 1 mute 2>&1; head -c 1 /dev/zero | wc -c";
    limited(context, text, |config| {
        for set in ["bounding", "effective", "permitted"] {
            config["process"]["capabilities"][set]
                .as_array_mut()
                .into_iter()
                .for_each(|set| set.push("CAP_MKNOD".into()));
        }
        config["linux"]["resources"]["devices"] = json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"},
            {"allow": true, "type": "c", "major": 1, "minor": 5, "access": "r"},
        ]);
    })?;
    let output = script(context, "katavm run --id c1 . </dev/null")?;
    let lines = ["made", "head: mute: Operation not permitted", "1"];
    expect(&output, &lines)?;
    Ok(Verdict::Passed)
}
