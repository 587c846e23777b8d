//! A process of a container, from its making to its end.

use std::io;
use std::path::PathBuf;
use std::sync::Mutex;

use katavm_protocol::agent::Exit;
use nix::errno::Errno;
use tokio::sync::watch;

use super::directory::{Directory, notify_start};
use crate::error::Error;
use crate::reaper::Reaper;
use crate::streams::{Ends, console};

/// A container's first process (with an empty exec id) or a further one.
pub struct Process {
    /// In the guest's first pid namespace.
    pub pid: i32,
    /// The agent's ends of its streams.
    pub ends: Ends,
    /// Where it waits to be started.
    notify: PathBuf,
    started: Mutex<bool>,
    /// Its directory, while it is of use; the first process' is the container's.
    directory: Mutex<Option<Directory>>,
    exit: watch::Sender<Option<Exit>>,
}

impl Process {
    /// A process that waits at `notify/notify.sock`.
    pub fn new(pid: i32, ends: Ends, notify: PathBuf) -> Self {
        Self {
            pid,
            ends,
            notify,
            started: Mutex::default(),
            directory: Mutex::default(),
            exit: watch::Sender::new(None),
        }
    }

    /// Leaves it its directory, to be removed once it was started or has ended.
    pub fn keep_directory(&self, directory: Directory) {
        if !self.has_ended() && !self.was_started() {
            *crate::lock(&self.directory) = Some(directory);
        }
    }

    /// Lets it execute its program.
    ///
    /// # Errors
    /// It was started before, or has ended.
    pub fn start(&self) -> Result<(), Error> {
        let mut started = crate::lock(&self.started);
        if *started {
            return Err(Error::State("the process was started before".into()));
        }
        if self.has_ended() {
            return Err(Error::State("the process has ended before it was started".into()));
        }
        notify_start(&self.notify).map_err(|error| match error.kind() {
            io::ErrorKind::ConnectionRefused => Error::State("the process has ended before it was started".into()),
            _ => Error::io("cannot start the process", error),
        })?;
        *started = true;
        crate::lock(&self.directory).take();
        Ok(())
    }

    /// Whether [`Self::start`] has been done.
    pub fn was_started(&self) -> bool {
        *crate::lock(&self.started)
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        self.exit.borrow().is_some()
    }

    /// Records its end and wakes up who waits for it.
    pub fn end(&self, exit: Exit) {
        self.ends.process_ended();
        crate::lock(&self.directory).take();
        self.exit.send_replace(Some(exit));
    }

    /// How it ended; waits until it has.
    pub async fn wait(&self) -> Exit {
        let mut receiver = self.exit.subscribe();
        // The sender is in `self`, so it cannot be gone.
        receiver.wait_for(Option::is_some).await.ok().and_then(|exit| exit.clone()).unwrap_or_default()
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// It has ended, or there is no such signal.
    pub fn signal(&self, reaper: &Reaper, signal: u32) -> Result<(), Error> {
        let number = i32::try_from(signal).unwrap_or(-1);
        reaper.signal(self.pid, number).map_err(|error| match error {
            Errno::ESRCH => Error::NotFound("the process has ended".into()),
            Errno::EINVAL => Error::Invalid(format!("there is no signal {signal}")),
            error => Error::io("cannot send the signal", error.into()),
        })
    }

    /// Sets its terminal's size.
    ///
    /// # Errors
    /// It has no terminal.
    pub fn resize(&self, rows: u32, columns: u32) -> Result<(), Error> {
        let Some(master) = self.ends.terminal() else {
            return Err(Error::State("the process has no terminal".into()));
        };
        console::resize(&master, rows, columns).map_err(|error| Error::io("cannot resize the terminal", error))
    }
}
