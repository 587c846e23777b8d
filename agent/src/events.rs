//! Events for whoever subscribed: each of them once and in the order in which they happened.

use std::sync::Mutex;

use katavm_protocol::agent::{Event, Exit, Oom, event::What};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// The subscribers.
#[derive(Default)]
pub struct Events {
    // Unbounded: an event must not get lost, and events are few and small.
    subscribers: Mutex<Vec<UnboundedSender<Event>>>,
}

impl Events {
    /// Everything that happens from now on.
    pub fn subscribe(&self) -> UnboundedReceiver<Event> {
        let (sender, receiver) = unbounded_channel();
        crate::lock(&self.subscribers).push(sender);
        receiver
    }

    /// A process has ended.
    pub fn exit(&self, container_id: &str, exec_id: &str, exit: Exit) {
        self.publish(container_id, exec_id, What::Exit(exit));
    }

    /// The kernel killed a process for want of memory, the container's `kills`-th.
    pub fn oom(&self, container_id: &str, kills: u64) {
        self.publish(container_id, "", What::Oom(Oom { kills, ..Default::default() }));
    }

    fn publish(&self, container_id: &str, exec_id: &str, what: What) {
        let event = Event {
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
            what: Some(what),
            ..Default::default()
        };
        crate::lock(&self.subscribers).retain(|subscriber| subscriber.send(event.clone()).is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_subscriber_gets_each_event_in_order() {
        let events = Events::default();
        let (mut one, mut two) = (events.subscribe(), events.subscribe());
        events.oom("a", 1);
        drop(events.subscribe());
        events.exit("a", "", Exit { status: 137, ..Default::default() });
        for receiver in [&mut one, &mut two] {
            assert!(matches!(receiver.try_recv().unwrap().what, Some(What::Oom(_))));
            let Some(What::Exit(exit)) = receiver.try_recv().unwrap().what else { panic!("no exit") };
            assert_eq!(exit.status, 137);
            assert!(receiver.try_recv().is_err());
        }
    }
}
