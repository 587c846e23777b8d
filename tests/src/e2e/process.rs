//! A `katavm` that runs, for cases that do more to it than wait for it.

use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

/// A started process whose output is collected. Dropping it kills it.
pub struct Started {
    child: Child,
    stdout: Collector,
    stderr: Collector,
}

/// How it went.
pub struct Finished {
    /// As wait(2) told.
    pub status: ExitStatus,
    /// All of its standard output.
    pub stdout: String,
    /// All of its standard error.
    pub stderr: String,
}

impl Started {
    /// `katavm` with these arguments.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn katavm<S: AsRef<OsStr>>(arguments: &[S]) -> Result<Self> {
        let mut command = Command::new("katavm");
        command.args(arguments);
        Self::spawn(&mut command)
    }

    /// Any command, with nothing on its standard input.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(command: &mut Command) -> Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("cannot run {command:?}: is it in PATH?"))?;
        let stdout = Collector::of(child.stdout.take().context("no stdout")?);
        let stderr = Collector::of(child.stderr.take().context("no stderr")?);
        Ok(Self { child, stdout, stderr })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The watcher, while there is one.
    pub fn watcher(&self) -> Option<Pid> {
        let id = self.id();
        let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap_or_default();
        let named = |pid: &&str| {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim_end() == "katavm-watcher")
        };
        let pid = children.split_ascii_whitespace().find(named)?;
        Pid::from_raw(pid.parse().ok()?)
    }

    /// Sends it a signal; one that has ended needs none.
    pub fn signal(&self, signal: Signal) {
        // Not reaped before `finish`, so the number is still its own.
        let _ = kill_process(Pid::from_child(&self.child), signal);
    }

    /// Waits until its standard output has `words`.
    ///
    /// # Errors
    /// When that ends, or `limit` passes, before.
    pub fn read_until(&self, words: &str, limit: Duration) -> Result<()> {
        if self.stdout.wait_for(words, limit) {
            return Ok(());
        }
        bail!("no {words:?}; stdout:\n{}\nstderr:\n{}", self.stdout.text(), self.stderr.text())
    }

    /// Waits for its end, for at most `limit`.
    ///
    /// # Errors
    /// When it goes on: it is killed then.
    pub fn finish(mut self, limit: Duration) -> Result<Finished> {
        let pidfd = pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty())?;
        let timeout = Timespec { tv_sec: limit.as_secs().cast_signed(), tv_nsec: 0 };
        let ended = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout))? == 1;
        ensure!(
            ended,
            "still running after {} s; stdout:\n{}\nstderr:\n{}",
            limit.as_secs(),
            self.stdout.text(),
            self.stderr.text()
        );
        let status = self.child.wait()?;
        Ok(Finished { status, stdout: self.stdout.whole(limit), stderr: self.stderr.whole(limit) })
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        // One that was waited for is left alone by both.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Finished {
    /// Whether a SIGKILL ended it.
    pub fn was_killed(&self) -> bool {
        self.status.signal() == Some(Signal::KILL.as_raw())
    }

    /// Asks for an exit code and words on standard error.
    ///
    /// # Errors
    /// What is otherwise.
    pub fn expect(&self, code: i32, stderr: &[&str]) -> Result<()> {
        ensure!(self.status.code() == Some(code), "{} instead of {code}:\n{}", self.status, self.stderr);
        for words in stderr {
            ensure!(self.stderr.contains(words), "stderr does not say {words:?}:\n{}", self.stderr);
        }
        Ok(())
    }
}

#[derive(Default)]
struct Collected {
    bytes: Vec<u8>,
    ended: bool,
}

/// Reads a pipe to its end.
#[derive(Clone, Default)]
struct Collector(Arc<(Mutex<Collected>, Condvar)>);

impl Collector {
    fn of(mut pipe: impl Read + Send + 'static) -> Self {
        let collector = Self::default();
        let writer = collector.clone();
        thread::spawn(move || {
            let mut buffer = vec![0; 64 << 10];
            loop {
                // An error is an end as well: there is nobody to tell but the case, which sees what is missing.
                let len = pipe.read(&mut buffer).unwrap_or(0);
                let mut collected = writer.lock();
                collected.bytes.extend_from_slice(&buffer[..len]);
                collected.ended = len == 0;
                writer.0.1.notify_all();
                if len == 0 {
                    return;
                }
            }
        });
        collector
    }

    fn lock(&self) -> MutexGuard<'_, Collected> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.lock().bytes).into_owned()
    }

    fn wait_for(&self, words: &str, limit: Duration) -> bool {
        self.wait(limit, |collected| String::from_utf8_lossy(&collected.bytes).contains(words))
    }

    /// To the end; a process that was left behind may hold the pipe open, which is for others to find.
    fn whole(&self, limit: Duration) -> String {
        self.wait(limit, |_| false);
        self.text()
    }

    /// Waits for a condition; false when the pipe ended, or `limit` passed, before.
    fn wait(&self, limit: Duration, condition: impl Fn(&Collected) -> bool) -> bool {
        let end = Instant::now() + limit;
        let mut collected = self.lock();
        loop {
            if condition(&collected) {
                return true;
            }
            let left = end.saturating_duration_since(Instant::now());
            if collected.ended || left.is_zero() {
                return false;
            }
            collected = self.0.1.wait_timeout(collected, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
