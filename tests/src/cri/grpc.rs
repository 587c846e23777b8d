//! gRPC's unary calls over HTTP/2 on a unix socket: all that the CRI has, apart from its events.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use h2::{RecvStream, client};
use http::{HeaderMap, Request};
use protobuf::Message;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;

/// How long an answer may take: pulling an image and booting a guest are calls, too.
const PATIENCE: Duration = Duration::from_secs(180);
/// The most that an answer may have, in bytes: execSync's streams are cut at 16 MiB each.
const LARGEST: usize = 64 << 20;
/// Of each message: a flag for compression, and the length (gRPC over HTTP2, "Length-Prefixed-Message").
const PREFIX: usize = 5;

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The server refused it.
    #[error("{method}: {message} (code {code})")]
    Refused {
        /// What was asked.
        method: String,
        /// gRPC's code.
        code: u32,
        /// In words.
        message: String,
    },
    /// The server cannot be reached.
    #[error("{method}: {socket}: {error}")]
    Connection {
        /// What was asked.
        method: String,
        /// Of whom.
        socket: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// It speaks, but not as it should.
    #[error("{method}: {what}")]
    Protocol {
        /// What was asked.
        method: String,
        /// What is wrong.
        what: String,
    },
    /// It does not answer.
    #[error("{method}: no answer within {} s", PATIENCE.as_secs())]
    Silent {
        /// What was asked.
        method: String,
    },
}

/// A server's socket. Each call has a connection of its own, so calls of several threads do not wait for each other.
#[derive(Clone, Debug)]
pub struct Channel {
    socket: PathBuf,
}

impl Channel {
    /// To a server.
    #[must_use]
    pub fn to(socket: &Path) -> Self {
        Self { socket: socket.into() }
    }

    /// Asks for `service/method` and waits for the answer.
    ///
    /// # Errors
    /// Any [`CallError`].
    pub fn call<R: Message>(&self, service: &str, method: &str, request: &impl Message) -> Result<R, CallError> {
        let lost = |error| CallError::Connection { method: method.into(), socket: self.socket.clone(), error };
        let runtime = runtime().map_err(lost)?;
        let path = format!("/{service}/{method}");
        let answer = runtime.block_on(async {
            let stream = UnixStream::connect(&self.socket).await.map_err(lost)?;
            let conversation = ask(stream, &path, method, request);
            tokio::time::timeout(PATIENCE, conversation)
                .await
                .unwrap_or_else(|_| Err(CallError::Silent { method: method.into() }))
        })?;
        R::parse_from_bytes(&answer)
            .map_err(|error| CallError::Protocol { method: method.into(), what: format!("its answer: {error}") })
    }
}

fn runtime() -> io::Result<Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

async fn ask(stream: UnixStream, path: &str, method: &str, request: &impl Message) -> Result<Vec<u8>, CallError> {
    let wrong = |what: String| CallError::Protocol { method: method.into(), what };
    let broken = |error: h2::Error| wrong(format!("HTTP/2: {error}"));
    let (client, connection) = client::handshake(stream).await.map_err(broken)?;
    // It ends with the runtime of this call, if not before.
    tokio::spawn(async move { drop(connection.await) });
    let head = Request::post(format!("http://localhost{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .map_err(|error| wrong(error.to_string()))?;
    let (response, mut body) = client.ready().await.map_err(broken)?.send_request(head, false).map_err(broken)?;
    let message = request.write_to_bytes().map_err(|error| wrong(error.to_string()))?;
    let length = u32::try_from(message.len()).map_err(|_| wrong("the request is too long".into()))?;
    let framed = [&[0], &length.to_be_bytes()[..], &message].concat();
    body.send_data(framed.into(), true).map_err(broken)?;
    let (head, mut body) = response.await.map_err(broken)?.into_parts();
    if !head.status.is_success() {
        return Err(wrong(format!("status {} of HTTP", head.status)));
    }
    let data = read(&mut body).await.map_err(wrong)?;
    // A refusal may have no body: its trailers are the headers then.
    let trailers = body.trailers().await.map_err(broken)?.unwrap_or(head.headers);
    refusal(method, &trailers)?;
    match data.split_at_checked(PREFIX) {
        Some((&[0, a, b, c, d], message)) if u32::from_be_bytes([a, b, c, d]) as usize == message.len() => {
            Ok(message.to_vec())
        }
        _ => Err(wrong("its answer is not one whole message".into())),
    }
}

async fn read(body: &mut RecvStream) -> Result<Vec<u8>, String> {
    let mut data = Vec::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk.map_err(|error| format!("HTTP/2: {error}"))?;
        body.flow_control().release_capacity(chunk.len()).map_err(|error| format!("HTTP/2: {error}"))?;
        data.extend_from_slice(&chunk);
        if data.len() > LARGEST {
            return Err("its answer is too long".into());
        }
    }
    Ok(data)
}

/// What the trailers say of the call's end.
fn refusal(method: &str, trailers: &HeaderMap) -> Result<(), CallError> {
    let text = |name: &str| trailers.get(name).and_then(|value| value.to_str().ok());
    match text("grpc-status").and_then(|code| code.parse().ok()) {
        Some(0) => Ok(()),
        Some(code) => {
            let message = unquote(text("grpc-message").unwrap_or_default());
            Err(CallError::Refused { method: method.into(), code, message })
        }
        None => Err(CallError::Protocol { method: method.into(), what: "it has no grpc-status".into() }),
    }
}

/// A message in a trailer has its unusual bytes as %XX.
fn unquote(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let hex = after.get(..2).and_then(|hex| std::str::from_utf8(hex).ok());
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()).filter(|_| first == b'%') {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            None => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_trailers_are_unquoted() {
        assert_eq!(unquote("a%20b%0A%"), "a b\n%");
        assert_eq!(unquote("100%zz"), "100%zz");
    }

    #[test]
    fn refusals_are_told_from_success() {
        let mut trailers = HeaderMap::new();
        assert!(refusal("M", &trailers).is_err());
        trailers.insert("grpc-status", "0".parse().unwrap());
        assert!(refusal("M", &trailers).is_ok());
        trailers.insert("grpc-status", "5".parse().unwrap());
        trailers.insert("grpc-message", "no%20pod".parse().unwrap());
        assert_eq!(refusal("M", &trailers).unwrap_err().to_string(), "M: no pod (code 5)");
    }
}
