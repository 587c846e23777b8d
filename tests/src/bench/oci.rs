//! `bench oci`: a container's life by the OCI command line, katavm beside runc and crun.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tempfile::TempDir;

use super::bundle;
use super::clock::{milliseconds, now};
use super::measure::{Measure, Table};
use super::plot;
use super::process::{Tree, await_readable};

/// `create` of a container that runs /bin/true.
const CREATE: Measure = Measure::new("create", "ms");
/// `start` of it, and the end of its process.
const START: Measure = Measure::new("start", "ms");
/// `delete` of it.
const DELETE: Measure = Measure::new("delete", "ms");
/// All of them.
const LIFE: Measure = Measure::new("create_start_delete", "ms");
/// `exec` of /bin/true in a running container, to its end.
const EXEC: Measure = Measure::new("exec", "ms");

const MEASURES: [Measure; 5] = [CREATE, START, DELETE, LIFE, EXEC];
const RUNTIMES: [&str; 3] = ["katavm", "runc", "crun"];

/// Lives of containers `runs` times with each runtime, in turn, and as many execs; prints medians and ratios.
///
/// # Errors
/// When a runtime fails.
pub fn run(runs: u32, out: &mut impl Write) -> Result<()> {
    let bench = Bench::new()?;
    // Once for nothing: files come into the page cache, and katavm probes this machine's KVM.
    for runtime in RUNTIMES {
        bench.life(runtime)?;
    }
    let mut table = Table::default();
    for round in 0..runs {
        for runtime in RUNTIMES {
            eprintln!("round {}: {runtime}", round + 1);
            for (measure, value) in bench.life(runtime)? {
                table.add(&measure, runtime, value);
            }
            table.add(&EXEC, runtime, bench.exec(runtime)?);
        }
    }
    table.print("oci", &MEASURES, out)?;
    writeln!(out, "oci plot {}", plot::draw("oci", &table.medians(&MEASURES))?.display())?;
    Ok(())
}

/// The container's name.
const ID: &str = "measured";

struct Bench {
    scratch: TempDir,
    image: PathBuf,
    run_true: PathBuf,
    run_sleep: PathBuf,
}

impl Bench {
    fn new() -> Result<Self> {
        let scratch = TempDir::with_prefix("katavm-bench-")?;
        let bundle = bundle::busybox(scratch.path())?;
        Ok(Self {
            image: bundle::image(scratch.path())?,
            run_true: bundle::with(&bundle, "true", &["/bin/true"])?,
            run_sleep: bundle::with(&bundle, "sleep", &["/bin/sleep", "1000"])?,
            scratch,
        })
    }

    /// From `create` to `delete` of a container that runs /bin/true.
    fn life(&self, runtime: &str) -> Result<[(Measure, f64); 4]> {
        let container = Container { bench: self, runtime };
        let start = now()?;
        let pid = container.create(&self.run_true)?;
        let created = now()?;
        let process = pidfd_open(pid, PidfdFlags::empty())?;
        container.command(&["start", ID])?;
        await_readable(process)?;
        let ended = now()?;
        container.command(&["delete", ID])?;
        let end = now()?;
        Ok([
            (CREATE, milliseconds(created - start)),
            (START, milliseconds(ended - created)),
            (DELETE, milliseconds(end - ended)),
            (LIFE, milliseconds(end - start)),
        ])
    }

    /// `exec` of /bin/true, the second one: the first brings its program into memory.
    fn exec(&self, runtime: &str) -> Result<f64> {
        let container = Container { bench: self, runtime };
        container.create(&self.run_sleep)?;
        container.command(&["start", ID])?;
        container.command(&["exec", ID, "/bin/true"])?;
        let start = now()?;
        container.command(&["exec", ID, "/bin/true"])?;
        Ok(milliseconds(now()? - start))
    }
}

/// A container, which goes when it is let go of.
struct Container<'a> {
    bench: &'a Bench,
    runtime: &'a str,
}

impl Container<'_> {
    fn create(&self, bundle: &Path) -> Result<Pid> {
        let file = self.bench.scratch.path().join("pid");
        let (bundle, path) = (bundle.to_str().context("a path")?, file.to_str().context("a path")?);
        self.command(&["create", "--bundle", bundle, "--pid-file", path, ID])?;
        let pid = fs::read_to_string(file)?.trim().parse()?;
        Pid::from_raw(pid).context("the pid file has no pid")
    }

    /// Runs a command of the runtime to its good end.
    fn command(&self, arguments: &[&str]) -> Result<()> {
        // A file: the container keeps it.
        let said = self.bench.scratch.path().join("said");
        let file = fs::File::create(&said)?;
        let mut command = self.runtime(arguments);
        let output = Tree::spawn(command.stdout(file.try_clone()?).stderr(file))?.output()?;
        ensure!(output.status.success(), "{command:?}: {}: {}", output.status, fs::read_to_string(said)?);
        Ok(())
    }

    fn runtime(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.runtime);
        command.arg("--root").arg(self.bench.scratch.path().join(self.runtime)).args(arguments);
        command.env("KATAVM_GUEST_IMAGE", &self.bench.image).stdin(Stdio::null());
        command
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        // One that was deleted is not there any more, which is no error to any of them. A guest that hangs is given
        // up after a while, longer than a measurement waits.
        if let Err(error) = self.runtime(&["delete", "--force", ID]).status() {
            eprintln!("{}: {error}", self.runtime);
        }
    }
}
