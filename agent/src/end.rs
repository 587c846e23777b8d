//! The end of the guest: announced to the VMM's reset device, or, if that does not answer, by reboot(2).

use std::fs::OpenOptions;
use std::io::Write;

use katavm_protocol::reset::RESET_PORT;
use nix::sys::reboot::{RebootMode, reboot};

/// Writes back what is dirty, announces the end with `reason` (see `katavm_protocol::reset`) and ends the VM.
pub fn end_vm(reason: u8) -> ! {
    nix::unistd::sync();
    announce(reason);
    // The announcement ends the VM; this is for a machine without the reset device.
    let _ = reboot(RebootMode::RB_AUTOBOOT);
    loop {
        nix::unistd::pause();
    }
}

#[cfg(target_arch = "x86_64")]
fn announce(reason: u8) {
    // SAFETY: ioperm(2) takes no pointer. It may be refused (no CONFIG_X86_IOPL_IOPERM): then nothing is announced.
    let allowed = unsafe { libc::ioperm(libc::c_ulong::from(RESET_PORT), 1, 1) } == 0;
    if allowed {
        reboot_on_fault();
        // SAFETY: the port was just granted by ioperm; `out` touches no memory.
        unsafe {
            std::arch::asm!("out dx, al", in("dx") RESET_PORT, in("al") reason, options(nomem, nostack, preserves_flags));
        }
    }
}

/// Where the port is refused all the same, the guest ends by a reboot instead of a panic.
///
/// QEMU's emulated SVM does so after a restore: it takes a task state segment of type 11 (busy), which is what KVM
/// writes and hardware wants, for no valid one.
#[cfg(target_arch = "x86_64")]
fn reboot_on_fault() {
    extern "C" fn reboot_now(_: libc::c_int) {
        // SAFETY: a system call without pointers, allowed in a signal handler.
        unsafe { libc::reboot(libc::RB_AUTOBOOT) };
    }
    let handler: extern "C" fn(libc::c_int) = reboot_now;
    // SAFETY: the handler only makes one async-signal-safe call, which does not return.
    unsafe { libc::signal(libc::SIGSEGV, handler as libc::sighandler_t) };
}

#[cfg(not(target_arch = "x86_64"))]
fn announce(_reason: u8) {}

/// Prints a line on the console, whatever the kernel's log level.
pub fn print_on_console(line: &str) {
    if let Ok(mut console) = OpenOptions::new().write(true).open("/dev/console") {
        // It is the last resort: nothing can be done if it fails.
        let _ = console.write_all(format!("katavm-agent: {line}\r\n").as_bytes());
    }
}

/// Has a panic say its reason on the console before PID 1 dies and takes the kernel with it.
pub fn install_panic_hook() {
    std::panic::set_hook(Box::new(|info| print_on_console(&format!("panic: {info}"))));
}

/// Prints a line on standard error.
pub fn print_to_stderr(line: &str) {
    let _ = writeln!(std::io::stderr(), "katavm-agent: {line}");
}
