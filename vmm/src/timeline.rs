//! When the steps of a boot happened.

use std::sync::atomic::{AtomicU64, Ordering};

/// Moments of a microVM's life in nanoseconds of CLOCK_BOOTTIME, zero while they have not come.
#[derive(Debug, Default)]
pub struct Timeline {
    vm_created: AtomicU64,
    first_run: AtomicU64,
    ended: AtomicU64,
}

/// Now, in nanoseconds of CLOCK_BOOTTIME, which counts as /proc/PID/stat's start times do.
#[must_use]
pub fn now() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    time.tv_sec.unsigned_abs() * 1_000_000_000 + time.tv_nsec.unsigned_abs()
}

impl Timeline {
    /// KVM_CREATE_VM returned.
    #[must_use]
    pub fn vm_created(&self) -> u64 {
        self.vm_created.load(Ordering::Relaxed)
    }

    /// The first vCPU was about to enter the guest for the first time.
    #[must_use]
    pub fn first_run(&self) -> u64 {
        self.first_run.load(Ordering::Relaxed)
    }

    /// The guest had ended.
    #[must_use]
    pub fn ended(&self) -> u64 {
        self.ended.load(Ordering::Relaxed)
    }

    pub(crate) fn mark_created(&self) {
        mark(&self.vm_created);
    }

    pub(crate) fn mark_first_run(&self) {
        mark(&self.first_run);
    }

    pub(crate) fn mark_ended(&self) {
        mark(&self.ended);
    }
}

fn mark(moment: &AtomicU64) {
    // Called at every exit of a vCPU: the clock is read for the first one only.
    if moment.load(Ordering::Relaxed) == 0 {
        let _ = moment.compare_exchange(0, now(), Ordering::Relaxed, Ordering::Relaxed);
    }
}
