//! A record and where it is written down.

use super::{Record, StateDir, Status};

/// The record of a container whose sandbox process is this one. Each change is on disk when the call returns.
#[derive(Debug)]
pub struct Journal {
    /// Nothing once the container is forgotten.
    directory: Option<StateDir>,
    record: Record,
}

impl Journal {
    /// Writes down a first record. What cannot be written is warned of: a container does not end for it.
    #[must_use]
    pub fn new(directory: StateDir, record: Record) -> Self {
        let mut journal = Self { directory: Some(directory), record };
        journal.write();
        journal
    }

    /// What is known.
    #[must_use]
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Changes how far the container is.
    pub fn set_status(&mut self, status: Status) {
        self.record.status = status;
        self.write();
    }

    /// The container is there to stay until it is deleted.
    pub fn keep(&mut self) {
        self.record.kept = true;
        self.write();
    }

    /// The container is deleted, and its sandbox goes on: what is written down holds for that, and goes when this is
    /// dropped.
    pub fn retire(&mut self) {
        self.record.kept = false;
        self.write();
        if let Some(Err(error)) = self.directory.as_mut().map(StateDir::retire) {
            log::warn!("{error}");
        }
    }

    /// Removes everything.
    pub fn forget(&mut self) {
        self.record.kept = false;
        self.write();
        self.directory = None;
    }

    fn write(&mut self) {
        if let Some(directory) = &mut self.directory
            && let Err(error) = directory.write(&self.record)
        {
            log::warn!("{error}");
        }
    }
}
