//! What travels between the lab and the outside: one virtio-serial port per stream, and one for messages.
//!
//! A stream is cut into frames: a 32-bit little-endian length and that many bytes; length 0 is the end of the
//! stream. (The ports themselves cannot say "end of file" reliably.) A message is one frame of JSON.

use std::io::{self, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The ports' names, and so their order.
pub const PORTS: [&str; 4] = ["katavm.control", "katavm.stdin", "katavm.stdout", "katavm.stderr"];

/// The longest frame that is accepted.
pub const MAX_FRAME: usize = 1 << 20;

/// From the lab to the outside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromLab {
    /// The command runs from now on; the machine needed this many milliseconds of its own time to get here.
    Started {
        /// Milliseconds since the kernel's start.
        uptime_ms: u64,
    },
    /// The machine lives.
    Alive,
    /// The command ended, all its output was sent and what it wrote is outside.
    Exited {
        /// Its exit code, 128 + n for signal n.
        code: i32,
    },
    /// The machine could not be set up.
    Failed {
        /// Why.
        reason: String,
    },
}

/// From the outside to the lab.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToLab {
    /// The terminal has a new size.
    Resize {
        /// Rows.
        rows: u16,
        /// Columns.
        columns: u16,
    },
}

/// Writes one frame.
///
/// # Errors
/// Whatever the writer says.
pub fn write_frame(writer: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    let length = u32::try_from(bytes.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // In one piece: each write is an exit to QEMU.
    let mut frame = Vec::with_capacity(bytes.len() + 4);
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(bytes);
    writer.write_all(&frame)
}

/// Reads one frame into `buffer`; false at the end of the stream.
///
/// # Errors
/// Whatever the reader says, also when it ends without the last frame.
pub fn read_frame(reader: &mut impl Read, buffer: &mut Vec<u8>) -> io::Result<bool> {
    let mut length = [0; 4];
    reader.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_FRAME {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a frame of {length} bytes")));
    }
    buffer.resize(length, 0);
    reader.read_exact(buffer)?;
    Ok(length > 0)
}

/// Sends a message.
///
/// # Errors
/// Whatever the writer says.
pub fn send<T: Serialize>(writer: &mut impl Write, message: &T) -> io::Result<()> {
    write_frame(writer, &serde_json::to_vec(message)?)
}

/// Receives a message; nothing at the end of the stream.
///
/// # Errors
/// Whatever the reader says, or when it is no such message.
pub fn receive<T: DeserializeOwned>(reader: &mut impl Read) -> io::Result<Option<T>> {
    let mut buffer = Vec::new();
    if !read_frame(reader, &mut buffer)? {
        return Ok(None);
    }
    Ok(Some(serde_json::from_slice(&buffer)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_keep_bytes_and_end() {
        let mut wire = Vec::new();
        write_frame(&mut wire, b"\0\xff\n").unwrap();
        write_frame(&mut wire, b"").unwrap();
        let (mut reader, mut buffer) = (wire.as_slice(), Vec::new());
        assert!(read_frame(&mut reader, &mut buffer).unwrap());
        assert_eq!(buffer, b"\0\xff\n");
        assert!(!read_frame(&mut reader, &mut buffer).unwrap());
        assert_eq!(read_frame(&mut reader, &mut buffer).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_frame_too_long_is_refused() {
        let wire = u32::MAX.to_le_bytes();
        assert_eq!(read_frame(&mut wire.as_slice(), &mut Vec::new()).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn messages_survive_the_trip() {
        let mut wire = Vec::new();
        for message in [FromLab::Started { uptime_ms: 1500 }, FromLab::Exited { code: 137 }] {
            send(&mut wire, &message).unwrap();
        }
        let mut reader = wire.as_slice();
        assert_eq!(receive::<FromLab>(&mut reader).unwrap(), Some(FromLab::Started { uptime_ms: 1500 }));
        assert_eq!(receive::<FromLab>(&mut reader).unwrap(), Some(FromLab::Exited { code: 137 }));
    }
}
