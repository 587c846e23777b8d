//! The socket device against a scripted driver over real guest memory.

mod calls;
#[path = "../common/mod.rs"]
mod common;
mod driver;
mod garbage;
mod hostile;
mod restore;
mod shutdown;
mod streams;
