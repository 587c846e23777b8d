//! The lab's inside: what this program does when it is the machine's PID 1, or systemd's unit in it.
//!
//! A program that runs labs must call [`enter`] first thing in `main`, since the lab boots a copy of it.

mod boot;
mod command;
mod files;
mod pumps;
mod session;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Where this program and the job are once the real root is there.
const HOME: &str = "/run/katavm-lab";
/// The argument by which systemd's unit calls this program.
const AS_UNIT: &str = "--katavm-lab-unit";

/// Takes over when this process is PID 1 of a lab, or its unit; returns at once otherwise.
pub fn enter() {
    let as_unit = std::env::args().nth(1).is_some_and(|argument| argument == AS_UNIT) && Path::new(HOME).is_dir();
    if as_unit {
        session::run();
    } else if std::process::id() == 1 && Path::new(super::initrd::JOB).is_file() {
        match boot::run() {
            Ok(()) => session::run(),
            Err(error) => session::fail(&error),
        }
    }
}

/// The program that the lab boots: `$KATAVM_LAB_PROGRAM`, else the running one.
pub fn program() -> Result<PathBuf> {
    match std::env::var_os("KATAVM_LAB_PROGRAM") {
        Some(path) => Ok(path.into()),
        None => std::env::current_exe().context("cannot tell which program this is"),
    }
}
