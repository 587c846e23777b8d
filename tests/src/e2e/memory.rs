//! Memory that a guest has no use for goes back to the host.

use anyhow::{Context as _, Result, bail, ensure};

use super::agent::whole_rootfs;
use super::context::is_lab;
use super::cri::until;
use super::guest::Guest;
use super::leftovers::Traces;
use super::run::bundle;
use super::shell::{expect, script};
use super::{Context, Table, Verdict};

/// The table.
pub const CASES: Table = (
    "memory",
    &[
        ("the_balloon_is_filled_and_lets_go_when_memory_is_short", balloon),
        ("what_is_freed_goes_back_to_the_host", freed),
        ("what_is_free_stays_so_while_it_goes_back", steady),
        ("what_was_read_goes_back_when_the_container_is_at_rest", at_rest),
        ("huge_pages_are_all_there_or_the_guest_is_refused", huge_pages),
    ],
);

/// For `katavm-e2e --long`: the same with a GiB.
pub const LONG: Table = (
    "memory-long",
    &[
        ("a_gib_that_is_freed_goes_back_to_the_host", |context| goes_back(context, 1024, ALLOCATE, 0)),
        ("a_gib_that_was_read_goes_back_when_the_container_is_at_rest", |context| goes_back(context, 1024, READ, KEPT)),
    ],
);

/// Has so many MiB of memory at once, and frees them.
const ALLOCATE: &str = "head -c $((SIZE + 1))m /dev/zero | tail -c ${SIZE}m >/dev/null";
/// So many KiB of files a guest keeps in memory (docs/memory.md).
const KEPT: u64 = 16 << 10;
/// Reads a file of so many MiB.
const READ: &str = "cat /data >/dev/null";

fn balloon(context: &Context) -> Result<Verdict> {
    let rootfs = whole_rootfs(context)?;
    let guest = Guest::boot(context, |config| config.memory_mib = 160)?;
    guest.sandbox()?;
    // More than is left beside the balloon.
    guest.vm.set_balloon(60)?;
    until("the balloon is not filled", || Ok(guest.vm.balloon_mib()? >= 60))?;
    let hungry = "head -c 75m /dev/zero | tail -c 70m | wc -c";
    let output = guest.run("hungry", &rootfs, &["sh", "-c", hungry])?;
    ensure!(output.stdout == b"73400320\n", "{:?}", String::from_utf8_lossy(&output.stdout));
    let held = guest.vm.balloon_mib()?;
    ensure!(held < 60, "the balloon has let go of nothing: {held} MiB");
    println!("  {held} MiB of 60 are left in the balloon");
    guest.vm.set_balloon(0)?;
    until("the balloon is not empty", || Ok(guest.vm.balloon_mib()? == 0))?;
    guest.end()?;
    Ok(Verdict::Passed)
}

fn freed(context: &Context) -> Result<Verdict> {
    goes_back(context, 192, ALLOCATE, 0)
}

/// Free pages that are reported are not free meanwhile, and who needs them then is killed: nobody may run then.
fn steady(context: &Context) -> Result<Verdict> {
    let rootfs = whole_rootfs(context)?;
    let guest = Guest::boot(context, |config| config.memory_mib = 160)?;
    guest.sandbox()?;
    // Looked at for longer than a report is waited for.
    let look = "head -c 61m /dev/zero | tail -c 60m >/dev/null; awk 'BEGIN {
        do {
            getline line <\"/proc/uptime\"; close(\"/proc/uptime\"); split(line, now)
            getline line <\"/proc/meminfo\"; getline line <\"/proc/meminfo\"; close(\"/proc/meminfo\"); split(line, free)
            if (!looks++) { first = lowest = free[2]; end = now[1] + 4 }
            if (free[2] < lowest) lowest = free[2]
        } while (now[1] < end)
        print free[1], first, lowest, looks }'";
    let output = String::from_utf8(guest.run("look", &rootfs, &["sh", "-c", look])?.stdout)?;
    println!("  {}", output.trim());
    let Some(("MemFree:", numbers)) = output.split_once(' ') else { bail!("{output:?}") };
    let numbers: Vec<u64> = numbers.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    let &[first, lowest, looks] = &*numbers else { bail!("{output:?}") };
    ensure!(looks > 500, "it was not looked often enough: {output:?}");
    ensure!(first - lowest < 8 << 10, "of {first} KiB free only {lowest} were free for a time");
    guest.end()?;
    Ok(Verdict::Passed)
}

fn at_rest(context: &Context) -> Result<Verdict> {
    goes_back(context, 192, READ, KEPT)
}

/// Has a container use `mib` MiB by `work`: of what its sandbox has more for that, all but a tenth and the `kept` KiB that
/// its guest keeps go back to the host.
fn goes_back(context: &Context, mib: u64, work: &str, kept: u64) -> Result<Verdict> {
    whole_rootfs(context)?;
    bundle(context, &["sleep", "100000"], |_| ())?;
    let traces = Traces::of(context.scratch());
    let memory = mib * 5 / 4 + 256;
    let output = script(
        context,
        &format!(
            "export SIZE={mib}; truncate -s {mib}M rootfs/data
             katavm run -d --memory {memory} c1 </dev/null >out 2>&1
             sandbox=$(pgrep -x katavm-sandbox)
             used() {{ awk '/^RssAnon/ {{ print $2 }}' /proc/$sandbox/status; }}
             sleep 1; before=$(used); most=0; now=0
             katavm exec -e SIZE=$SIZE c1 sh -c '{work}' </dev/null >/dev/null & exec=$!
             look() {{ now=$(used); if [ $now -gt $most ]; then most=$now; fi; }}
             while kill -0 $exec 2>/dev/null; do look; sleep 0.1; done; wait $exec
             look; SECONDS=0
             until [ $now -le $((before + {kept} + (most - before) / 10)) ] || [ $SECONDS -gt 180 ]; do sleep 0.5; look; done
             echo $before $most $now $SECONDS
             katavm delete --force c1; rm rootfs/data"
        ),
    )?;
    let numbers: Vec<u64> = output.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    let &[before, most, after, seconds] = &*numbers else { anyhow::bail!("{output:?}") };
    println!("  {before} KiB before, {most} at most, {after} {seconds} s later");
    let used = most.checked_sub(before).context("it used no memory")?;
    ensure!(used > mib * 1024 * 4 / 5, "it did not use the memory: {output}");
    ensure!(after.saturating_sub(before) <= used / 10 + kept, "it was not given back: {output}");
    traces.expect_nothing_new()?;
    Ok(Verdict::Passed)
}

fn huge_pages(context: &Context) -> Result<Verdict> {
    if !is_lab() {
        return Ok(Verdict::Skipped("it sets the host's memory aside, and this is no lab".into()));
    }
    whole_rootfs(context)?;
    bundle(context, &["sleep", "100000"], |_| ())?;
    let traces = Traces::of(context.scratch());
    let output = script(
        context,
        "free() { awk '/^HugePages_Free/ { free = $2 } /^HugePages_Rsvd/ { print free - $2 }' /proc/meminfo; }
         trap 'echo 0 >/proc/sys/vm/nr_hugepages' EXIT
         echo 200 >/proc/sys/vm/nr_hugepages; free
         printf '[guest]\nhuge_pages = true\n' >huge.toml
         katavm --config huge.toml run -d --memory 257 c1 </dev/null >out 2>&1; free
         katavm exec c1 sh -c 'head -c 101m /dev/zero | tail -c 100m | wc -c' </dev/null; free
         katavm delete --force c1; free
         katavm --config huge.toml run --memory 402 c1 </dev/null 2>err || echo code $?; cat err; free",
    )?;
    let refused = "cannot map 402 MiB of guest memory in huge pages: 400 MiB of pages of 2 MiB are free on this host";
    let expected = ["200", "71", "104857600", "71", "200", "code 1", refused, "200"];
    let lines: Vec<_> = output.lines().map(|line| line.find(refused).map_or(line, |_| refused)).collect();
    expect(&lines.join("\n"), &expected)?;
    traces.expect_nothing_new()?;
    Ok(Verdict::Passed)
}
