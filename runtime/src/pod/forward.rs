//! Connections that are made inside a pod's network namespace on the host, to its loopback or its own addresses: the
//! servers are in the guest.
//!
//! Wherever a socket of the guest listens, one in the namespace does; what it accepts goes on in the guest.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use katavm_protocol::agent::{ForwardHello, ForwardReply, ListenersResponse};
use katavm_protocol::{frame, ports, relay};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;

use crate::network::{Listening, listen_in};
use crate::sandbox::agent::{Agent, AgentError};
use crate::sandbox::blocking;
use crate::sandbox::vm::Dial;

/// Sockets that are opened for the guest's, whatever it says.
const LISTENERS: usize = 1024;
/// Connections at a time; more wait to be accepted.
const CONNECTIONS: usize = 256;
/// How long the guest may take to connect one.
const PATIENCE: Duration = Duration::from_secs(15);
/// How long accepting rests when there are no descriptors for it.
const REST: Duration = Duration::from_millis(200);

/// Why nothing is forwarded any more.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// The agent does not tell where the guest listens.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// It tells no more.
    #[error("the agent tells no more where the guest listens")]
    Ended,
}

/// A connection that was accepted, and its right to be there.
type Accepted = (TcpStream, OwnedSemaphorePermit);

/// What listens in the namespace for the guest. Everything ends when it is dropped.
struct Forward {
    netns: OwnedFd,
    listening: BTreeMap<Listening, AbortHandle>,
    accepting: JoinSet<()>,
    accepted: mpsc::Sender<Accepted>,
    places: Arc<Semaphore>,
}

/// Forwards for as long as this is awaited, or the guest is there; why no more.
pub async fn serve(netns: OwnedFd, agent: &Agent, dial: Arc<dyn Dial>) -> ForwardError {
    let mut told = match agent.listeners().await {
        Ok(told) => told,
        Err(error) => return error.into(),
    };
    let (accepted, mut connections) = mpsc::channel(1);
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let mut forward = Forward { netns, listening: BTreeMap::new(), accepting: JoinSet::new(), accepted, places };
    let mut running = JoinSet::new();
    loop {
        tokio::select! {
            listeners = told.next() => match listeners {
                Some(listeners) => forward.follow(&listeners).await,
                None => return ForwardError::Ended,
            },
            Some((tcp, place)) = connections.recv() => {
                let dial = Arc::clone(&dial);
                running.spawn(async move {
                    if let Err(error) = connect(tcp, dial).await {
                        log::debug!("a connection to the guest broke: {error}");
                    }
                    drop(place);
                });
            }
            Some(_) = running.join_next() => {}
            Some(_) = forward.accepting.join_next() => {}
        }
    }
}

impl Forward {
    /// Listens where the guest does now, and nowhere else.
    async fn follow(&mut self, told: &ListenersResponse) {
        let wanted: BTreeSet<_> = told.listeners.iter().filter_map(Listening::of).take(LISTENERS).collect();
        self.listening.retain(|here, accepting| {
            let stays = wanted.contains(here) && !accepting.is_finished();
            if !stays {
                accepting.abort();
            }
            stays
        });
        // What was told to stop lets go of its address now, on this thread.
        tokio::task::yield_now().await;
        let new: Vec<_> = wanted.into_iter().filter(|wanted| !self.listening.contains_key(wanted)).collect();
        if new.is_empty() {
            return;
        }
        let opened = self.open(new.clone()).await;
        for (place, listener) in new.into_iter().zip(opened) {
            let listener = listener.and_then(TcpListener::from_std);
            match listener {
                Ok(listener) => {
                    let (accepted, places) = (self.accepted.clone(), Arc::clone(&self.places));
                    self.listening.insert(place, self.accepting.spawn(accept(listener, accepted, places)));
                }
                // It may be an address that only the guest has, or taken by whoever is in the namespace.
                Err(error) => log::debug!("{}:{} of the guest is not reached from here: {error}", place.ip, place.port),
            }
        }
    }

    async fn open(&self, places: Vec<Listening>) -> Vec<io::Result<std::net::TcpListener>> {
        let opened =
            self.netns.try_clone().map(|netns| blocking(move || listen_in(netns, &places).map_err(io::Error::other)));
        let opened = match opened {
            Ok(opened) => opened.await,
            Err(error) => Err(error),
        };
        opened.unwrap_or_else(|error| {
            log::warn!("cannot listen for the guest in its network namespace: {error}");
            Vec::new()
        })
    }
}

async fn accept(listener: TcpListener, accepted: mpsc::Sender<Accepted>, places: Arc<Semaphore>) {
    loop {
        match listener.accept().await {
            Ok((tcp, _)) => {
                let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
                if accepted.send((tcp, place)).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                log::debug!("cannot accept a connection for the guest: {error}");
                tokio::time::sleep(REST).await;
            }
        }
    }
}

/// One connection to its end. Who has made it is told by a reset that the guest's end cannot be had, or broke.
async fn connect(tcp: TcpStream, dial: Arc<dyn Dial>) -> io::Result<()> {
    let stream = match timeout(PATIENCE, reach(&tcp, dial)).await {
        Ok(Ok(stream)) => stream,
        failed => {
            // Closed with RST (socket(7), SO_LINGER of 0).
            let _ = tcp.set_zero_linger();
            return failed?.map(drop);
        }
    };
    relay::relay(tcp, stream).await
}

/// The other end of it, at the address that it was made to.
async fn reach(tcp: &TcpStream, dial: Arc<dyn Dial>) -> io::Result<UnixStream> {
    let here = tcp.local_addr()?;
    let ip = match here.ip().to_canonical() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let stream = blocking(move || dial.dial(ports::FORWARD, PATIENCE)).await?;
    stream.set_nonblocking(true)?;
    let mut stream = UnixStream::from_std(stream)?;
    let hello = ForwardHello { ip, port: here.port().into(), ..Default::default() };
    frame::send(&mut stream, &hello).await?;
    let reply: ForwardReply = frame::receive(&mut stream).await?;
    if reply.error.is_empty() { Ok(stream) } else { Err(io::Error::other(reply.error)) }
}
