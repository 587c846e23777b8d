//! Calling the command `katavm`, and judging what came of it.

use std::ffi::OsStr;
use std::io::Write;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Output, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::super::{Context, Verdict};

/// How long one step of a guest may take, emulated and on a busy machine.
pub const LIMIT: Duration = Duration::from_secs(120);

/// `katavm` as it is found in PATH.
pub fn command() -> Command {
    Command::new("katavm")
}

/// Runs `katavm` with `args` and `input` on its stdin.
pub fn katavm<S: AsRef<OsStr>>(context: &Context, args: &[S], input: &[u8]) -> Result<Output> {
    let mut command = command();
    command.args(args);
    finish(context, command, input)
}

/// `katavm run BUNDLE` with `input` on its stdin.
pub fn run(context: &Context, bundle: &Path, input: &[u8]) -> Result<Output> {
    katavm(context, &[OsStr::new("run"), bundle.as_os_str()], input)
}

/// Runs a command to its end, with `input` on its stdin.
pub fn finish(context: &Context, mut command: Command, input: &[u8]) -> Result<Output> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let program = command.get_program().to_string_lossy().into_owned();
    let mut child = command.spawn().with_context(|| format!("cannot run {program}: is it in PATH?"))?;
    let mut stdin = child.stdin.take().context("no stdin")?;
    let output = thread::scope(|scope| {
        // The other end may close early: that is for the case to judge by the result.
        scope.spawn(move || stdin.write_all(input));
        child.wait_with_output()
    })?;
    context.note("stdout", output.stdout.clone());
    context.note("stderr", output.stderr.clone());
    Ok(output)
}

/// A process that does not outlive its case.
pub struct Running(Child);

impl Running {
    /// Starts a command.
    pub fn start(command: &mut Command) -> Result<Self> {
        let program = command.get_program().to_string_lossy().into_owned();
        Ok(Self(command.spawn().with_context(|| format!("cannot run {program}: is it in PATH?"))?))
    }

    /// Its id.
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.0)
    }

    /// Its standard input, if that is a pipe; once.
    pub fn stdin(&mut self) -> Result<ChildStdin> {
        self.0.stdin.take().context("no stdin")
    }

    /// Its standard output, if that is a pipe; once.
    pub fn stdout(&mut self) -> Result<ChildStdout> {
        self.0.stdout.take().context("no stdout")
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        ensure!(ends(self.pid())?, "it did not end within {} s", LIMIT.as_secs());
        Ok(self.0.wait()?)
    }

    /// Kills it.
    pub fn kill(&mut self) -> Result<()> {
        Ok(self.0.kill()?)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // One that has been waited for needs neither.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits for the end of a process; true if it came.
pub fn ends(pid: Pid) -> Result<bool> {
    let process = match pidfd_open(pid, PidfdFlags::empty()) {
        Err(rustix::io::Errno::SRCH) => return Ok(true),
        process => process?,
    };
    let limit = Timespec { tv_sec: LIMIT.as_secs().cast_signed(), tv_nsec: 0 };
    Ok(poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&limit))? > 0)
}

/// Asks for an exit code and both outputs.
pub fn expect(output: &Output, code: i32, stdout: &str, stderr: &str) -> Result<Verdict> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    ensure!(output.status.code() == Some(code), "{} instead of {code}; stderr:\n{err}", output.status);
    ensure!(out == stdout, "stdout {out:?} instead of {stdout:?}; stderr:\n{err}");
    ensure!(err.contains(stderr), "stderr {err:?} does not say {stderr:?}");
    Ok(Verdict::Passed)
}

/// Says that something was refused: exit code 1, nothing on stdout, and on stderr nothing but one message of katavm
/// that has all of the `words`.
pub fn refused(output: &Output, words: &[&str]) -> Result<Verdict> {
    expect(output, 1, "", "")?;
    let message = String::from_utf8_lossy(&output.stderr);
    ensure!(message.starts_with("katavm: ") && message.lines().count() == 1, "not one message: {message:?}");
    for word in words {
        ensure!(message.contains(word), "{message:?} does not say {word:?}");
    }
    Ok(Verdict::Passed)
}
