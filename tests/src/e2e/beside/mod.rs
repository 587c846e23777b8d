//! katavm beside runc: the same scripts with both, which must say the same.
//!
//! In a script `rt` is the runtime, the current folder a bundle of runc's own specification with busybox in it and no
//! terminal, `config` changes `config.json` by a jq program, and `args` has the container run a shell script.

mod cases;

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::{Context, Row, Verdict};
use cases::Case;

/// The table: a row per kind of cases.
pub const CASES: (&str, &[Row]) = (
    "beside_runc",
    &[
        ("lifecycle", |context| compare(context, cases::LIFECYCLE)),
        ("exec", |context| compare(context, cases::EXEC)),
        ("terminal", |context| compare(context, cases::TERMINAL)),
        ("mounts", |context| compare(context, cases::MOUNTS)),
        ("users", |context| compare(context, cases::USERS)),
        ("cgroups", |context| compare(context, cases::CGROUPS)),
        ("hooks", |context| compare(context, cases::HOOKS)),
        ("errors", |context| compare(context, cases::ERRORS)),
    ],
);

/// What every script begins with.
const PRELUDE: &str = include_str!("prelude.sh");
/// A terminal for a command: see the file.
const TERMINAL: &str = include_str!("terminal.py");
/// Seconds that a script may take, emulated and on a busy machine.
const LIMIT: &str = "120";

fn compare(context: &Context, cases: &[Case]) -> Result<Verdict> {
    let mut differing = Vec::new();
    for (name, text) in cases {
        let theirs = said(context, name, "runc", text)?;
        ensure!(!theirs.trim().is_empty(), "{name}: runc says nothing");
        let ours = said(context, name, "katavm", text)?;
        if ours == theirs {
            println!("  {name}: the same");
        } else {
            println!("  {name}: DIFFERENT: katavm says\n{ours}where runc says\n{theirs}");
            differing.push(*name);
        }
    }
    ensure!(differing.is_empty(), "different: {}", differing.join(", "));
    Ok(Verdict::Passed)
}

/// What a script prints with a runtime, both streams together, and how it ends.
fn said(context: &Context, name: &str, runtime: &str, text: &str) -> Result<String> {
    let folder = context.scratch().join(name).join(runtime);
    fs::create_dir_all(&folder)?;
    fs::write(folder.join("terminal.py"), TERMINAL)?;
    fs::write(folder.join("script"), format!("{PRELUDE}{text}"))?;
    let output = Command::new("timeout")
        .args(["-k", "5", LIMIT, "bash", "-u", "script"])
        .env("RUNTIME", runtime)
        .current_dir(&folder)
        .output()
        .context("the lab has no bash")?;
    let mut said = String::from_utf8_lossy(&output.stdout).into_owned();
    context.note(&format!("{name}-{runtime}"), [&*output.stdout, &*output.stderr].concat());
    if !output.status.success() {
        said.push_str(&format!("the script ended with {}\n", output.status));
    }
    clean(&folder, runtime)?;
    Ok(said)
}

/// A case that failed leaves nothing running.
fn clean(folder: &Path, runtime: &str) -> Result<()> {
    let script = format!("{PRELUDE}for id in $(rt list -q); do rt delete -f $id; done; rt list -q");
    let output = Command::new("bash").args(["-c", &script]).env("RUNTIME", runtime).current_dir(folder).output()?;
    ensure!(output.stdout.is_empty(), "{runtime} cannot delete all: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
