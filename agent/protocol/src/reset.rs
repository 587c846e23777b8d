//! How the guest announces its end: one byte to an I/O port that the VMM's reset device answers.
//!
//! A reset that no byte announced is a reboot or a triple fault of the guest's kernel, not an end.

/// The I/O port (x86 `out`), one byte wide.
pub const RESET_PORT: u16 = 0x5f0;
/// The agent has ended everything and synced: the VM may go.
pub const RESET_ORDERLY: u8 = 1;
/// The kernel lacks what the agent cannot do without; the console's last line names it.
pub const RESET_UNUSABLE_KERNEL: u8 = 2;
