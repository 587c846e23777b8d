//! Commands, and processes of the sandbox, that are killed at random moments of a container's life.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;

use super::super::leftovers::Traces;
use super::super::process::Started;
use super::super::run::bundle;
use super::super::{Context, Verdict};
use super::{Dice, LIMIT};

/// What is killed: a command, or by its name a process that it made.
const VICTIMS: [&str; 7] = ["create", "start", "exec", "run", "delete", "katavm-sandbox", "katavm-standin"];

/// The commands of a short life, each of which must end by itself; what it cannot do it says.
const LIFE: [&[&str]; 5] = [
    &["create", "c1"],
    &["start", "c1"],
    &["exec", "c1", "sh", "-c", "echo x >/tmp/x; cat /tmp/x"],
    &["exec", "-d", "c1", "sleep", "1000"],
    &["delete", "--force", "c1"],
];

/// Kills `count` times, each victim in turn: `list` and `delete --force` always bring the host back to clean.
pub fn killed(context: &Context, count: usize) -> Result<Verdict> {
    bundle(context, &["sleep", "1000"], |_| ())?;
    let before = Traces::of(context.scratch());
    // How long each command takes when nothing disturbs it.
    let mut lengths = BTreeMap::new();
    for arguments in LIFE.iter().chain(&[&["run", "-d", "c1"] as &[&str], &["delete", "--force", "c1"]]) {
        let start = Instant::now();
        command(context, arguments)?.finish(LIMIT)?.expect(0, &[])?;
        lengths.entry(arguments[0]).or_insert(start.elapsed());
    }
    before.expect_nothing_new()?;

    let mut dice = Dice::from_environment();
    let mut hits = BTreeMap::from(VICTIMS.map(|victim| (victim, 0)));
    let mut story = format!("seed {} (KATAVM_SEED repeats it)\n", dice.seed);
    for (round, victim) in (0..count).zip(VICTIMS.into_iter().cycle()) {
        story += &format!("{round}: {victim}: ");
        let hit = live_and_kill(context, victim, &lengths, &mut dice, &mut story);
        story.push('\n');
        context.note("story", story.clone());
        let cleaned = || -> Result<()> {
            if hit? {
                *hits.entry(victim).or_default() += 1;
            }
            command(context, &["list"])?.finish(LIMIT)?.expect(0, &[])?;
            command(context, &["delete", "--force", "c1"])?.finish(LIMIT)?.expect(0, &[])?;
            before.expect_nothing_new()
        }();
        cleaned.with_context(|| format!("the story so far:\n{story}"))?;
    }
    println!("  {hits:?}");
    ensure!(count < VICTIMS.len() * 3 || hits.values().all(|hits| *hits > 0), "not each was hit: {hits:?}\n{story}");
    Ok(Verdict::Passed)
}

/// A container's life until the kill, and whether that hit something.
fn live_and_kill(
    context: &Context,
    victim: &str,
    lengths: &BTreeMap<&str, Duration>,
    dice: &mut Dice,
    story: &mut String,
) -> Result<bool> {
    let run: &[&[&str]] = &[&["run", "-d", "c1"]];
    let life: &[&[&str]] = if victim == "run" { run } else { &LIFE };
    // A process of the sandbox is killed during any command.
    let chosen = (dice.fraction() * life.len() as f64) as usize;
    for (index, arguments) in life.iter().enumerate() {
        let now = if lengths.contains_key(victim) { arguments[0] == victim } else { index == chosen };
        if !now {
            command(context, arguments)?.finish(LIMIT)?.expect(0, &[])?;
            continue;
        }
        let moment = lengths[arguments[0]].mul_f64(1.1 * dice.fraction());
        let started = command(context, arguments)?;
        std::thread::sleep(moment);
        let hit = if lengths.contains_key(victim) {
            started.signal(Signal::KILL);
            None
        } else {
            Some(kill_by_name(victim)?)
        };
        let finished = started.finish(LIMIT)?;
        let hit = hit.unwrap_or_else(|| finished.was_killed());
        let word = if hit { "hit" } else { "missed" };
        *story += &format!("{word} in {} after {moment:?}: {}, {}", arguments[0], finished.status, told(context)?);
        return Ok(hit);
    }
    Ok(false)
}

/// Its streams are files, since containers inherit them.
fn command(context: &Context, arguments: &[&str]) -> Result<Started> {
    let mut command = Command::new("sh");
    command.args(["-c", "exec katavm \"$@\" >stdout 2>stderr", "sh"]).args(arguments).current_dir(context.scratch());
    Started::spawn(&mut command)
}

fn told(context: &Context) -> Result<String> {
    Ok(std::fs::read_to_string(context.scratch().join("stderr"))?.trim().to_owned())
}

/// Kills all processes of a name; whether there was one.
fn kill_by_name(name: &str) -> Result<bool> {
    Ok(Command::new("pkill").args(["-KILL", "-x", name]).status()?.success())
}
