//! A guest and its host change the same files at the same time.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::process::Started;
use super::run::debian;
use super::{Context, Table, Verdict};

/// The table.
pub const CASES: Table = ("races", &[("a_guest_gets_the_errors_of_a_host", errors)]);

/// What runs on both sides.
const PROGRAM: &str = include_str!("races.py");
/// What a guest does, and what is done on the host to compare with.
const OPERATIONS: &str = "2000";
const LIMIT: Duration = Duration::from_secs(600);
type Outcomes = BTreeMap<String, u64>;

/// The program at work for ever, until this is dropped.
struct Beside(Child);

impl Beside {
    fn start(program: &Path, folder: &Path) -> Result<Self> {
        Ok(Self(Command::new("python3").arg(program).arg(folder).arg("0").spawn()?))
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a guest's kernel says to a rename(2) of a directory that its host has moved meanwhile (docs/virtiofs.md).
const EXCUSED: [&str; 2] = ["ESTALE of rename", "EXDEV of rename"];

fn judge(outcomes: &Outcomes, excused: &[&str]) -> Result<()> {
    let unusual = outcomes.keys().any(|name| name.contains(" of ") && !excused.contains(&name.as_str()));
    ensure!(!unusual, "unusual errors: {outcomes:?}");
    ensure!(outcomes.get("fine").is_some_and(|fine| *fine > 300), "next to nothing works: {outcomes:?}");
    Ok(())
}

fn errors(context: &Context) -> Result<Verdict> {
    let Some(debian) = debian::bundle() else { return Ok(debian::no_bundle()) };
    let bundle = context.scratch();
    let (program, data) = (bundle.join("data/races.py"), bundle.join("data"));
    let folders = ["on-host", "shared"].map(|name| data.join(name));
    for folder in &folders {
        fs::create_dir_all(folder)?;
    }
    fs::write(&program, PROGRAM)?;
    let on_host = {
        let _beside = Beside::start(&program, &folders[0])?;
        Command::new("python3").arg(&program).arg(&folders[0]).arg(OPERATIONS).output()?
    };
    ensure!(on_host.status.success(), "on the host: {}", String::from_utf8_lossy(&on_host.stderr));
    judge(&serde_json::from_slice(&on_host.stdout)?, &[]).context("on the host")?;

    let args = ["python3", "/data/races.py", "/data/shared", OPERATIONS];
    let data = json!({"destination": "/data", "type": "bind", "source": "data", "options": ["rbind"]});
    debian::write_config(&debian, bundle, &args, &[data])?;
    let beside = Beside::start(&program, &folders[1])?;
    let run = Started::katavm(&["run".as_ref(), bundle.as_os_str()])?.finish(LIMIT)?;
    context.note("stderr", run.stderr.clone());
    run.expect(0, &[])?;
    drop(beside);
    let outcomes: Outcomes = serde_json::from_str(&run.stdout)?;
    println!("  {outcomes:?}");
    judge(&outcomes, &EXCUSED).context("in the guest")?;
    Ok(Verdict::Passed)
}
