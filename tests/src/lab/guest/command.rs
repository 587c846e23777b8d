//! Starting the command, on pipes or on a terminal.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};

use anyhow::{Context, Result};
use nix::libc;
use nix::pty::{Winsize, openpty};

use crate::lab::job::Job;

/// A started command and our ends of its streams.
pub struct Running {
    /// The process.
    pub child: Child,
    /// Write its input here.
    pub stdin: File,
    /// Read its output here.
    pub stdout: OwnedFd,
    /// And its errors here; none on a terminal.
    pub stderr: Option<OwnedFd>,
    /// The terminal, for its size.
    pub terminal: Option<File>,
}

/// Starts the job's command.
pub fn start(job: &Job) -> Result<Running> {
    let (program, arguments) = job.argv.split_first().context("no command")?;
    let mut command = Command::new(program);
    command.args(arguments).env_clear().envs(job.env.iter().map(|(name, value)| (name, value))).current_dir(&job.cwd);
    let running = match job.terminal {
        Some((rows, columns)) => on_terminal(&mut command, rows, columns),
        None => on_pipes(&mut command),
    };
    running.with_context(|| format!("cannot run {program}"))
}

fn on_pipes(command: &mut Command) -> Result<Running> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn()?;
    let (Some(stdin), Some(stdout), Some(stderr)) = (child.stdin.take(), child.stdout.take(), child.stderr.take())
    else {
        unreachable!("all three were asked for");
    };
    Ok(Running {
        child,
        stdin: OwnedFd::from(stdin).into(),
        stdout: stdout.into(),
        stderr: Some(stderr.into()),
        terminal: None,
    })
}

fn on_terminal(command: &mut Command, rows: u16, columns: u16) -> Result<Running> {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    let pty = openpty(&size, None)?;
    command.stdin(pty.slave.try_clone()?).stdout(pty.slave.try_clone()?).stderr(pty.slave);
    // SAFETY: between fork and exec only setsid and ioctl are called, which are async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            nix::unistd::setsid()?;
            // SAFETY: TIOCSCTTY takes an integer; stdin is the terminal's slave.
            nix::errno::Errno::result(libc::ioctl(0, libc::TIOCSCTTY, 0))?;
            Ok(())
        });
    }
    let child = command.spawn()?;
    Ok(Running {
        child,
        stdin: pty.master.try_clone()?.into(),
        stdout: pty.master.try_clone()?,
        stderr: None,
        terminal: Some(pty.master.into()),
    })
}

/// Sets the terminal's size; its foreground processes get SIGWINCH.
pub fn resize(terminal: &File, rows: u16, columns: u16) {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one winsize from the pointer, which is valid for it. A failure leaves the old size.
    unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
}

/// As a shell would say it: 128 + n for signal n.
pub fn exit_code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}
