//! The lab in which katavm is tried, and what the end-to-end tests and benchmarks share.

pub mod bench;
pub mod cri;
pub mod e2e;
pub mod files;
pub mod lab;
