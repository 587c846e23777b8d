//! Getting a vCPU out of KVM_RUN from another thread.

use std::io;
use std::os::raw::c_int;
use std::sync::Once;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

/// The signal that interrupts KVM_RUN. It is sent to one exact thread, and its handler does nothing.
fn signal() -> c_int {
    SIGRTMIN()
}

extern "C" fn nothing(_: c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Installs the handler, once per process: without one, the signal would end the process.
pub fn install() -> io::Result<()> {
    static INSTALLED: Once = Once::new();
    let mut result = Ok(());
    INSTALLED.call_once(|| result = register_signal_handler(signal(), nothing).map_err(Into::into));
    result
}

/// Reaches one vCPU thread.
pub struct Kicker {
    /// `kvm_run.immediate_exit` of the vCPU.
    immediate_exit: *const AtomicU8,
    thread: libc::pid_t,
}

// SAFETY: the pointer is only used for atomic accesses, and the owner of the thread handle keeps the
// page that it points into mapped until the thread was joined.
unsafe impl Send for Kicker {}
// SAFETY: as above.
unsafe impl Sync for Kicker {}

impl Kicker {
    /// For the calling thread, which runs `vcpu`.
    pub fn new(vcpu: &mut VcpuFd) -> Self {
        let field = &raw mut vcpu.get_kvm_run().immediate_exit;
        // SAFETY: gettid takes nothing and cannot fail.
        Self { immediate_exit: field.cast(), thread: unsafe { libc::gettid() } }
    }

    /// Makes the current or the next KVM_RUN of the vCPU return.
    ///
    /// Not to be called after the thread has returned.
    pub fn kick(&self) {
        // SAFETY: the page is mapped while the thread lives (see `VcpuThread`), and a byte is atomic.
        unsafe { &*self.immediate_exit }.store(1, Ordering::Release);
        // SAFETY: sends a signal with a harmless handler to a thread of this process that has not been joined.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), self.thread, signal()) };
    }
}
