//! Frames: a little-endian u32 length and that many bytes of one message.

use std::io::{self, Read, Write};

use protobuf::Message;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// No message that travels in a frame is longer, in bytes: the reader's allocation is bounded by it.
pub const MAX_LEN: u32 = 64 * 1024;

/// The bytes of `message` in a frame.
///
/// # Errors
/// `InvalidInput` when the message is longer than [`MAX_LEN`].
pub fn encode(message: &impl Message) -> io::Result<Vec<u8>> {
    let body = message.write_to_bytes().map_err(io::Error::other)?;
    let len = u32::try_from(body.len()).ok().filter(|len| *len <= MAX_LEN);
    let len = len.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "message too long for a frame"))?;
    let mut frame = len.to_le_bytes().to_vec();
    frame.extend(body);
    Ok(frame)
}

/// The length that a frame's first four bytes announce.
///
/// # Errors
/// `InvalidData` when it is above [`MAX_LEN`].
pub fn body_len(head: [u8; 4]) -> io::Result<usize> {
    let len = u32::from_le_bytes(head);
    if len > MAX_LEN {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a frame of {len} bytes, {MAX_LEN} at most")));
    }
    Ok(len as usize)
}

/// The message that a frame's body holds.
///
/// # Errors
/// `InvalidData` when the bytes are no such message.
pub fn decode<M: Message>(body: &[u8]) -> io::Result<M> {
    M::parse_from_bytes(body).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// Writes one frame, blocking.
///
/// # Errors
/// Those of [`encode`] and of the writer.
pub fn write(writer: &mut impl Write, message: &impl Message) -> io::Result<()> {
    writer.write_all(&encode(message)?)
}

/// Reads one frame, blocking.
///
/// # Errors
/// Those of the reader, [`body_len`] and [`decode`].
pub fn read<M: Message>(reader: &mut impl Read) -> io::Result<M> {
    let mut head = [0; 4];
    reader.read_exact(&mut head)?;
    let mut body = vec![0; body_len(head)?];
    reader.read_exact(&mut body)?;
    decode(&body)
}

/// Writes one frame.
///
/// # Errors
/// Those of [`encode`] and of the writer.
pub async fn send(writer: &mut (impl AsyncWrite + Unpin), message: &impl Message) -> io::Result<()> {
    writer.write_all(&encode(message)?).await
}

/// Reads one frame. Bytes are lost when the future is dropped.
///
/// # Errors
/// Those of the reader, [`body_len`] and [`decode`].
pub async fn receive<M: Message>(reader: &mut (impl AsyncRead + Unpin)) -> io::Result<M> {
    let mut head = [0; 4];
    reader.read_exact(&mut head).await?;
    let mut body = vec![0; body_len(head)?];
    reader.read_exact(&mut body).await?;
    decode(&body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::StreamHello;

    #[test]
    fn a_frame_comes_back_as_it_went() {
        let hello = StreamHello { container_id: "c1".into(), ..Default::default() };
        let bytes = encode(&hello).unwrap();
        assert_eq!(read::<StreamHello>(&mut bytes.as_slice()).unwrap(), hello);
    }

    #[test]
    fn a_long_frame_is_refused_before_it_is_read() {
        let error = read::<StreamHello>(&mut [0xff; 4].as_slice()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
