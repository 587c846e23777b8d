//! Events for containerd, each once and in order, kept while it is away.

use std::time::Duration;

use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use protobuf::well_known_types::any::Any;
use protobuf::{MessageField, MessageFull};
use tokio::sync::mpsc;
use ttrpc::{Code, context};

use crate::host;
use crate::service::timestamp;

/// How long containerd may take to accept one.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long it is left alone after a failure.
const PAUSE: Duration = Duration::from_millis(500);

/// Where events are put.
#[derive(Clone)]
pub struct Events {
    queue: mpsc::UnboundedSender<Queued>,
    namespace: String,
}

enum Queued {
    Event(Box<Envelope>),
    /// Answered when all before it have been accepted.
    Flush(tokio::sync::oneshot::Sender<()>),
}

impl Events {
    /// Delivers to containerd's socket at `address`, or nowhere if there is none. Needs a tokio runtime.
    #[must_use]
    pub fn to(address: Option<String>, namespace: &str) -> Self {
        let (queue, events) = mpsc::unbounded_channel();
        tokio::spawn(deliver(address, events));
        Self { queue, namespace: namespace.into() }
    }

    /// containerd's namespace.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Puts one in the queue.
    pub fn publish<E: MessageFull>(&self, topic: &str, event: &E) {
        let packed = match packed(event) {
            Ok(any) => any,
            Err(error) => return log::error!("event {topic}: {error}"),
        };
        let envelope = Envelope {
            timestamp: timestamp(host::now_ns()),
            namespace: self.namespace.clone(),
            topic: topic.into(),
            event: MessageField::some(packed),
            ..Default::default()
        };
        // The task at the other end lives as long as the runtime.
        let _ = self.queue.send(Queued::Event(Box::new(envelope)));
    }

    /// Returns when all that were published before have been accepted.
    pub async fn flushed(&self) {
        let (done, flushed) = tokio::sync::oneshot::channel();
        let _ = self.queue.send(Queued::Flush(done));
        let _ = flushed.await;
    }
}

/// Packs a message as containerd does, which knows its types by their bare names.
///
/// # Errors
/// That it cannot be encoded.
pub fn packed<M: MessageFull>(message: &M) -> protobuf::Result<Any> {
    let mut packed = Any::pack(message)?;
    packed.type_url = packed.type_url.trim_start_matches("type.googleapis.com/").into();
    Ok(packed)
}

async fn deliver(address: Option<String>, mut events: mpsc::UnboundedReceiver<Queued>) {
    let mut client = None;
    while let Some(queued) = events.recv().await {
        let envelope = match queued {
            Queued::Event(envelope) => envelope,
            Queued::Flush(done) => {
                let _ = done.send(());
                continue;
            }
        };
        let Some(address) = &address else { continue };
        let request = ForwardRequest { envelope: MessageField::some(*envelope), ..Default::default() };
        while let Err(error) = forward(&mut client, address, &request).await {
            if is_final(&error) {
                log::warn!("containerd refuses an event: {error}");
                break;
            }
            log::debug!("containerd does not take an event: {error}");
            client = None;
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// Whether containerd has looked at an event and will not take it, however often it is sent.
fn is_final(error: &ttrpc::Error) -> bool {
    match error {
        ttrpc::Error::RpcStatus(status) => !matches!(
            status.code(),
            Code::DEADLINE_EXCEEDED | Code::UNAVAILABLE | Code::CANCELLED | Code::ABORTED | Code::RESOURCE_EXHAUSTED
        ),
        _ => false,
    }
}

async fn forward(client: &mut Option<EventsClient>, address: &str, request: &ForwardRequest) -> ttrpc::Result<()> {
    let connected = match client.take() {
        Some(client) => client,
        None => EventsClient::new(Client::connect(&format!("unix://{address}")).await?),
    };
    let timeout = i64::try_from(PATIENCE.as_nanos()).unwrap_or(i64::MAX);
    connected.forward(context::with_timeout(timeout), request).await?;
    *client = Some(connected);
    Ok(())
}
