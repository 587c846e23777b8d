//! `binary://`: a program that takes a container's output by descriptors (containerd's contract for logging binaries).

use std::io::{self, PipeReader, Read as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Pid;

use super::uri::Uri;
use crate::host;

/// How long it may take to get ready.
const READY_PATIENCE: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };
/// How long it may take to end when its input has.
const END_PATIENCE: Duration = Duration::from_secs(10);
/// Its descriptors: what the container writes to standard output and standard error, and where it says that it is ready.
const DESCRIPTORS: [i32; 3] = [3, 4, 5];

/// A program that runs. It ends with its input; dropping this sees to it without waiting.
#[derive(Debug)]
pub struct Logger {
    /// Nothing once it was waited for.
    child: Option<Child>,
}

impl Logger {
    /// Starts it for container `id` of `namespace`; what the container writes goes to the descriptors beside it.
    ///
    /// # Errors
    /// That it cannot be started, or does not get ready.
    pub fn start(uri: &Uri, namespace: &str, id: &str) -> io::Result<(Self, OwnedFd, OwnedFd)> {
        let ((stdout, to_stdout), (stderr, to_stderr)) = (io::pipe()?, io::pipe()?);
        let (ready, tell_ready) = io::pipe()?;
        let given: [OwnedFd; 3] = [above(stdout.into())?, above(stderr.into())?, above(tell_ready.into())?];
        let mut command = Command::new(&uri.path);
        for (key, value) in &uri.query {
            command.arg(key).args((!value.is_empty()).then_some(value));
        }
        command.env_clear().env("CONTAINER_ID", id).env("CONTAINER_NAMESPACE", namespace);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // SAFETY: dup2(2) is async-signal-safe (signal-safety(7)); the descriptors are open until the process is made, and
        // none of them has one of the numbers that are written to.
        unsafe {
            command.pre_exec(move || {
                for (fd, number) in given.iter().zip(DESCRIPTORS) {
                    if libc::dup2(fd.as_raw_fd(), number) < 0 {
                        return Err(io::Error::last_os_error());
                    }
                }
                Ok(())
            })
        };
        let child = host::spawn(&mut command)?;
        // Its ends of the pipes are closed here.
        drop(command);
        // When it does not get ready, its input ends here, and it with that.
        let logger = Self { child: Some(child) };
        wait_until_ready(ready, uri.scheme == "binary-v2")?;
        Ok((logger, to_stdout.into(), to_stderr.into()))
    }

    /// Waits for its end, which comes with that of its input, and kills it if it takes too long.
    pub fn end(mut self) {
        self.child.iter().for_each(end);
        self.child = None;
    }
}

impl Drop for Logger {
    fn drop(&mut self) {
        if let Some(child) = self.child.take() {
            thread::spawn(move || end(&child));
        }
    }
}

fn end(child: &Child) {
    if let Err(error) = host::kill_and_reap(Pid::from_child(child), END_PATIENCE) {
        log::warn!("a logger: {error}");
    }
}

/// The same descriptor with a number above those that a logger expects.
fn above(fd: OwnedFd) -> io::Result<OwnedFd> {
    Ok(rustix::io::fcntl_dupfd_cloexec(&fd, 10)?)
}

/// It says so by a byte; the first version may close the descriptor as well.
fn wait_until_ready(mut ready: PipeReader, wants_byte: bool) -> io::Result<()> {
    if poll(&mut [PollFd::new(&ready, PollFlags::IN)], Some(&READY_PATIENCE))? == 0 {
        return Err(io::Error::new(io::ErrorKind::TimedOut, "it does not say that it is ready (descriptor 5)"));
    }
    match ready.read(&mut [0])? {
        0 if wants_byte => Err(io::Error::other("it has closed descriptor 5 without a word")),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::Write as _;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn program(text: &str) -> (tempfile::TempDir, Uri) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("logger");
        fs::write(&path, format!("#!/bin/sh\nPATH=/usr/bin:/bin\n{text}")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let uri = Uri::of(&format!("binary://{}?out={}/log&flag", path.display(), folder.path().display()));
        (folder, uri)
    }

    #[test]
    fn a_logger_gets_both_streams() {
        let text = "echo x >&5; exec 5>&-; { echo $CONTAINER_NAMESPACE $CONTAINER_ID $3; cat <&3; cat <&4; } >$2";
        let (folder, uri) = program(text);
        let (logger, stdout, stderr) = Logger::start(&uri, "n", "c1").unwrap();
        File::from(stdout).write_all(b"out\n").unwrap();
        File::from(stderr).write_all(b"err\n").unwrap();
        logger.end();
        assert_eq!(fs::read_to_string(folder.path().join("log")).unwrap(), "n c1 flag\nout\nerr\n");
    }

    #[test]
    fn one_that_does_not_get_ready_is_told() {
        let (_folder, mut uri) = program("exit 3");
        drop(Logger::start(&uri, "n", "c1").unwrap());
        uri.scheme = "binary-v2".into();
        assert!(Logger::start(&uri, "n", "c1").is_err_and(|error| error.to_string().contains("without a word")));
        uri.path = "/nonexistent".into();
        assert!(Logger::start(&uri, "n", "c1").is_err_and(|error| error.kind() == io::ErrorKind::NotFound));
    }
}
