//! Many runs, runs at once, and runs that are killed at random moments: nothing is left of any of them.

mod commands;

use std::collections::HashSet;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};

use super::leftovers::Traces;
use super::manifest::Manifest;
use super::process::{Finished, Started};
use super::run::bundle;
use super::{Context, Table, Verdict};

/// The table: a sample of what [`LONG`] does.
pub const CASES: Table = (
    "survive",
    &[
        ("eight_runs_in_a_row_leave_nothing", |context| in_a_row(context, 8)),
        ("four_runs_at_once_leave_nothing", |context| at_once(context, 4)),
        ("six_kills_at_random_moments_leave_nothing", |context| killed(context, 6)),
        ("seven_kills_of_commands_and_processes_leave_nothing", |context| commands::killed(context, 7)),
    ],
);

/// For `katavm-e2e --long`.
pub const LONG: Table = (
    "soak",
    &[
        ("a_hundred_runs_in_a_row_leave_nothing", |context| in_a_row(context, 100)),
        ("ten_runs_at_once_ten_times_leave_nothing", |context| {
            (0..10).try_fold(Verdict::Passed, |_, _| at_once(context, 10))
        }),
        ("ninety_kills_at_random_moments_leave_nothing", |context| killed(context, 90)),
        ("a_hundred_kills_of_commands_and_processes_leave_nothing", |context| commands::killed(context, 100)),
    ],
);

/// How long a run may take, emulated and with others beside it.
const LIMIT: Duration = Duration::from_secs(300);
/// What the workload ends with.
const CODE: i32 = 7;
/// Reads, writes and says something, for long enough to be hit in the middle.
const WORK: &str = "uname -r; echo $WHO; mkdir -p /tmp/$WHO; cd /tmp/$WHO; i=0; while [ $i -lt 8 ]; do i=$((i+1)); \
                    head -c 65536 /etc/data > $i; sha256sum < $i > sum; done; cat sum; exit 7";

/// A bundle with some data of its own; containers write to `rootfs/tmp` only. Whatever is there already stays.
struct Bundle {
    path: PathBuf,
    config: Value,
    manifest: Manifest,
    expected: String,
}

impl Bundle {
    fn make(context: &Context) -> Result<Self> {
        let path = context.scratch().to_path_buf();
        if !path.join("rootfs").exists() {
            bundle(context, &["sh", "-c", WORK], |_| ())?;
            let data: Vec<u8> = (0..1_u32 << 18).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
            fs::write(path.join("rootfs/etc/data"), data)?;
        }
        let config = serde_json::from_slice(&fs::read(path.join("config.json"))?)?;
        let sum = std::process::Command::new("sh")
            .args(["-c", "head -c 65536 rootfs/etc/data | sha256sum"])
            .current_dir(&path)
            .output()?;
        let expected = String::from_utf8(sum.stdout)?;
        let manifest = Manifest::of(&path.join("rootfs"), "tmp")?;
        Ok(Self { path, config, manifest, expected })
    }

    /// Starts a run under the name `id`, which the container says as well.
    fn start(&self, id: &str) -> Result<Started> {
        let folder = self.path.join(id);
        fs::create_dir_all(&folder)?;
        let mut config = self.config.clone();
        config["root"]["path"] = json!(self.path.join("rootfs"));
        config["process"]["env"] = json!(["PATH=/bin", format!("WHO={id}")]);
        fs::write(folder.join("config.json"), config.to_string())?;
        Started::katavm(&["run".as_ref(), "--id".as_ref(), id.as_ref(), folder.as_os_str()])
    }

    /// Judges a run that nothing disturbed.
    fn judge(&self, context: &Context, id: &str, run: &Finished) -> Result<()> {
        context.note(&format!("{id}.stderr"), run.stderr.clone());
        run.expect(CODE, &[])?;
        let expected = format!("{}\n{id}\n{}", context.kernel_release()?, self.expected);
        ensure!(run.stdout == expected, "{id}: stdout {:?} instead of {expected:?}", run.stdout);
        Ok(())
    }
}

fn in_a_row(context: &Context, count: usize) -> Result<Verdict> {
    let bundle = Bundle::make(context)?;
    let before = Traces::of(&bundle.path);
    for round in 0..count {
        // The same name each time: it must be free again.
        let run = bundle.start("row")?.finish(LIMIT)?;
        bundle.judge(context, "row", &run).with_context(|| format!("run {round}"))?;
        ensure!(run.stderr.is_empty(), "run {round} complains:\n{}", run.stderr);
        // An orderly end leaves nothing to clean up later.
        let left: Vec<_> = before.new_ones();
        ensure!(left.is_empty(), "left behind at the end of run {round}:\n  {}", left.join("\n  "));
    }
    bundle.manifest.expect_same()?;
    Ok(Verdict::Passed)
}

fn at_once(context: &Context, count: usize) -> Result<Verdict> {
    let bundle = Bundle::make(context)?;
    let before = Traces::of(&bundle.path);
    let names: Vec<String> = (0..count).map(|number| format!("twin-{number}")).collect();
    let started = names.iter().map(|name| bundle.start(name)).collect::<Result<Vec<_>>>()?;
    for (name, run) in names.iter().zip(started) {
        let run = run.finish(LIMIT)?;
        bundle.judge(context, name, &run)?;
    }
    before.expect_nothing_new()?;
    bundle.manifest.expect_same()?;
    Ok(Verdict::Passed)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Target {
    Sandbox,
    Watcher,
    Both,
}

fn killed(context: &Context, count: u32) -> Result<Verdict> {
    let bundle = Bundle::make(context)?;
    let before = Traces::of(&bundle.path);
    let start = Instant::now();
    let run = bundle.start("victim")?.finish(LIMIT)?;
    bundle.judge(context, "victim", &run)?;
    let length = start.elapsed();
    before.expect_nothing_new()?;

    let mut dice = Dice::from_environment();
    let mut hit = HashSet::new();
    let mut story = format!("seed {} (KATAVM_SEED repeats it), a run takes {length:?}\n", dice.seed);
    let mut targets = [Target::Sandbox, Target::Watcher, Target::Both].into_iter().cycle();
    let mut round = 0;
    while round < count || hit.len() < 3 {
        ensure!(round < count + 30, "not every kind of kill hit something:\n{story}");
        let target = targets.next().context("three targets in a circle")?;
        if round >= count && hit.contains(&target) {
            continue;
        }
        // Some moments lie after the end, but not the further ones of a kind that has hit nothing yet.
        let reach = if round < count { 1.1 } else { 0.5 };
        let moment = length.mul_f64(reach * dice.fraction());
        story += &format!("{round}: {target:?} after {moment:?}: ");
        let run = bundle.start("victim")?;
        std::thread::sleep(moment);
        let watcher = run.watcher();
        let kill_watcher = || watcher.is_some_and(|watcher| kill_process(watcher, Signal::KILL).is_ok());
        let watcher_hit = match target {
            Target::Sandbox => false,
            Target::Watcher => kill_watcher(),
            Target::Both => dice.fraction() < 0.5 && kill_watcher(),
        };
        if target != Target::Watcher {
            run.signal(Signal::KILL);
        }
        // Of two that are killed, either may be the first.
        let watcher_hit = watcher_hit || target == Target::Both && kill_watcher();
        let run = run.finish(LIMIT)?;
        let sandbox_hit = run.was_killed();
        story += &format!("{}, watcher {}\n", run.status, if watcher_hit { "killed" } else { "not killed" });
        context.note("story", story.clone());
        if sandbox_hit || watcher_hit {
            hit.insert(target);
        }
        let judged = || -> Result<()> {
            if !sandbox_hit {
                bundle.judge(context, "victim", &run)?;
            }
            if sandbox_hit && watcher_hit {
                let next = Started::katavm(&["gc"])?.finish(LIMIT)?;
                next.expect(0, &[])?;
            }
            before.expect_nothing_new()?;
            bundle.manifest.expect_same()
        };
        judged().with_context(|| format!("the story so far:\n{story}"))?;
        round += 1;
    }
    println!("{story}");
    let run = bundle.start("victim")?.finish(LIMIT)?;
    bundle.judge(context, "victim", &run)?;
    before.expect_nothing_new()?;
    Ok(Verdict::Passed)
}

/// Numbers that a seed repeats (SplitMix64).
struct Dice {
    seed: u64,
    state: u64,
}

impl Dice {
    /// From `$KATAVM_SEED`, else from the clock.
    fn from_environment() -> Self {
        let given = std::env::var("KATAVM_SEED").ok().and_then(|seed| seed.parse().ok());
        let clock = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.subsec_nanos().into());
        let seed = given.unwrap_or_else(clock);
        Self { seed, state: seed }
    }

    /// 0 up to but not 1.
    fn fraction(&mut self) -> f64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        (mixed >> 11) as f64 / (1_u64 << 53) as f64
    }
}
