//! How a microVM ends: the first reason counts, and everybody who waits hears of it.

use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::timeline::Timeline;

/// Why a microVM does not run any more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExitReason {
    /// The agent announced the end.
    #[error("the guest ended in order")]
    Orderly,
    /// The agent found that its kernel lacks what it needs; the console says what.
    #[error("the guest kernel lacks an option that katavm needs")]
    UnusableKernel,
    /// The guest reset its CPU without a word: reboot(2) by a foreign init.
    #[error("the guest rebooted")]
    Reset,
    /// The guest halted or powered off by itself.
    #[error("the guest halted or powered off")]
    Halted,
    /// The guest kernel panicked.
    #[error("the guest kernel panicked")]
    Panic,
    /// A CPU could not deliver an exception (KVM_EXIT_SHUTDOWN).
    #[error("the guest ended in a triple fault on vCPU {vcpu}, rip {rip:#x}")]
    TripleFault {
        /// Index of the vCPU.
        vcpu: u8,
        /// Instruction pointer, 0 when it could not be read.
        rip: u64,
    },
    /// KVM cannot run the guest any further (KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_FAIL_ENTRY).
    #[error("KVM gave up on vCPU {vcpu} at rip {rip:#x}: {what}")]
    InternalError {
        /// Index of the vCPU.
        vcpu: u8,
        /// Instruction pointer, 0 when it could not be read.
        rip: u64,
        /// KVM's suberror or exit.
        what: String,
    },
    /// The host stopped it.
    #[error("the virtual machine was stopped")]
    Stopped,
    /// A thread of the monitor failed.
    #[error("the virtual machine monitor failed: {0}")]
    Failed(String),
}

struct Shared {
    reason: Mutex<Option<ExitReason>>,
    changed: Condvar,
    event: EventFd,
    timeline: Arc<Timeline>,
}

/// The end of one microVM, shared by all of its threads.
#[derive(Clone)]
pub struct Ending(Arc<Shared>);

impl Ending {
    pub fn new(timeline: Arc<Timeline>) -> io::Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self(Arc::new(Shared { reason: Mutex::default(), changed: Condvar::new(), event, timeline })))
    }

    /// Ends the microVM for `reason`, unless it has ended already.
    pub fn end(&self, reason: ExitReason) {
        let mut current = self.0.reason.lock().unwrap_or_else(PoisonError::into_inner);
        if current.is_none() {
            *current = Some(reason);
            self.0.timeline.mark_ended();
            // Nonblocking and far from overflow: a failure leaves the condition variable, which `wait` uses.
            let _ = self.0.event.write(1);
            self.0.changed.notify_all();
        }
    }

    /// Waits for the end.
    pub fn wait(&self) -> ExitReason {
        let mut reason = self.0.reason.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match &*reason {
                Some(reason) => return reason.clone(),
                None => reason = self.0.changed.wait(reason).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// The reason, if the microVM has ended.
    pub fn reason(&self) -> Option<ExitReason> {
        self.0.reason.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Readable from the end on.
    pub fn event(&self) -> &EventFd {
        &self.0.event
    }
}

impl Ending {
    /// A guard that ends the microVM when the thread that holds it panics.
    pub fn report_panic(&self, who: &'static str) -> PanicGuard {
        PanicGuard { ending: self.clone(), who, armed: true }
    }
}

/// See [`Ending::report_panic`].
pub struct PanicGuard {
    ending: Ending,
    who: &'static str,
    armed: bool,
}

impl PanicGuard {
    /// The thread returns as it should.
    pub fn disarm(&mut self) {
        self.armed = false;
    }
}

impl Drop for PanicGuard {
    fn drop(&mut self) {
        if self.armed {
            self.ending.end(ExitReason::Failed(format!("{} panicked", self.who)));
        }
    }
}
