//! Moving bytes between a stream's end and its connection: the reader waits for the writer, nothing is dropped.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::ends::duplicate;

/// Bytes that are moved at once; as many as a pipe holds.
const CHUNK: usize = 64 * 1024;

/// The agent's end of one stream.
pub enum End {
    /// A pipe to write to.
    Stdin(OwnedFd),
    /// A pipe to read from.
    Output(OwnedFd),
    /// A terminal's master, both ways.
    Terminal(Arc<OwnedFd>),
}

/// Moves bytes until the stream has ended, and shuts the connection down then.
pub fn run(end: End, connection: UnixStream) {
    let result = match end {
        // Not by splice(2): it would hold the pipe's lock while it waits for the host, and the process could not even end.
        End::Stdin(pipe) => copy(&connection, File::from(pipe)),
        End::Output(pipe) => splice(&pipe, &connection).and_then(|()| copy(File::from(pipe), &connection)),
        End::Terminal(master) => terminal(&master, &connection),
    };
    // What the peer has closed already needs no shutdown.
    let _ = connection.shutdown(Shutdown::Both);
    if let Err(error) = result {
        crate::debug!("a stream ended early: {error}");
    }
}

fn terminal(master: &OwnedFd, connection: &UnixStream) -> io::Result<()> {
    let input = File::from(duplicate(master)?);
    let output = File::from(duplicate(master)?);
    let from_host = connection.try_clone()?;
    super::spawn("terminal", move || {
        if let Err(error) = copy(from_host, input) {
            crate::debug!("a terminal's input ended early: {error}");
        }
    })?;
    copy(output, connection)
}

/// Moves bytes from a pipe inside the kernel (splice(2)), until the end, or until the kernel cannot.
///
/// splice holds the pipe's lock while it sends, and a process that wants the lock cannot be killed: so the sending must
/// not wait, and this waits for the connection without the lock.
fn splice(pipe: &OwnedFd, connection: &UnixStream) -> io::Result<()> {
    connection.set_nonblocking(true)?;
    loop {
        let (from, to) = (pipe.as_raw_fd(), connection.as_raw_fd());
        let (none, flags) = (std::ptr::null_mut(), libc::SPLICE_F_MOVE);
        // SAFETY: neither offset is passed, the rest are numbers.
        match Errno::result(unsafe { libc::splice(from, none, to, none, CHUNK, flags) }) {
            // At the end `copy` finds the end as well.
            Ok(0) | Err(Errno::EINVAL | Errno::EOPNOTSUPP) => break,
            Ok(_) | Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => {
                poll(&mut [PollFd::new(connection.as_fd(), PollFlags::POLLOUT)], PollTimeout::NONE)?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    connection.set_nonblocking(false)
}

fn copy(mut from: impl Read, mut to: impl Write) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        let len = match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(len) => len,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            // A terminal's master says this when the last process has closed the terminal.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => return Ok(()),
            Err(error) => return Err(error),
        };
        to.write_all(buffer.get(..len).unwrap_or_default())?;
    }
}
