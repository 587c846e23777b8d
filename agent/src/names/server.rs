//! One name server: what comes to it over UDP and TCP goes to the host.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use katavm_protocol::names::LONGEST;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::host::Host;
use super::redirect::redirect;

/// TCP connections at a time; further ones are closed.
const CONNECTIONS: usize = 64;
/// How long a TCP connection may be silent.
const SILENCE: Duration = Duration::from_secs(30);
/// How often a port that is free for UDP may be taken for TCP.
const TRIES: usize = 16;

/// A name server, as long as it is not dropped.
pub struct Server {
    _tasks: JoinSet<()>,
    /// The programs that lead to it are attached as long as these are open.
    _links: Vec<OwnedFd>,
}

impl Server {
    /// At port 53 of an address, for the processes of a control group.
    ///
    /// # Errors
    /// That no port is free, or that the kernel lacks what it takes.
    pub async fn start(cgroup: &Path, address: Ipv4Addr, host: Arc<Host>) -> io::Result<Self> {
        let (udp, tcp) = sockets(address).await?;
        let links = redirect(cgroup, address, udp.local_addr()?.port())?;
        let mut tasks = JoinSet::new();
        tasks.spawn(datagrams(Arc::new(udp), address, Arc::clone(&host)));
        tasks.spawn(connections(tcp, address, host));
        Ok(Self { _tasks: tasks, _links: links })
    }
}

/// Both at the same port.
async fn sockets(address: Ipv4Addr) -> io::Result<(UdpSocket, TcpListener)> {
    let mut tries = 0;
    loop {
        let udp = UdpSocket::bind((address, 0)).await?;
        match TcpListener::bind((address, udp.local_addr()?.port())).await {
            Ok(tcp) => return Ok((udp, tcp)),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && tries < TRIES => tries += 1,
            Err(error) => return Err(error),
        }
    }
}

async fn datagrams(socket: Arc<UdpSocket>, address: Ipv4Addr, host: Arc<Host>) {
    let mut buffer = vec![0; LONGEST];
    let mut asking = JoinSet::new();
    loop {
        let received = tokio::select! {
            received = socket.recv_from(&mut buffer) => received,
            Some(_) = asking.join_next() => continue,
        };
        let (len, from) = match received {
            Ok(received) => received,
            Err(error) => {
                crate::debug!("a name server's socket failed: {error}");
                continue;
            }
        };
        let (socket, host) = (Arc::clone(&socket), Arc::clone(&host));
        let query = buffer.get(..len).unwrap_or_default().to_vec();
        asking.spawn(async move {
            if let Some(answer) = host.ask(address, false, &query).await {
                // Whoever asked may be gone.
                let _ = socket.send_to(&answer, from).await;
            }
        });
    }
}

async fn connections(listener: TcpListener, address: Ipv4Addr, host: Arc<Host>) {
    let mut open = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = open.join_next() => continue,
        };
        match accepted {
            Ok((connection, _)) if open.len() < CONNECTIONS => {
                let host = Arc::clone(&host);
                open.spawn(async move {
                    // It ends when it ends: nobody else is to know.
                    let _ = converse(connection, address, &host).await;
                });
            }
            Ok(_) => {}
            Err(error) => {
                crate::debug!("a name server cannot accept a connection: {error}");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    }
}

/// One query after the other (RFC 1035, 4.2.2), until there is no answer.
async fn converse(mut connection: TcpStream, address: Ipv4Addr, host: &Host) -> io::Result<()> {
    loop {
        let len = timeout(SILENCE, connection.read_u16()).await??;
        let len = usize::from(len);
        if len > LONGEST {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut query = vec![0; len];
        timeout(SILENCE, connection.read_exact(&mut query)).await??;
        let Some(answer) = host.ask(address, true, &query).await else { return Ok(()) };
        let len = u16::try_from(answer.len()).map_err(io::Error::other)?;
        let whole = [&len.to_be_bytes(), answer.as_slice()].concat();
        timeout(SILENCE, connection.write_all(&whole)).await??;
    }
}
