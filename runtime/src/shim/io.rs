//! A process' streams as containerd names them: named pipes that it reads, files, or a program that takes them.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::time::Duration;

use super::logger::Logger;
use super::uri::{FIFO, Uri};
use crate::pod::Io;
use crate::process::stdio::Inherited;

/// How long the news of an end wait for output that nobody reads: containerd may just be started again.
const PATIENCE: Duration = Duration::from_secs(10);

/// What containerd says about a process' streams; empty where there is none.
#[derive(Clone, Copy, Debug)]
pub struct Named<'a> {
    /// Standard input.
    pub stdin: &'a str,
    /// Standard output, or the terminal's.
    pub stdout: &'a str,
    /// Standard error.
    pub stderr: &'a str,
    /// Whether the process has a terminal.
    pub terminal: bool,
}

/// Opens them for container `id` of `namespace`; with the program that takes the output, if one is named.
///
/// # Errors
/// Which one cannot be opened.
pub fn open(named: Named<'_>, namespace: &str, id: &str) -> Result<(Io, Option<Logger>), String> {
    let stdin = match named.stdin {
        "" => None,
        name => Some(input(name).map_err(|error| format!("standard input {name}: {error}"))?),
    };
    let with_stderr = !named.terminal && !named.stderr.is_empty();
    let uri = Uri::of(named.stdout);
    if matches!(uri.scheme.as_str(), "binary" | "binary-v2") {
        let started = Logger::start(&uri, namespace, id);
        let (logger, stdout, stderr) = started.map_err(|error| format!("logger {}: {error}", uri.path.display()))?;
        let io = all(Inherited { stdin, stdout: Some(stdout), stderr: with_stderr.then_some(stderr) }, named.terminal);
        return Ok((io, Some(logger)));
    }
    let sink = |what: &str, name: &str| match name {
        "" => Ok(None),
        name => output(name).map(Some).map_err(|error| format!("{what} {name}: {error}")),
    };
    let stdout = sink("standard output", named.stdout)?;
    let stderr = if with_stderr { sink("standard error", named.stderr)? } else { None };
    let io = all(Inherited { stdin, stdout, stderr }, named.terminal);
    Ok((Io { lingers: uri.scheme == FIFO, ..io }, None))
}

fn all(stdio: Inherited, terminal: bool) -> Io {
    let io = if terminal { Io::guest_terminal(stdio) } else { Io::plain(stdio) };
    Io { patience: Some(PATIENCE), ..io }
}

/// A named pipe. It has no end before somebody has opened it to write, and it ends with the last who did, as with runc's
/// shim: some clients say nothing more.
fn input(name: &str) -> io::Result<OwnedFd> {
    let path = Uri::of(name).path;
    Ok(File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path)?.into())
}

fn output(name: &str) -> io::Result<OwnedFd> {
    let Uri { scheme, path, .. } = Uri::of(name);
    match scheme.as_str() {
        // Read and write: it neither waits for a reader nor ends with one, so containerd may start again meanwhile.
        FIFO => {
            let mut options = File::options();
            options.read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
            Ok(options.open(path)?.into())
        }
        "file" => {
            if let Some(folder) = path.parent() {
                std::fs::create_dir_all(folder)?;
            }
            Ok(File::options().append(true).create(true).mode(0o644).open(path)?.into())
        }
        scheme => {
            let reason = format!("{scheme}:// is not supported: a named pipe, file:// and binary:// are");
            Err(io::Error::new(io::ErrorKind::Unsupported, reason))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::path::Path;

    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;

    fn fifo(folder: &Path, name: &str) -> String {
        let path = folder.join(name);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        path.to_str().unwrap().to_owned()
    }

    #[test]
    fn pipes_are_opened_without_anybody_at_the_other_end() {
        let folder = tempfile::tempdir().unwrap();
        let (stdin, stdout) = (fifo(folder.path(), "in"), fifo(folder.path(), "out"));
        let stdin_path = stdin.clone();
        let named = Named { stdin: &stdin, stdout: &stdout, stderr: "", terminal: false };
        let (io, _) = open(named, "n", "c1").unwrap();
        assert!(io.stdio.stderr.is_none() && !io.has_terminal);
        let stdin = io.stdio.stdin.unwrap();
        let told = |fd: &OwnedFd| {
            let mut fds = [PollFd::new(fd, PollFlags::IN)];
            poll(&mut fds, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
        };
        assert!(!told(&stdin), "it ends before anybody has written");
        let mut client = File::options().write(true).open(stdin_path).unwrap();
        client.write_all(b"in").unwrap();
        drop(client);
        assert!(told(&stdin));
        let mut text = String::new();
        File::from(stdin).read_to_string(&mut text).unwrap();
        assert_eq!(text, "in");
    }

    #[test]
    fn files_are_appended_to_and_the_rest_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("logs/x");
        let name = format!("file://{}", path.display());
        for text in ["a", "b"] {
            File::from(output(&name).unwrap()).write_all(text.as_bytes()).unwrap();
        }
        assert_eq!(std::fs::read_to_string(path).unwrap(), "ab");
        let error = output("ttrpc+unix:///x").unwrap_err().to_string();
        assert!(error.contains("ttrpc+unix://"), "{error}");
    }
}
