//! Benchmarks with peers beside us in the same run. They count in the counting lab's time, 1 ns per instruction.

pub mod boot;
mod bundle;
mod clock;
mod guest;
pub mod io;
mod measure;
mod moments;
mod monitor;
pub mod oci;
mod plot;
pub mod pod;
mod process;
mod syscalls;
mod trace;
