//! Connections that the host forwards to listening sockets of the guest's network.

use std::io;
use std::time::Duration;

use katavm_protocol::agent::{ForwardHello, ForwardReply};
use katavm_protocol::frame;
use katavm_protocol::relay::relay;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use crate::network;
use crate::transport::Incoming;

/// How long a socket of the guest may take to answer another one of it.
const PATIENCE: Duration = Duration::from_secs(10);

/// Serves the forward port for as long as the guest lives.
pub async fn serve(incoming: Incoming) {
    loop {
        let connection = incoming.next().await;
        tokio::spawn(async move {
            if let Err(error) = forward(connection).await {
                crate::debug!("a forwarded connection broke: {error}");
            }
        });
    }
}

async fn forward(mut connection: UnixStream) -> io::Result<()> {
    let hello: ForwardHello = frame::receive(&mut connection).await?;
    let connected = connect(&hello).await;
    let error = connected.as_ref().err().map(ToString::to_string).unwrap_or_default();
    frame::send(&mut connection, &ForwardReply { error, ..Default::default() }).await?;
    relay(connected?, connection).await
}

async fn connect(hello: &ForwardHello) -> io::Result<TcpStream> {
    let ip = network::ip(&hello.ip).map_err(io::Error::other)?.ok_or(io::ErrorKind::InvalidInput)?;
    let port = u16::try_from(hello.port).map_err(io::Error::other)?;
    timeout(PATIENCE, TcpStream::connect((ip, port))).await?
}
