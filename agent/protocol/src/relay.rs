//! A TCP connection that goes on over another stream: what both ends of such a stream do.
//!
//! A stream between host and guest says that it has ended, not whether it was broken off. So each direction is a
//! sequence of chunks: a little-endian u32 length and that many bytes. A length of 0 is the orderly end of the
//! direction, and anything else that ends it means that the TCP connection was reset.

use std::io::{self, ErrorKind};
use std::pin::pin;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest};
use tokio::net::tcp::ReadHalf;
use tokio::net::{TcpStream, UnixStream};

/// Bytes of one chunk at most.
pub const CHUNK: usize = 32 * 1024;
const HEAD: usize = 4;

/// Moves bytes both ways until both directions have ended, or until either side is reset; the other one is reset then.
///
/// # Errors
/// What broke the connection.
pub async fn relay(mut tcp: TcpStream, mut stream: UnixStream) -> io::Result<()> {
    // What was sent as one piece has waited for more of it already; without it, bytes are late and no more.
    let _ = tcp.set_nodelay(true);
    let outcome = both_ways(&mut tcp, &mut stream).await;
    if outcome.is_err() {
        // Closed with RST (socket(7), SO_LINGER of 0).
        let _ = tcp.set_zero_linger();
    }
    outcome
}

async fn both_ways(tcp: &mut TcpStream, stream: &mut UnixStream) -> io::Result<()> {
    let (from_tcp, to_tcp) = tcp.split();
    let (mut from_stream, to_stream) = stream.split();
    let mut outward = pin!(pack(&from_tcp, to_stream));
    {
        let mut inward = pin!(unpack(&mut from_stream, to_tcp));
        tokio::select! {
            unpacked = &mut inward => unpacked?,
            packed = &mut outward => {
                packed?;
                // There is nothing more to read, where a reset would show otherwise.
                return tokio::select! {
                    biased;
                    unpacked = inward => unpacked,
                    _ = from_tcp.ready(Interest::ERROR) => Err(ErrorKind::ConnectionReset.into()),
                };
            }
        }
    }
    // Their end has come, ours has not: they close now only if they were reset.
    let mut nothing = [0];
    tokio::select! {
        biased;
        packed = outward => packed,
        _ = from_stream.read(&mut nothing) => Err(ErrorKind::ConnectionReset.into()),
    }
}

/// Chunks of everything that comes.
async fn pack(from: &ReadHalf<'_>, mut to: impl AsyncWrite + Unpin) -> io::Result<()> {
    let mut buffer = vec![0; HEAD + CHUNK];
    loop {
        let (head, body) = buffer.split_at_mut(HEAD);
        from.readable().await?;
        let len = match from.try_read(body) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
            read => read?,
        };
        head.copy_from_slice(&(len as u32).to_le_bytes());
        to.write_all(buffer.get(..HEAD + len).unwrap_or_default()).await?;
        if len == 0 {
            return Ok(());
        }
    }
}

/// What is in the chunks, up to the orderly end.
async fn unpack(from: &mut (impl AsyncRead + Unpin), mut to: impl AsyncWrite + Unpin) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        let mut head = [0; HEAD];
        from.read_exact(&mut head).await?;
        let len = u32::from_le_bytes(head) as usize;
        if len == 0 {
            return to.shutdown().await;
        }
        let Some(chunk) = buffer.get_mut(..len) else {
            return Err(io::Error::new(ErrorKind::InvalidData, format!("a chunk of {len} bytes, {CHUNK} at most")));
        };
        from.read_exact(chunk).await?;
        to.write_all(chunk).await?;
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    async fn tcp_pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let one = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (one, listener.accept().await.unwrap().0)
    }

    /// Two TCP connections with the relay between them: a client's end and a server's.
    async fn relayed() -> (TcpStream, TcpStream, [tokio::task::JoinHandle<io::Result<()>>; 2]) {
        let (client, here) = tcp_pair().await;
        let (there, server) = tcp_pair().await;
        let (one, other) = UnixStream::pair().unwrap();
        (client, server, [tokio::spawn(relay(here, one)), tokio::spawn(relay(there, other))])
    }

    #[tokio::test]
    async fn everything_arrives_and_each_direction_ends_by_itself() {
        let (mut client, mut server, ends) = relayed().await;
        let sent: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
        let copy = sent.clone();
        let serving = tokio::spawn(async move {
            let mut received = Vec::new();
            server.read_to_end(&mut received).await.unwrap();
            assert!(received == copy);
            server.write_all(&received).await.unwrap();
        });
        client.write_all(&sent).await.unwrap();
        client.shutdown().await.unwrap();
        let mut back = Vec::new();
        client.read_to_end(&mut back).await.unwrap();
        assert!(back == sent);
        serving.await.unwrap();
        for end in ends {
            end.await.unwrap().unwrap();
        }
    }

    #[tokio::test]
    async fn a_reset_is_a_reset_at_the_other_side() {
        for half_closed in [false, true] {
            let (mut client, mut server, ends) = relayed().await;
            client.write_all(b"hello").await.unwrap();
            server.read_exact(&mut [0; 5]).await.unwrap();
            if half_closed {
                client.shutdown().await.unwrap();
                assert_eq!(server.read(&mut [0]).await.unwrap(), 0);
            }
            server.set_zero_linger().unwrap();
            drop(server);
            let error = client.read(&mut [0]).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{half_closed}");
            for end in ends {
                end.await.unwrap().unwrap_err();
            }
        }
    }

    #[tokio::test]
    async fn a_reset_after_the_servers_end_reaches_a_client_that_waits() {
        let (mut client, mut server, _ends) = relayed().await;
        server.shutdown().await.unwrap();
        assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
        drop(server);
        client.write_all(b"to nobody").await.unwrap();
        // The answer to that is a reset.
        client.ready(Interest::ERROR).await.unwrap();
        // To one who has read the end already, the kernel says it like this.
        assert_eq!(client.take_error().unwrap().unwrap().kind(), ErrorKind::BrokenPipe);
    }

    #[tokio::test]
    async fn a_stream_that_breaks_off_or_lies_is_a_reset() {
        for bytes in [&b""[..], &[5, 0, 0, 0, b'h'], &[0xff; 4]] {
            let (mut client, here) = tcp_pair().await;
            let (one, mut other) = UnixStream::pair().unwrap();
            let end = tokio::spawn(relay(here, one));
            other.write_all(bytes).await.unwrap();
            if bytes != [0xff; 4] {
                other.shutdown().await.unwrap();
            }
            assert_eq!(client.read(&mut [0]).await.unwrap_err().kind(), ErrorKind::ConnectionReset, "{bytes:?}");
            end.await.unwrap().unwrap_err();
        }
    }
}
