//! What another program writes, read for a limited time and to a limited size.

use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::termios::isatty;

/// What is read at once.
const PIECE: usize = 4096;

/// What could be read.
#[derive(Debug, PartialEq, Eq)]
pub struct Input {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// Whether these are all: the writer has ended, in time and within the limit.
    pub whole: bool,
}

/// Reads a stream to its end, for no longer than `patience` and no more than `most` bytes.
///
/// # Errors
/// Those of poll(2) and read(2).
pub fn read(stream: impl AsFd, most: usize, patience: Duration) -> io::Result<Input> {
    let mut file = std::fs::File::from(stream.as_fd().try_clone_to_owned()?);
    let (start, mut bytes, mut piece) = (Instant::now(), Vec::new(), [0; PIECE]);
    while bytes.len() <= most && is_readable(&file, patience.saturating_sub(start.elapsed()))? {
        match file.read(&mut piece) {
            Ok(0) => return Ok(Input { bytes, whole: true }),
            Ok(count) => bytes.extend(piece.iter().take(count)),
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(most);
    Ok(Input { bytes, whole: false })
}

/// What was written to this program's standard input; nothing on a terminal, where a person is.
///
/// # Errors
/// Those of [`read`].
pub fn read_stdin(most: usize, patience: Duration) -> io::Result<Input> {
    let stdin: OwnedFd = io::stdin().as_fd().try_clone_to_owned()?;
    match isatty(&stdin) {
        true => Ok(Input { bytes: Vec::new(), whole: true }),
        false => read(stdin, most, patience),
    }
}

fn is_readable(stream: impl AsFd, patience: Duration) -> io::Result<bool> {
    let patience = Timespec { tv_sec: patience.as_secs().cast_signed(), tv_nsec: patience.subsec_nanos().into() };
    let ready = retry_on_intr(|| poll(&mut [PollFd::new(&stream, PollFlags::IN)], Some(&patience)))?;
    Ok(ready > 0)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn a_writer_that_ends_is_read_to_its_end() {
        let (reader, mut writer) = io::pipe().unwrap();
        writer.write_all(&[7; 10_000]).unwrap();
        drop(writer);
        let input = read(&reader, 10_000, Duration::from_secs(60)).unwrap();
        assert_eq!(input, Input { bytes: vec![7; 10_000], whole: true });
    }

    #[test]
    fn a_writer_that_goes_on_is_left_alone() {
        let (reader, mut writer) = io::pipe().unwrap();
        writer.write_all(b"some").unwrap();
        let input = read(&reader, 100, Duration::from_millis(20)).unwrap();
        assert_eq!(input, Input { bytes: b"some".into(), whole: false });
        let zeroes = std::fs::File::open("/dev/zero").unwrap();
        let input = read(&zeroes, 5000, Duration::from_secs(60)).unwrap();
        assert_eq!(input, Input { bytes: vec![0; 5000], whole: false });
    }
}
