//! Connections that are made inside a pod's network namespace on the host, to its loopback or its own addresses: the
//! servers are in the guest.
//!
//! Wherever a socket of the guest listens, one in the namespace does; what it accepts goes on in the guest.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use katavm_protocol::agent::{ForwardHello, ForwardReply, Listeners};
use katavm_protocol::{frame, ports, relay};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use crate::network::{Listening, listen_in};
use crate::sandbox::vm::Dial;
use crate::sandbox::{DIAL_PATIENCE, blocking};

/// Sockets that are opened for the guest's, whatever it says.
const LISTENERS: usize = 1024;
/// Connections at a time; more wait to be accepted.
const CONNECTIONS: usize = 256;
/// How long the guest may take to connect one.
const PATIENCE: Duration = Duration::from_secs(15);
/// How long accepting rests when there are no descriptors for it.
const REST: Duration = Duration::from_millis(200);
/// How long what the guest says is not heard after each time at least: its sockets may come and go faster than it is
/// worth to follow.
const PACE: Duration = Duration::from_millis(20);
/// How many times as long as it took to follow: with this, a guest can keep a fifth of a processor busy at most.
const SHARE: u32 = 4;

/// Why nothing is forwarded any more.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// The agent cannot tell where the guest listens.
    #[error("the agent cannot tell where the guest listens: {0:?}")]
    Guest(String),
    /// It tells no more.
    #[error("the agent tells no more where the guest listens: {0}")]
    Ended(#[from] io::Error),
}

/// A connection that was accepted, and its right to be there.
type Accepted = (TcpStream, OwnedSemaphorePermit);

/// What listens in the namespace for the guest. Everything ends when it is dropped.
struct Forward {
    netns: OwnedFd,
    /// Each with its one task.
    listening: BTreeMap<Listening, JoinSet<()>>,
    accepted: mpsc::Sender<Accepted>,
    places: Arc<Semaphore>,
}

/// Forwards for as long as this is awaited, or the guest is there; why no more.
pub async fn serve(netns: OwnedFd, dial: Arc<dyn Dial>) -> ForwardError {
    let (accepted, connections) = mpsc::channel(1);
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let forward = Forward { netns, listening: BTreeMap::new(), accepted, places };
    let telling = Arc::clone(&dial);
    tokio::select! {
        error = forward.follow(telling) => error,
        never = carry(connections, dial) => match never {},
    }
}

/// Has each connection go on in the guest.
async fn carry(mut connections: mpsc::Receiver<Accepted>, dial: Arc<dyn Dial>) -> Infallible {
    let mut running = JoinSet::new();
    loop {
        tokio::select! {
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
            // Nobody accepts any more.
            else => std::future::pending().await,
        }
    }
}

impl Forward {
    /// Does so again and again, as the agent tells.
    async fn follow(mut self, dial: Arc<dyn Dial>) -> ForwardError {
        let mut stream = match dialled(dial, ports::LISTENERS, DIAL_PATIENCE).await {
            Ok(stream) => stream,
            Err(error) => return error.into(),
        };
        loop {
            let told = told(&mut stream).await;
            let began = Instant::now();
            match told {
                Ok(told) if told.error.is_empty() => self.listen(&told).await,
                Ok(told) => return ForwardError::Guest(told.error),
                Err(error) => return error.into(),
            }
            sleep(PACE.max(began.elapsed().saturating_mul(SHARE))).await;
        }
    }

    /// Listens where the guest does now, and nowhere else.
    async fn listen(&mut self, told: &Listeners) {
        let wanted: BTreeSet<_> = told.listeners.iter().filter_map(Listening::of).take(LISTENERS).collect();
        let gone: Vec<_> = self.listening.extract_if(.., |here, _| !wanted.contains(here)).collect();
        for (_, mut accepting) in gone {
            // Its address may be one that is wanted in another way.
            accepting.shutdown().await;
        }
        let new: Vec<_> = wanted.into_iter().filter(|wanted| !self.listening.contains_key(wanted)).collect();
        if new.is_empty() {
            return;
        }
        let opened = self.open(new.clone()).await;
        for (place, listener) in new.into_iter().zip(opened) {
            let listener = listener.and_then(TcpListener::from_std);
            match listener {
                Ok(listener) => {
                    let mut accepting = JoinSet::new();
                    accepting.spawn(accept(listener, self.accepted.clone(), Arc::clone(&self.places)));
                    self.listening.insert(place, accepting);
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

/// Where the guest's sockets listen now, when that has changed.
async fn told(stream: &mut UnixStream) -> io::Result<Listeners> {
    stream.write_u8(0).await?;
    frame::receive(stream).await
}

/// A connection to a port of the guest.
pub(super) async fn dialled(dial: Arc<dyn Dial>, port: u32, patience: Duration) -> io::Result<UnixStream> {
    let stream = blocking(move || dial.dial(port, patience)).await?;
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
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
                sleep(REST).await;
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
    let mut stream = dialled(dial, ports::FORWARD, PATIENCE).await?;
    let hello = ForwardHello { ip, port: here.port().into(), ..Default::default() };
    frame::send(&mut stream, &hello).await?;
    let reply: ForwardReply = frame::receive(&mut stream).await?;
    if reply.error.is_empty() { Ok(stream) } else { Err(io::Error::other(reply.error)) }
}
