//! The cgroup v2 tree: all controllers handed on to the containers' groups.
//!
//! The agent stays in the root, which alone may have both processes and controllers: to move it would wait for an RCU
//! grace period, 10 ms of a boot.

use std::fs;

use crate::cgroup::{CONTAINERS, ROOT};
use crate::error::Error;
use crate::room;

/// Makes the group of the containers' groups.
///
/// # Errors
/// Which file could not be written.
pub fn prepare() -> Result<(), Error> {
    let available = fs::read_to_string(format!("{ROOT}/cgroup.controllers"))
        .map_err(|error| Error::io(format_args!("cannot read {ROOT}/cgroup.controllers"), error))?;
    let all: Vec<String> = available.split_ascii_whitespace().map(|name| format!("+{name}")).collect();
    let all = all.join(" ");
    write(&format!("{ROOT}/cgroup.subtree_control"), &all)?;
    make(CONTAINERS)?;
    room::set(0)?;
    write(&format!("{CONTAINERS}/cgroup.subtree_control"), &all)
}

fn make(path: &str) -> Result<(), Error> {
    fs::create_dir(path).map_err(|error| Error::io(format_args!("cannot make {path}"), error))
}

fn write(path: &str, value: &str) -> Result<(), Error> {
    fs::write(path, value).map_err(|error| Error::io(format_args!("cannot write {value:?} to {path}"), error))
}
