//! A thread that serves devices' events, on event-manager.

use std::io;
use std::thread::JoinHandle;

use event_manager::{EventManager, RemoteEndpoint, SubscriberOps};
use katavm_devices::virtio::mmio::SharedDevice;

use crate::control::{Control, Goal};
use crate::ending::{Ending, ExitReason};

/// One event-loop thread with its devices.
pub struct EventLoop {
    endpoint: RemoteEndpoint<SharedDevice>,
    control: Control,
    thread: Option<JoinHandle<()>>,
}

impl EventLoop {
    /// Starts a thread `name` that serves `devices` as `control` says.
    ///
    /// # Errors
    /// When epoll or the thread cannot be had.
    pub fn spawn(name: &str, devices: Vec<SharedDevice>, control: &Control, ending: &Ending) -> io::Result<Self> {
        let mut manager = EventManager::new().map_err(io::Error::other)?;
        for device in devices {
            manager.add_subscriber(device);
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

fn run(manager: &mut EventManager<SharedDevice>, control: &Control, ending: &Ending) {
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
