//! The POSIX suite pjdfstest on files that a guest shares with its host, and on the host itself.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;

use super::guest::privilege;
use super::process::Started;
use super::run::debian;
use super::{Context, Table, Verdict};

/// For `katavm-e2e --long`.
pub const LONG: Table = ("posix", &[("pjdfstest_says_the_same_on_host_and_guest", same)]);

const LIMIT: Duration = Duration::from_secs(3600);
/// What the suite is to try beside what every system has, and as whom.
const CONFIGURATION: &str = r#"
[features]
posix_fallocate = {}
rename_ctime = {}
utimensat = {}
[settings]
naptime = 0.05
[dummy_auth]
entries = [["nobody", "nogroup"], ["daemon", "daemon"]]
"#;
/// It looks for its configuration and its folder here.
const RUN: &str = "umask 022; cd \"$1\" && ./pjdfstest -c configuration -p \"$2\"";

/// What became of each case.
type Outcomes = BTreeMap<String, String>;

fn outcomes(output: &str) -> Outcomes {
    let word = |line: &str| {
        let (name, outcome) = line.trim_end().rsplit_once(' ')?;
        let is_outcome = ["ok", "FAILED", "skipped"].contains(&outcome);
        (is_outcome && name.contains("::")).then(|| (name.trim_end().to_owned(), outcome.to_owned()))
    };
    output.lines().filter_map(word).collect()
}

/// Both on a file system in memory, as the host of a lab has no other that knows all of it.
fn on_tmpfs(folder: &Path) -> Result<()> {
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "mode=755", "tmpfs"]).arg(folder).status()?;
    ensure!(mounted.success(), "cannot mount a file system at {}", folder.display());
    Ok(())
}

fn same(context: &Context) -> Result<Verdict> {
    let Some(debian) = debian::bundle() else { return Ok(debian::no_bundle()) };
    let Some(program) = env::var_os("KATAVM_E2E_PJDFSTEST") else {
        return Ok(Verdict::Skipped("KATAVM_E2E_PJDFSTEST names no program: ./just pjdfstest has one".into()));
    };
    let bundle = context.scratch();
    let data = bundle.join("data");
    let folders = ["on-host", "shared"].map(|name| data.join(name));
    for folder in &folders {
        fs::create_dir_all(folder)?;
    }
    fs::copy(program, data.join("pjdfstest"))?;
    fs::write(data.join("configuration"), CONFIGURATION)?;
    folders.iter().try_for_each(|folder| on_tmpfs(folder))?;
    let tried = tried(context, &debian, &data);
    for folder in &folders {
        Command::new("umount").arg(folder).status()?;
    }
    let (host, guest) = tried?;
    let different: Vec<_> = host
        .iter()
        .map(|(name, outcome)| (name, outcome, guest.get(name)))
        .filter(|(_, host, guest)| Some(*host) != *guest)
        .collect();
    let count = |what: &str| host.values().filter(|outcome| *outcome == what).count();
    println!("  {} cases, {} ok on the host, {} different", host.len(), count("ok"), different.len());
    ensure!(
        host.len() == guest.len() && count("ok") > 300,
        "{} cases on the host, {} in the guest",
        host.len(),
        guest.len()
    );
    ensure!(different.is_empty(), "{different:#?}");
    Ok(Verdict::Passed)
}

fn tried(context: &Context, debian: &Path, data: &Path) -> Result<(Outcomes, Outcomes)> {
    let host = Command::new("sh").args(["-c", RUN, "sh"]).arg(data).arg("on-host").output()?;
    context.note("host", host.stdout.clone());
    let args = ["sh", "-c", RUN, "sh", "/data", "shared"];
    let mount = json!({"destination": "/data", "type": "bind", "source": data, "options": ["rbind"]});
    debian::write_changed_config(debian, context.scratch(), &args, &[mount], privilege)?;
    let run = Started::katavm(&["run".as_ref(), context.scratch().as_os_str()])?.finish(LIMIT)?;
    context.note("guest", run.stdout.clone());
    context.note("guest-stderr", run.stderr.clone());
    Ok((outcomes(&String::from_utf8_lossy(&host.stdout)), outcomes(&run.stdout)))
}
