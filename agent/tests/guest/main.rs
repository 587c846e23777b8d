//! The agent as PID 1 of a real kernel, in QEMU without KVM: no VMM of ours and no vsock are needed for it.
//!
//! One program in three roles. On the host it packs itself and the agent into an initramfs, boots that and reads the
//! results from the console. In the guest, as the kernel's init, it becomes the agent by exec, after it has forked a
//! driver, which speaks the protocol over unix sockets.
//!
//! `KATAVM_TEST_KERNEL` names the kernel (bzImage or PVH ELF); else it is the guest image's.

// A test program ends with a status.
#![allow(clippy::exit)]

mod cases;
mod client;
mod host;

fn main() {
    if std::process::id() == 1 { client::become_the_agent() } else { host::run() }
}
