//! Benchmarks with peers beside us in the same run. They count in the counting lab's time, 1 ns per instruction.

pub mod boot;
mod bundle;
mod clock;
mod guest;
mod hangs;
mod measure;
mod moments;
mod monitor;
pub mod oci;
mod plot;
pub mod pod;
mod process;
mod syscalls;
