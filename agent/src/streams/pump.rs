//! Moving bytes between a stream's end and its connection: the reader waits for the writer, nothing is dropped.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

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
        End::Stdin(pipe) => copy(&connection, File::from(pipe)),
        End::Output(pipe) => copy(File::from(pipe), &connection),
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
