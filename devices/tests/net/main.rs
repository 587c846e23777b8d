//! The network device behind its transport, on sockets and on a real tap.

#[path = "../common/mod.rs"]
mod common;

mod driver;
mod limits;
mod link;
mod receive;
mod restore;
mod several;
mod stream;
mod tap;
mod transmit;
