//! A shell in a guest on the Debian bundle (`examples/make-bundle debian`), for several cases one after another.

use std::env;
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::super::{Context, Verdict};
use super::katavm::{Running, command};

/// Where the guest sees the folder that it shares with the cases.
const SHARED: &str = "/case";
/// Printed when a script has ended, before its exit code.
const MARK: &str = "-- katavm-e2e: ended with ";
/// How long one script may take, emulated and on a busy machine.
const LIMIT: Duration = Duration::from_secs(600);

/// The shell; it ends when it is dropped.
pub struct Shell {
    katavm: Running,
    stdin: Option<ChildStdin>,
    stdout: Receiver<Vec<u8>>,
    folder: TempDir,
}

/// What a script did.
pub struct Done {
    /// Its exit code.
    pub code: i32,
    /// Both of its outputs.
    pub output: String,
}

impl Shell {
    /// Boots a guest with the bundle at `bundle`, its files, and a folder that it shares with the cases.
    fn start(bundle: &Path) -> Result<Self> {
        let folder = TempDir::with_prefix("katavm-e2e-debian-")?;
        let shared = folder.path().join("shared");
        fs::create_dir(&shared)?;
        let bind = json!({"destination": SHARED, "type": "bind", "source": shared, "options": ["rbind"]});
        write_config(bundle, folder.path(), &["sh"], &[bind])?;
        let mut command = command();
        command.args(["run", "--memory=1G"]).arg(folder.path());
        let mut katavm = Running::start(command.stdin(Stdio::piped()).stdout(Stdio::piped()))?;
        let (stdin, mut output) = (katavm.stdin()?, katavm.stdout()?);
        let (sender, stdout) = channel();
        thread::spawn(move || {
            let mut buffer = [0; 65536];
            while let Ok(len @ 1..) = output.read(&mut buffer) {
                if sender.send(buffer[..len].to_vec()).is_err() {
                    break;
                }
            }
        });
        Ok(Self { katavm, stdin: Some(stdin), stdout, folder })
    }

    /// Runs a script to its end in a shell of its own, which stops at the first failure.
    fn run(&mut self, script: &str) -> Result<Done> {
        let whole = format!(
            "sh -euc \"$(cat <<'KATAVM_E2E_SCRIPT'\n{script}\nKATAVM_E2E_SCRIPT\n)\" < /dev/null 2>&1; echo \"{MARK}$?\"\n"
        );
        self.stdin.as_mut().context("the shell has ended")?.write_all(whole.as_bytes())?;
        let end = Instant::now() + LIMIT;
        let mut output = Vec::new();
        loop {
            let text = String::from_utf8_lossy(&output);
            if let Some((before, after)) = text.rsplit_once(MARK)
                && let Some(code) = after.strip_suffix('\n')
            {
                return Ok(Done { code: code.parse()?, output: before.into() });
            }
            let left = end.saturating_duration_since(Instant::now());
            let more = self.stdout.recv_timeout(left);
            output.extend(more.map_err(|error| anyhow::anyhow!("{error}; the output so far:\n{text}"))?);
        }
    }

    /// Has the shell exit with `code`; what katavm exits with.
    fn exit(&mut self, code: u8) -> Result<ExitStatus> {
        writeln!(self.stdin.as_mut().context("the shell has ended")?, "exit {code}")?;
        self.katavm.wait()
    }
}

/// The Debian bundle, if there is one.
pub fn bundle() -> Option<PathBuf> {
    env::var_os("KATAVM_E2E_DEBIAN").map(PathBuf::from)
}

/// Why a case without the bundle is skipped.
pub fn no_bundle() -> Verdict {
    Verdict::Skipped("KATAVM_E2E_DEBIAN names no Debian bundle: ./just test-e2e makes one".into())
}

/// Makes a bundle in `folder` that runs `args` on the root file system of `bundle`, with more `mounts`.
pub fn write_config(bundle: &Path, folder: &Path, args: &[&str], mounts: &[Value]) -> Result<()> {
    write_changed_config(bundle, folder, args, mounts, |_| ())
}

/// The same after `change` of its configuration.
pub fn write_changed_config(
    bundle: &Path,
    folder: &Path,
    args: &[&str],
    mounts: &[Value],
    change: impl FnOnce(&mut Value),
) -> Result<()> {
    let text = fs::read(bundle.join("config.json")).context("cannot read the Debian bundle's config.json")?;
    let mut config: Value = serde_json::from_slice(&text)?;
    config["root"]["path"] = json!(bundle.join("rootfs"));
    config["process"]["args"] = json!(args);
    config["mounts"].as_array_mut().context("the bundle has no mounts")?.extend_from_slice(mounts);
    change(&mut config);
    Ok(fs::write(folder.join("config.json"), config.to_string())?)
}

/// Runs a script in the group's shell and asks that it ends with 0 and prints nothing but `expected`.
///
/// `prepare` may put files into the folder that the script finds at `/case`.
pub fn script(
    context: &Context,
    prepare: impl FnOnce(&Path, &Path) -> Result<()>,
    script: &str,
    expected: &str,
) -> Result<Verdict> {
    let Some(bundle) = bundle() else { return Ok(no_bundle()) };
    let mut shell = context.group().shell.borrow_mut();
    // One that fails leaves the next case a new guest.
    let mut running = match shell.take() {
        Some(running) => running,
        None => Shell::start(&bundle)?,
    };
    prepare(&bundle.join("rootfs"), &running.folder.path().join("shared"))?;
    let done = running.run(script)?;
    context.note("output", done.output.clone());
    ensure!(done.code == 0, "exit code {}; output:\n{}", done.code, done.output);
    ensure!(done.output == expected, "{:?} instead of {expected:?}", done.output);
    *shell = Some(running);
    Ok(Verdict::Passed)
}

/// Ends the group's shell, if there is one.
pub fn end(context: &Context) -> Result<Verdict> {
    let Some(mut running) = context.group().shell.borrow_mut().take() else {
        return Ok(Verdict::Skipped("no guest was started by the cases before".into()));
    };
    let status = running.exit(23)?;
    ensure!(status.code() == Some(23), "{status}");
    Ok(Verdict::Passed)
}
