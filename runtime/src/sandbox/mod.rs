//! The sandbox: a microVM with the agent in it.
pub mod plan;
pub mod size;
