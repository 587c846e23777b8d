//! The agent's ends of a process' streams, and who has connected them.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use katavm_protocol::agent::{Stdio, StreamKind};
use nix::fcntl::OFlag;
use nix::unistd::{Gid, Uid, fchown, pipe2};

use super::pump::End;
use crate::error::Error;

/// What the process is given as its standard streams; `None` is /dev/null.
#[derive(Default)]
pub struct Pipes {
    /// Descriptor 0.
    pub stdin: Option<OwnedFd>,
    /// Descriptor 1.
    pub stdout: Option<OwnedFd>,
    /// Descriptor 2.
    pub stderr: Option<OwnedFd>,
}

#[derive(Default)]
struct Waiting {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    terminal: Option<Arc<OwnedFd>>,
    terminal_connected: bool,
    stdin_connection: Option<UnixStream>,
}

/// The agent's ends.
#[derive(Default)]
pub struct Ends(Mutex<Waiting>);

impl Ends {
    /// Pipes for the streams that `stdio` asks for, owned by the process' user so that it can open /dev/stdout anew.
    ///
    /// # Errors
    /// Those of pipe2(2) and fchown(2).
    pub fn pipes(stdio: &Stdio, uid: u32, gid: u32) -> io::Result<(Self, Pipes)> {
        let mut waiting = Waiting::default();
        let mut pipes = Pipes::default();
        let owned = |end: &OwnedFd| fchown(end, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
        if stdio.stdin {
            let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
            owned(&read)?;
            (pipes.stdin, waiting.stdin) = (Some(read), Some(write));
        }
        for (wanted, inner, outer) in [
            (stdio.stdout, &mut pipes.stdout, &mut waiting.stdout),
            (stdio.stderr, &mut pipes.stderr, &mut waiting.stderr),
        ] {
            if wanted {
                let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
                owned(&write)?;
                (*inner, *outer) = (Some(write), Some(read));
            }
        }
        Ok((Self(Mutex::new(waiting)), pipes))
    }

    /// Keeps the master of the process' terminal.
    pub fn set_terminal(&self, master: OwnedFd) {
        crate::lock(&self.0).terminal = Some(Arc::new(master));
    }

    /// The master of the process' terminal, if it has one.
    pub fn terminal(&self) -> Option<Arc<OwnedFd>> {
        crate::lock(&self.0).terminal.clone()
    }

    /// Takes the end of one stream, which can be connected once.
    ///
    /// # Errors
    /// There is no such stream, or it is or was connected.
    pub fn connect(&self, kind: StreamKind, connection: &UnixStream) -> Result<End, Error> {
        let mut waiting = crate::lock(&self.0);
        let end = match kind {
            StreamKind::STREAM_KIND_STDIN => {
                let end = waiting.stdin.take().map(End::Stdin);
                if end.is_some() {
                    waiting.stdin_connection = connection.try_clone().ok();
                }
                end
            }
            StreamKind::STREAM_KIND_STDOUT => waiting.stdout.take().map(End::Output),
            StreamKind::STREAM_KIND_STDERR => waiting.stderr.take().map(End::Output),
            StreamKind::STREAM_KIND_TERMINAL if !waiting.terminal_connected => {
                waiting.terminal_connected = waiting.terminal.is_some();
                waiting.terminal.clone().map(End::Terminal)
            }
            _ => None,
        };
        end.ok_or_else(|| Error::State(format!("{kind:?} was not asked for, or was connected before")))
    }

    /// Gives an unconnected standard input its end of file. A connected one ends when the host shuts it down, in
    /// order with what was sent before.
    pub fn close_stdin(&self) {
        crate::lock(&self.0).stdin = None;
    }

    /// The process has ended: what still waits for input to it need not.
    pub fn process_ended(&self) {
        let mut waiting = crate::lock(&self.0);
        waiting.stdin = None;
        if let Some(connection) = waiting.stdin_connection.take() {
            // One that is closed already needs no shutdown.
            let _ = connection.shutdown(std::net::Shutdown::Both);
        }
    }
}

/// A duplicate for another thread.
pub fn duplicate(fd: impl AsFd) -> io::Result<OwnedFd> {
    fd.as_fd().try_clone_to_owned()
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn stdio() -> Stdio {
        Stdio { stdin: true, stdout: true, ..Default::default() }
    }

    #[test]
    fn a_stream_connects_once_and_only_if_asked_for() {
        let (ends, _pipes) = Ends::pipes(&stdio(), 0, 0).unwrap();
        let (one, _other) = UnixStream::pair().unwrap();
        assert!(ends.connect(StreamKind::STREAM_KIND_STDOUT, &one).is_ok());
        for kind in [
            StreamKind::STREAM_KIND_STDOUT,
            StreamKind::STREAM_KIND_STDERR,
            StreamKind::STREAM_KIND_TERMINAL,
            StreamKind::STREAM_KIND_UNSPECIFIED,
        ] {
            assert!(matches!(ends.connect(kind, &one), Err(Error::State(_))), "{kind:?}");
        }
    }

    #[test]
    fn closing_an_unconnected_stdin_is_its_end_of_file() {
        let (ends, pipes) = Ends::pipes(&stdio(), 0, 0).unwrap();
        ends.close_stdin();
        let mut stdin = std::fs::File::from(pipes.stdin.unwrap());
        assert_eq!(stdin.read(&mut [0; 8]).unwrap(), 0);
    }

    #[test]
    fn output_waits_for_the_connection_and_arrives_whole() {
        let (ends, pipes) = Ends::pipes(&stdio(), 0, 0).unwrap();
        let data: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
        let writer = std::thread::spawn({
            let data = data.clone();
            move || std::fs::File::from(pipes.stdout.unwrap()).write_all(&data).unwrap()
        });
        let (agent, mut host) = UnixStream::pair().unwrap();
        let end = ends.connect(StreamKind::STREAM_KIND_STDOUT, &agent).unwrap();
        let pump = std::thread::spawn(move || super::super::pump::run(end, agent));
        let mut received = Vec::new();
        host.read_to_end(&mut received).unwrap();
        assert!(received == data, "{} of {} bytes", received.len(), data.len());
        writer.join().unwrap();
        pump.join().unwrap();
    }
}
