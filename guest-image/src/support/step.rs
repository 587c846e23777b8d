//! Running a command as one visible step of a long recipe.

use std::ffi::OsStr;
use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Says on stderr what happens now.
pub fn say(message: &str) {
    eprintln!("katavm: {message}");
}

/// How often a running step says that it still runs.
const PROGRESS: Duration = Duration::from_secs(15);

/// Runs a command with its output in `log`, saying `title` first and the time it took after; a step that takes
/// longer also says now and then for how long it has been running and what its log's last line is.
///
/// # Errors
/// When the command cannot be started or fails; the error ends with the last lines of the log.
pub fn run(title: &str, command: &mut Command, log: &Path) -> Result<()> {
    say(&format!("{title} ..."));
    let start = Instant::now();
    let file = File::options().create(true).append(true).open(log)?;
    let program = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .spawn()
        .with_context(|| format!("cannot run {program}"))?;
    let status = thread::scope(|scope| {
        let (ended, running) = mpsc::channel::<()>();
        scope.spawn(move || {
            while running.recv_timeout(PROGRESS) == Err(RecvTimeoutError::Timeout) {
                say(&format!("{title}: {:.0} s: {}", start.elapsed().as_secs_f32(), tail(log, 1).trim()));
            }
        });
        let status = child.wait();
        drop(ended);
        status
    })?;
    if !status.success() {
        bail!("{title}: {program} ended with {status}; the end of {}:\n{}", log.display(), tail(log, 20));
    }
    say(&format!("{title}: done in {:.0} s", start.elapsed().as_secs_f32()));
    Ok(())
}

/// A command with its arguments, ready for [`run`].
pub fn command<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(program: &str, args: I) -> Command {
    let mut command = Command::new(program);
    command.args(args);
    command
}

fn tail(log: &Path, lines: usize) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
