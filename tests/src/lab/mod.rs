//! The lab: a disposable Debian machine with a real `kvm_amd`, run by QEMU's software emulation.
//!
//! A [`Lab`] is a checkout, a folder of binaries and the built artefacts. [`Lab::run`] boots one machine for one
//! [`Job`] and gives its [`Outcome`]. The machine's PID 1 is the same program that started it (see [`guest`]).

mod artefacts;
pub mod direct;
pub mod guest;
mod initrd;
mod job;
mod monitor;
mod places;
mod qemu;
mod session;
mod streams;
mod terminal;
pub mod wire;

pub use artefacts::Artefacts;
pub use job::{Access, Job, Machine, Share};
pub use places::Places;
pub use session::{Failure, Outcome};
pub use streams::Streams;
pub use terminal::{RawMode, block_signals, size_or_default as terminal_size};

use anyhow::Result;
use katavm_guest_image::support::step::say;

/// How often a machine that died before the command started is started again.
const BOOT_TRIES: u32 = 4;

/// Everything that is needed to run jobs.
#[derive(Debug, Clone)]
pub struct Lab {
    artefacts: Artefacts,
    places: Places,
    /// How often a job whose machine crashed in the middle is run again (its input must then be repeatable).
    pub retry_crash: u32,
}

impl Lab {
    /// Builds what is missing and gives a lab for these places.
    ///
    /// # Errors
    /// When a prerequisite cannot be installed or an artefact cannot be built.
    pub fn new(places: Places) -> Result<Self> {
        Ok(Self { artefacts: Artefacts::build()?, places, retry_crash: 0 })
    }

    /// The folders that the lab shows.
    #[must_use]
    pub fn places(&self) -> &Places {
        &self.places
    }

    /// A job for a shell command, with this lab's folders, search path and working folder.
    #[must_use]
    pub fn shell(&self, command: &str) -> Job {
        self.places.job(vec!["/bin/bash".into(), "-c".into(), command.into()])
    }

    /// Runs one job in a machine of its own. Started again by itself when the machine failed before the job started.
    ///
    /// # Errors
    /// When the machine cannot be started at all; a machine that dies is [`Outcome::Crashed`].
    pub fn run(&self, job: &Job, machine: &Machine, streams: Streams) -> Result<Outcome> {
        let (mut boots, mut crashes) = (0, 0);
        let mut streams = Some(streams);
        loop {
            let Some(used) = streams.take() else { unreachable!("streams are given back for another try") };
            let (outcome, back) = session::run(&self.artefacts, job, machine, used)?;
            let Outcome::Crashed(failure) = &outcome else { return Ok(outcome) };
            let again = if failure.started {
                crashes += 1;
                crashes <= self.retry_crash
            } else {
                boots += 1;
                boots < BOOT_TRIES
            };
            match back {
                Some(back) if again => streams = Some(back),
                _ => return Ok(outcome),
            }
            say(&format!("the lab's own machine failed ({}); starting it again", failure.reason));
        }
    }
}
