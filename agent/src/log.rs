//! Log lines go to /dev/kmsg and from there, by the kernel's log level, to the console.
//!
//! Every byte on the console is a VM exit, so below "error" nothing is written unless the kernel command line says
//! `katavm.log=debug`.

use std::fmt::Arguments;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

static DEBUG: AtomicBool = AtomicBool::new(false);
static KMSG: OnceLock<Option<File>> = OnceLock::new();

/// Lets debug lines through.
pub fn enable_debug() {
    DEBUG.store(true, Ordering::Relaxed);
}

/// Whether debug lines are written.
pub fn debug_enabled() -> bool {
    DEBUG.load(Ordering::Relaxed)
}

/// Writes one line at kernel log level `level` (`/dev/kmsg` takes `<level>` prefixes).
pub fn write(level: u8, line: Arguments<'_>) {
    let kmsg = KMSG.get_or_init(|| OpenOptions::new().write(true).open("/dev/kmsg").ok());
    if let Some(mut kmsg) = kmsg.as_ref() {
        // One write is one record; there is nowhere to report a failed one.
        let _ = kmsg.write_all(format!("<{level}>katavm-agent: {line}\n").as_bytes());
    }
}

/// A line for whoever looks for the cause of a failure.
#[macro_export]
macro_rules! error {
    ($($arg:tt)*) => { $crate::log::write(3, format_args!($($arg)*)) };
}

/// A line that is written with `katavm.log=debug` only, and then reaches the console.
#[macro_export]
macro_rules! debug {
    ($($arg:tt)*) => { if $crate::log::debug_enabled() { $crate::log::write(3, format_args!($($arg)*)) } };
}
