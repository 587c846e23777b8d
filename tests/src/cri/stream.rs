//! The streams of exec, attach and forwarded ports by WebSocket, as `kubectl` has them: each message's first byte is its channel
//! (`v4.channel.k8s.io`).

use std::io;
use std::net::TcpStream;
use std::time::Duration;

use http::Uri;
use serde_json::Value;
use tungstenite::client::IntoClientRequest;
use tungstenite::error::ProtocolError;
use tungstenite::{Error, Message, WebSocket};

/// The protocol's name.
const PROTOCOL: &str = "v4.channel.k8s.io";
/// Of the container, to be written.
const STDIN: u8 = 0;
/// Of the container, to be read.
const STDOUT: u8 = 1;
/// Of the container, to be read.
const STDERR: u8 = 2;
/// How the command ended, as JSON.
const OUTCOME: u8 = 3;
/// The terminal's size, as JSON.
const RESIZE: u8 = 4;
/// Of a forwarded port, both ways.
const DATA: u8 = 0;
/// What went wrong with the connection to a forwarded port.
const ERROR: u8 = 1;
/// How long the server may say nothing.
const PATIENCE: Duration = Duration::from_secs(60);

/// Why streams broke.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// It is no address of streams.
    #[error("{0}: no address with host and port")]
    Address(String),
    /// They cannot be connected.
    #[error("streams: {0}")]
    Connection(#[from] io::Error),
    /// WebSocket.
    #[error("streams: {0}")]
    WebSocket(#[from] Box<Error>),
    /// A message of no channel.
    #[error("streams: a message of no known channel: {0:?}")]
    Channel(Vec<u8>),
    /// How the command ended is not told as it should be.
    #[error("streams: the outcome: {0}")]
    Outcome(#[from] serde_json::Error),
}

impl From<Error> for StreamError {
    fn from(error: Error) -> Self {
        Box::new(error).into()
    }
}

/// What a command or container has written, to its end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Output {
    /// Standard output, or the terminal's.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    /// The command's exit code; nothing if it cannot be told, as of an attached container.
    pub code: Option<i32>,
}

/// Open streams.
pub struct Streams {
    socket: WebSocket<TcpStream>,
    output: Output,
}

impl Streams {
    /// Connects to where the CRI said that they are.
    ///
    /// # Errors
    /// Any [`StreamError`].
    pub fn open(url: &str) -> Result<Self, StreamError> {
        Ok(Self { socket: connect(url)?, output: Output::default() })
    }

    /// Writes to standard input. Version 4 of the protocol has no word for its end.
    ///
    /// # Errors
    /// Any [`StreamError`].
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), StreamError> {
        self.send(STDIN, bytes)
    }

    /// Tells the terminal's size.
    ///
    /// # Errors
    /// Any [`StreamError`].
    pub fn resize(&mut self, columns: u16, rows: u16) -> Result<(), StreamError> {
        self.send(RESIZE, format!(r#"{{"Width":{columns},"Height":{rows}}}"#).as_bytes())
    }

    fn send(&mut self, channel: u8, bytes: &[u8]) -> Result<(), StreamError> {
        Ok(self.socket.send(Message::Binary([&[channel], bytes].concat().into()))?)
    }

    /// Reads until standard output contains `text`; all of it so far.
    ///
    /// # Errors
    /// Any [`StreamError`]; that it ended before is one of the kind [`io::ErrorKind::UnexpectedEof`].
    pub fn read_until(&mut self, text: &str) -> Result<&[u8], StreamError> {
        while !self.output.stdout.windows(text.len()).any(|window| window == text.as_bytes()) {
            if !self.step()? {
                let so_far = String::from_utf8_lossy(&self.output.stdout).into_owned();
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("no {text:?} in {so_far:?}")).into());
            }
        }
        Ok(&self.output.stdout)
    }

    /// Reads to the end.
    ///
    /// # Errors
    /// Any [`StreamError`].
    pub fn finish(mut self) -> Result<Output, StreamError> {
        while self.step()? {}
        Ok(self.output)
    }

    /// Takes one message; whether there may be more.
    fn step(&mut self) -> Result<bool, StreamError> {
        let Some(bytes) = receive(&mut self.socket)? else { return Ok(false) };
        match bytes.split_first() {
            Some((&STDOUT, bytes)) => self.output.stdout.extend(bytes),
            Some((&STDERR, bytes)) => self.output.stderr.extend(bytes),
            // It opens each channel by an empty message.
            Some((_, [])) | None => {}
            Some((&OUTCOME, bytes)) => self.output.code = outcome(bytes)?,
            _ => return Err(StreamError::Channel(bytes.to_vec())),
        }
        Ok(true)
    }
}

/// Sends `bytes` to a port by the address of its forwarding, and reads until the other side ends: what it has sent, and
/// what went wrong with the connection to it, which is nothing if all went well.
///
/// # Errors
/// Any [`StreamError`].
pub fn forward(url: &str, port: u16, bytes: &[u8]) -> Result<(Vec<u8>, String), StreamError> {
    let mut socket = connect(&format!("{url}?port={port}"))?;
    socket.send(Message::Binary([&[DATA], bytes].concat().into()))?;
    let (mut data, mut error) = (Vec::new(), Vec::new());
    while let Some(bytes) = receive(&mut socket)? {
        match bytes.split_first() {
            Some((&DATA, bytes)) => data.extend(bytes),
            Some((&ERROR, bytes)) => error.extend(bytes),
            Some((_, [])) | None => {}
            _ => return Err(StreamError::Channel(bytes.to_vec())),
        }
    }
    // Each channel begins with the number of its port.
    let told = port.to_le_bytes();
    let text = |bytes: &[u8]| bytes.strip_prefix(&told).unwrap_or(bytes).to_vec();
    Ok((text(&data), String::from_utf8_lossy(&text(&error)).into_owned()))
}

fn connect(url: &str) -> Result<WebSocket<TcpStream>, StreamError> {
    let url = url.replacen("http://", "ws://", 1);
    let uri: Uri = url.parse().map_err(|_| StreamError::Address(url.clone()))?;
    let authority = uri.authority().ok_or_else(|| StreamError::Address(url.clone()))?;
    let stream = TcpStream::connect(authority.as_str())?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut request = url.into_client_request()?;
    request.headers_mut().insert("Sec-WebSocket-Protocol", http::HeaderValue::from_static(PROTOCOL));
    let connected = tungstenite::client(request, stream);
    let (socket, _) = connected.map_err(|error| io::Error::other(error.to_string()))?;
    Ok(socket)
}

/// The next message, which is empty if it is none of ours; nothing at the end.
fn receive(socket: &mut WebSocket<TcpStream>) -> Result<Option<tungstenite::Bytes>, StreamError> {
    match socket.read() {
        Ok(Message::Binary(bytes)) => Ok(Some(bytes)),
        Ok(Message::Text(text)) => Ok(Some(text.into())),
        Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_)) => Ok(Some(Default::default())),
        // Nothing follows a goodbye (RFC 6455 section 5.5.1), and the server may be gone before it is answered.
        Ok(Message::Close(_)) | Err(Error::ConnectionClosed | Error::AlreadyClosed) => Ok(None),
        // The server does not always say goodbye.
        Err(Error::Protocol(ProtocolError::ResetWithoutClosingHandshake)) => Ok(None),
        // It had ended its side, and then refused what was written to it: all that it sent has been read.
        Err(Error::Io(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The exit code in a status of Kubernetes.
fn outcome(json: &[u8]) -> Result<Option<i32>, serde_json::Error> {
    let status: Value = serde_json::from_slice(json)?;
    if status["status"] == "Success" {
        return Ok(Some(0));
    }
    let causes = status["details"]["causes"].as_array().into_iter().flatten();
    let mut codes = causes.filter(|cause| cause["reason"] == "ExitCode").filter_map(|cause| cause["message"].as_str());
    Ok(codes.next().and_then(|code| code.parse().ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_are_exit_codes() {
        assert_eq!(outcome(br#"{"metadata":{},"status":"Success"}"#).unwrap(), Some(0));
        let failed = br#"{"status":"Failure","reason":"NonZeroExitCode",
                          "details":{"causes":[{"reason":"ExitCode","message":"7"}]}}"#;
        assert_eq!(outcome(failed).unwrap(), Some(7));
        assert_eq!(outcome(br#"{"status":"Failure","message":"it is gone"}"#).unwrap(), None);
        assert!(outcome(b"gone").is_err());
    }
}
