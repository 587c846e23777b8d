//! The command line.

mod arguments;
mod check;
mod gc;
mod messages;
mod run;

use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;

use crate::host;
use crate::state::{self, StateRoot};
use crate::timings::Timings;
use arguments::{Arguments, Command, Global};

/// What every failure of katavm itself ends with, as with runc.
const FAILURE: u8 = 1;

/// Runs the command line of this process.
#[must_use]
pub fn main() -> ExitCode {
    let timings = Timings::start();
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // What --help and --version print goes to standard output; nothing can be done if that is closed.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(FAILURE) } else { ExitCode::SUCCESS };
        }
    };
    match dispatch(arguments, timings) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let text = format!("{error:#}");
            messages::error(&text);
            ExitCode::from(FAILURE)
        }
    }
}

fn dispatch(arguments: Arguments, timings: Timings) -> anyhow::Result<u8> {
    let Arguments { global, command } = arguments;
    messages::start(&global)?;
    if let Err(error) = host::raise_open_files() {
        log::warn!("cannot raise the limit of open files: {error}");
    }
    match command {
        Command::Run(options) => run::run(&global, options, timings),
        Command::Check(options) => Ok(check::check(&global, &options)),
        Command::Gc => gc::gc(&global),
    }
}

/// Opens the state root and removes what dead sandboxes left in it.
fn state_root(global: &Global) -> anyhow::Result<StateRoot> {
    let root = StateRoot::open(global.root.clone().unwrap_or_else(state::default_root))?;
    let swept = root.sweep().context("cannot sweep up after dead containers")?;
    for id in swept {
        log::info!("removed what was left of container {id}");
    }
    Ok(root)
}
