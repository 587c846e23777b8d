//! Device models of katavm: the virtio-mmio transport, one folder per virtio device, and the few legacy ones.
//!
//! No KVM, no async, no OCI in here: a device sees guest memory, eventfds and its own host resources, so
//! every one of them is driven in tests by a scripted driver without any virtual machine.
//! Everything that comes from the guest is hostile (see `docs/security.md`).

pub mod balloon;
pub mod block;
pub mod fs;
pub mod legacy;
pub mod mem;
pub mod memory;
pub mod net;
pub mod rate;
pub mod rng;
pub mod virtio;
pub mod vsock;
