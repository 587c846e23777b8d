//! The conversation with the host about names.

use std::collections::HashMap;
use std::io;
use std::net::Ipv4Addr;
use std::sync::Mutex;
use std::time::Duration;

use katavm_protocol::agent::{Answer, Query};
use katavm_protocol::frame;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use crate::lock;
use crate::transport::Incoming;

/// Queries that wait for their answers at a time. Further ones are dropped, as a name server that is too busy does.
const MOST: usize = 256;
/// How long the host has for an answer. Resolvers give up earlier.
const PATIENCE: Duration = Duration::from_secs(30);

/// Who asks the host.
pub struct Host {
    queries: mpsc::Sender<Query>,
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    next: u64,
    answers: HashMap<u64, oneshot::Sender<Vec<u8>>>,
}

impl Host {
    /// With the queries that [`serve`] is to pass on.
    pub fn new() -> (Self, mpsc::Receiver<Query>) {
        let (queries, receiver) = mpsc::channel(MOST);
        (Self { queries, waiting: Mutex::default() }, receiver)
    }

    /// What a name server of the host answers, if it does.
    pub async fn ask(&self, server: Ipv4Addr, tcp: bool, message: &[u8]) -> Option<Vec<u8>> {
        let (sender, answer) = oneshot::channel();
        let id = {
            let mut waiting = lock(&self.waiting);
            if waiting.answers.len() >= MOST {
                return None;
            }
            waiting.next += 1;
            let id = waiting.next;
            waiting.answers.insert(id, sender);
            id
        };
        // Forgotten also when whoever asks does not wait any more.
        let _forgotten = Forget(self, id);
        let (server, message) = (server.octets().to_vec(), message.to_vec());
        self.queries.try_send(Query { id, server, tcp, message, ..Default::default() }).ok()?;
        let answer = timeout(PATIENCE, answer).await.ok()?.ok()?;
        (!answer.is_empty()).then_some(answer)
    }
}

struct Forget<'a>(&'a Host, u64);

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        lock(&self.0.waiting).answers.remove(&self.1);
    }
}

/// Passes queries on to whichever connection the host has made, and answers back.
pub async fn serve(incoming: Incoming, host: std::sync::Arc<Host>, mut queries: mpsc::Receiver<Query>) {
    loop {
        let error = converse(incoming.next().await, &host, &mut queries).await;
        crate::debug!("the host's connection for names ended: {error}");
    }
}

async fn converse(mut connection: UnixStream, host: &Host, queries: &mut mpsc::Receiver<Query>) -> io::Error {
    let (mut from, mut to) = connection.split();
    tokio::select! {
        error = take_answers(&mut from, host) => error,
        error = send_queries(&mut to, queries) => error,
    }
}

async fn take_answers(from: &mut (impl AsyncRead + Unpin), host: &Host) -> io::Error {
    loop {
        match frame::receive::<Answer>(from).await {
            Ok(answer) => {
                // Whoever asked may not wait any more.
                let _ = lock(&host.waiting).answers.remove(&answer.id).map(|sender| sender.send(answer.message));
            }
            Err(error) => return error,
        }
    }
}

async fn send_queries(to: &mut (impl AsyncWrite + Unpin), queries: &mut mpsc::Receiver<Query>) -> io::Error {
    while let Some(query) = queries.recv().await {
        if let Err(error) = frame::send(to, &query).await {
            return error;
        }
    }
    io::ErrorKind::BrokenPipe.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);

    #[tokio::test]
    async fn each_query_gets_its_own_answer_in_whichever_order() {
        let (host, mut queries) = Host::new();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let asking = async {
            let (one, two, none) = tokio::join!(
                host.ask(SERVER, false, b"one"),
                host.ask(SERVER, true, b"two"),
                host.ask(SERVER, false, b"x")
            );
            assert_eq!((one.unwrap(), two.unwrap(), none), (b"ONE".to_vec(), b"TWO".to_vec(), None));
        };
        let answering = async {
            let mut asked = Vec::new();
            for _ in 0..3 {
                asked.push(frame::receive::<Query>(&mut theirs).await.unwrap());
            }
            let known = Answer { id: 4711, message: b"unasked".to_vec(), ..Default::default() };
            frame::send(&mut theirs, &known).await.unwrap();
            for query in asked.iter().rev() {
                assert_eq!(query.server, SERVER.octets());
                assert_eq!(query.tcp, query.message == b"two");
                let message = if query.message == b"x" { Vec::new() } else { query.message.to_ascii_uppercase() };
                frame::send(&mut theirs, &Answer { id: query.id, message, ..Default::default() }).await.unwrap();
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = asking => {}
            error = converse(ours, &host, &mut queries) => panic!("{error}"),
            () = answering => {}
        }
        assert!(lock(&host.waiting).answers.is_empty());
    }

    #[tokio::test]
    async fn too_many_queries_are_dropped() {
        let (host, _queries) = Host::new();
        let mut asking: Vec<_> = (0..MOST).map(|_| Box::pin(host.ask(SERVER, false, b"q"))).collect();
        for one in &mut asking {
            assert!(timeout(Duration::ZERO, one).await.is_err(), "it waits");
        }
        assert_eq!(host.ask(SERVER, false, b"q").await, None);
        drop(asking);
        assert!(lock(&host.waiting).answers.is_empty());
    }
}
