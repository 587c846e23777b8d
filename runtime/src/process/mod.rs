//! The container's first process as its user on the host meets it: streams, terminal, signals.

pub mod signals;
pub mod stdio;
pub mod terminal;
