//! `katavm run` on real bundles, as a person at a shell uses it.

mod basics;
mod bundle;
pub(super) mod debian;
mod errors;
pub(super) mod katavm;
mod pty;
mod streams;
mod terminal;
mod workloads;

pub use bundle::bundle;
pub use debian::Shell;

use super::Table;

/// What every run of the suite tries. The last case of the last table looks whether anything was left behind.
pub const TABLES: [Table; 5] = [basics::CASES, streams::CASES, terminal::CASES, workloads::CASES, errors::CASES];

/// The same in full size, for soaks: emulated, these take minutes each.
pub const LONG_TABLES: [Table; 2] = [streams::LONG_CASES, workloads::LONG_CASES];
