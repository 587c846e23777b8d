//! When a guest's boot reaches its stations, from KVM's own trace events: they cost next to nothing, and nobody is woken
//! up for each byte of a console.

use std::time::Duration;

use anyhow::{Context as _, Result};

use super::guest::{INSTRUCTION, PRINTED};
use super::trace::{Trace, time_of};

/// A trace of the one guest that is started while it exists.
pub struct Moments(Trace);

/// A station of the boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Station {
    /// A vCPU enters the guest for the first time.
    FirstRun,
    /// The first instruction in user mode ([`INSTRUCTION`]).
    Userspace,
    /// The first line of user mode has been printed ([`PRINTED`]).
    Printed,
}

impl Moments {
    /// Begins to watch.
    ///
    /// # Errors
    /// When the kernel's tracing cannot be had.
    pub fn watch() -> Result<Self> {
        let filter = format!("function == {INSTRUCTION} || function == {PRINTED}");
        Ok(Self(Trace::new(&[
            ("events/kvm/kvm_cpuid/filter", &filter),
            ("events/kvm/kvm_cpuid/enable", "1"),
            // Only the first entry is of interest: it ends with the first exit.
            ("events/kvm/kvm_exit/trigger", "disable_event:kvm:kvm_entry:1"),
            ("events/kvm/kvm_entry/enable", "1"),
        ])?))
    }

    /// Waits for a station that is still to come, or finds it among those that have; its time by CLOCK_MONOTONIC.
    ///
    /// # Errors
    /// When it does not come.
    pub fn wait(&mut self, station: Station) -> Result<Duration> {
        loop {
            if let Some(time) = find(self.0.text(), station) {
                return Ok(time);
            }
            self.0.read().with_context(|| format!("the guest did not get to {station:?}"))?;
        }
    }
}

/// The time of the first whole line about `station`.
fn find(text: &str, station: Station) -> Option<Duration> {
    let event = match station {
        Station::FirstRun => ": kvm_entry: ".to_string(),
        Station::Userspace => format!(": kvm_cpuid: func {INSTRUCTION:x} "),
        Station::Printed => format!(": kvm_cpuid: func {PRINTED:x} "),
    };
    time_of(text, &event)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stations_are_found_in_the_trace() {
        let text = "          <...>-151     [000] d..1.     9.358188: kvm_entry: vcpu 0, rip 0x1000123\n\
                    \x20         vcpu 0-151     [000] .....     9.5: kvm_cpuid: func 4b410001 idx 0 rax 0\n\
                    \x20         vcpu 0-151     [000] .....     9.6: kvm_cpuid: func 4b410002 idx";
        assert_eq!(find(text, Station::FirstRun), Some(Duration::from_micros(9_358_188)));
        assert_eq!(find(text, Station::Userspace), Some(Duration::from_millis(9500)));
        // The line is not whole yet.
        assert_eq!(find(text, Station::Printed), None);
    }
}
