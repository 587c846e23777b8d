//! Queries of the guest to name servers that an engine has in the pod's network namespace.
//!
//! The guest can ask these servers, at port 53, and nobody else: where a query goes is decided here.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use katavm_protocol::agent::{Answer, Query};
use katavm_protocol::names::LONGEST;
use katavm_protocol::{frame, ports};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{ReadHalf, WriteHalf};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::forward::dialled;
use crate::network::{name_server, name_server_by_tcp};
use crate::sandbox::vm::Dial;
use crate::sandbox::{DIAL_PATIENCE, blocking};

/// Queries that are asked at a time; the guest is not heard while there are so many.
const MOST: usize = 64;
/// How long a server has for an answer. Resolvers give up earlier.
const PATIENCE: Duration = Duration::from_secs(20);

/// The servers that may be asked.
type Servers = watch::Receiver<Vec<Ipv4Addr>>;

/// Connects to the agent when there are servers to ask, and asks them; ends with the guest, or for want of descriptors.
pub async fn serve(netns: OwnedFd, mut servers: Servers, dial: Arc<dyn Dial>) -> io::Error {
    if servers.wait_for(|servers| !servers.is_empty()).await.is_err() {
        return io::ErrorKind::BrokenPipe.into();
    }
    match dialled(dial, ports::NAMES, DIAL_PATIENCE).await {
        Ok(mut stream) => {
            let (from, to) = stream.split();
            let (answers, answered) = mpsc::channel(MOST);
            tokio::select! {
                error = take_queries(from, Arc::new(netns), servers, answers) => error,
                error = send_answers(to, answered) => error,
            }
        }
        Err(error) => error,
    }
}

async fn take_queries(
    mut from: ReadHalf<'_>,
    netns: Arc<OwnedFd>,
    servers: Servers,
    answers: mpsc::Sender<Answer>,
) -> io::Error {
    let places = Arc::new(Semaphore::new(MOST));
    let mut asking = JoinSet::new();
    loop {
        let query: Query = match frame::receive(&mut from).await {
            Ok(query) => query,
            Err(error) => return error,
        };
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return io::ErrorKind::BrokenPipe.into() };
        while asking.try_join_next().is_some() {}
        let (netns, servers, answers) = (Arc::clone(&netns), servers.clone(), answers.clone());
        asking.spawn(async move {
            let id = query.id;
            let asked = timeout(PATIENCE, ask(netns, &servers, query)).await;
            let message = asked.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())).unwrap_or_else(|error| {
                log::debug!("a query of the guest for a name is not answered: {error}");
                Vec::new()
            });
            // Nobody waits when the connection is gone.
            let _ = answers.send(Answer { id, message, ..Default::default() }).await;
            drop(place);
        });
    }
}

async fn send_answers(mut to: WriteHalf<'_>, mut answers: mpsc::Receiver<Answer>) -> io::Error {
    while let Some(answer) = answers.recv().await {
        if let Err(error) = frame::send(&mut to, &answer).await {
            return error;
        }
    }
    io::ErrorKind::BrokenPipe.into()
}

async fn ask(netns: Arc<OwnedFd>, servers: &Servers, query: Query) -> io::Result<Vec<u8>> {
    let server = <[u8; 4]>::try_from(query.server.as_slice()).map(Ipv4Addr::from).map_err(io::Error::other)?;
    if !servers.borrow().contains(&server) || query.message.len() > LONGEST {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    if query.tcp {
        let stream = blocking(move || name_server_by_tcp(&*netns, server).map_err(io::Error::other)).await?;
        return over_tcp(TcpStream::from_std(stream)?, &query.message).await;
    }
    let socket = blocking(move || name_server(&*netns, server).map_err(io::Error::other)).await?;
    let socket = UdpSocket::from_std(socket)?;
    socket.send(&query.message).await?;
    let mut answer = vec![0; LONGEST];
    let len = socket.recv(&mut answer).await?;
    answer.truncate(len);
    Ok(answer)
}

/// A message with its length before it (RFC 1035, 4.2.2), and the same back.
async fn over_tcp(mut stream: TcpStream, query: &[u8]) -> io::Result<Vec<u8>> {
    let len = u16::try_from(query.len()).map_err(io::Error::other)?;
    stream.write_all(&[&len.to_be_bytes(), query].concat()).await?;
    let len = usize::from(stream.read_u16().await?);
    if len > LONGEST {
        return Err(io::Error::other(format!("an answer of {len} bytes, {LONGEST} at most")));
    }
    let mut answer = vec![0; len];
    stream.read_exact(&mut answer).await?;
    Ok(answer)
}
