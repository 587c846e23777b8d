//! Connections between guest and host: what one end asks for, and the other does.

use std::fs::File;
use std::io::{self, Read, Write};
use std::thread;

/// The port of the host.
pub const PORT: u32 = 7000;
/// What the threads of the host's end are called.
pub const THREAD: &str = "io-peer";

/// What a guest does with its connections.
#[derive(Clone, Copy, Debug)]
pub enum Exchange {
    /// A byte there and back.
    RoundTrips,
    /// Bytes to the host, over so many connections at once.
    Sends {
        /// How many.
        streams: usize,
    },
    /// Bytes from the host.
    Receives {
        /// Over how many connections at once.
        streams: usize,
    },
}

impl Exchange {
    /// How many connections it takes.
    #[must_use]
    pub fn streams(self) -> usize {
        match self {
            Self::RoundTrips => 1,
            Self::Sends { streams } | Self::Receives { streams } => streams,
        }
    }
}

const ECHO: u8 = b'e';
const SINK: u8 = b's';
const SOURCE: u8 = b'r';
/// Bytes of a system call.
const CHUNK: usize = 128 << 10;

/// The guest's part: `count` round trips, or `count` MiB over all `streams` together.
///
/// # Errors
/// Those of the connections.
pub fn ask(exchange: Exchange, count: usize, streams: &[File]) -> io::Result<()> {
    let bytes = ((count << 20) / streams.len()) as u64;
    let part = |stream: &File| match exchange {
        Exchange::RoundTrips => round_trips(stream, count),
        Exchange::Sends { .. } => {
            begin(stream, SINK, bytes)?;
            send(stream, bytes)?;
            // All of it has arrived when the host says so.
            (&*stream).read_exact(&mut [0])
        }
        Exchange::Receives { .. } => {
            begin(stream, SOURCE, bytes)?;
            receive(stream, bytes)
        }
    };
    thread::scope(|scope| {
        let others: Vec<_> = streams.iter().skip(1).map(|stream| scope.spawn(move || part(stream))).collect();
        let first = streams.first().map_or(Ok(()), part);
        others
            .into_iter()
            .map(|thread| thread.join().map_err(|_| io::Error::other("a thread died"))?)
            .fold(first, io::Result::and)
    })
}

/// The host's part of all connections that come: a thread for each.
///
/// # Errors
/// When there are no threads to be had.
pub fn serve(accept: impl Fn() -> Option<File> + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(THREAD.into()).spawn(move || {
        while let Some(stream) = accept() {
            // It ends with the connection, one way or the other.
            let answers = move || while answer(&stream).is_ok() {};
            if thread::Builder::new().name(THREAD.into()).spawn(answers).is_err() {
                return;
            }
        }
    })?;
    Ok(())
}

fn answer(stream: &File) -> io::Result<()> {
    let mut request = [0; 9];
    (&*stream).read_exact(&mut request)?;
    let [what, length @ ..] = request;
    let count = u64::from_le_bytes(length);
    match what {
        ECHO => (0..count).try_for_each(|_| {
            let mut byte = [0];
            (&*stream).read_exact(&mut byte)?;
            (&*stream).write_all(&byte)
        }),
        SINK => {
            receive(stream, count)?;
            (&*stream).write_all(&[SINK])
        }
        SOURCE => send(stream, count),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn begin(stream: &File, what: u8, count: u64) -> io::Result<()> {
    let mut request = [what; 9];
    request[1..].copy_from_slice(&count.to_le_bytes());
    (&*stream).write_all(&request)
}

fn round_trips(stream: &File, count: usize) -> io::Result<()> {
    begin(stream, ECHO, count as u64)?;
    (0..count).try_for_each(|_| {
        (&*stream).write_all(&[0])?;
        (&*stream).read_exact(&mut [0])
    })
}

fn send(stream: &File, bytes: u64) -> io::Result<()> {
    let chunk = vec![0x5a; CHUNK];
    let mut left = bytes as usize;
    while left > 0 {
        let length = left.min(CHUNK);
        (&*stream).write_all(&chunk[..length])?;
        left -= length;
    }
    Ok(())
}

fn receive(stream: &File, bytes: u64) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    let mut left = bytes as usize;
    while left > 0 {
        let length = left.min(CHUNK);
        let got = (&*stream).read(&mut chunk[..length])?;
        if got == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        left -= got;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn both_ends_agree() {
        let (ours, theirs): (Vec<_>, Vec<_>) = (0..3).map(|_| UnixStream::pair().unwrap()).unzip();
        let theirs = Mutex::new(theirs);
        serve(move || theirs.lock().unwrap().pop().map(|stream| File::from(OwnedFd::from(stream)))).unwrap();
        let ours: Vec<File> = ours.into_iter().map(|stream| File::from(OwnedFd::from(stream))).collect();
        // One after the other on the same connections.
        ask(Exchange::RoundTrips, 5, &ours[..1]).unwrap();
        ask(Exchange::Sends { streams: 3 }, 3, &ours).unwrap();
        ask(Exchange::Receives { streams: 3 }, 3, &ours).unwrap();
    }
}
