//! A thread that serves events of devices and their parts, on event-manager.

use std::io;
use std::thread::JoinHandle;

use event_manager::{EventManager, RemoteEndpoint, SubscriberOps};
use katavm_devices::virtio::Worker;

use crate::control::{Control, Goal};
use crate::ending::{Ending, ExitReason};

/// One event-loop thread.
pub struct EventLoop {
    endpoint: RemoteEndpoint<Worker>,
    control: Control,
    thread: Option<JoinHandle<()>>,
}

impl EventLoop {
    /// Starts a thread `name` that serves `workers` as `control` says.
    ///
    /// # Errors
    /// When epoll or the thread cannot be had.
    pub fn spawn(name: &str, workers: Vec<Worker>, control: &Control, ending: &Ending) -> io::Result<Self> {
        let mut manager = EventManager::new().map_err(io::Error::other)?;
        for worker in workers {
            manager.add_subscriber(worker);
        }
        let endpoint = manager.remote_endpoint();
        let member = control.join();
        let (goal, ending) = (control.clone(), ending.clone());
        let serve = move || {
            let _member = member;
            run(&mut manager, &goal, &ending);
        };
        let thread = std::thread::Builder::new().name(name.into()).spawn(serve)?;
        Ok(Self { endpoint, control: control.clone(), thread: Some(thread) })
    }

    /// Makes the thread look at its goal.
    pub fn kick(&self) {
        // It fails only when the thread is gone, which is the goal then.
        let _ = self.endpoint.kick();
    }
}

impl Drop for EventLoop {
    /// Stops the whole group: it is of no use without one of its members.
    fn drop(&mut self) {
        self.control.set(Goal::Stop);
        self.kick();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was reported by the guard in `run`.
            let _ = thread.join();
        }
    }
}

fn run(manager: &mut EventManager<Worker>, control: &Control, ending: &Ending) {
    let mut guard = ending.report_panic("an event loop");
    loop {
        match control.goal() {
            Goal::Run => {
                if let Err(error) = manager.run() {
                    ending.end(ExitReason::Failed(format!("an event loop failed: {error}")));
                    break;
                }
            }
            Goal::Pause => control.park(),
            Goal::Stop => break,
        }
    }
    guard.disarm();
}
