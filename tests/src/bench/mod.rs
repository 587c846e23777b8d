//! Benchmarks with peers beside us in the same run. They count in the counting lab's time, 1 ns per instruction.

pub mod boot;
mod guest;
mod measure;
mod moments;
mod monitor;
mod process;
mod syscalls;
