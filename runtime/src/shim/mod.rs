//! `containerd-shim-katavm-v2`: what containerd runs for a pod, by its contract for shims (runtime v2).
//!
//! `start` leaves a server process behind and prints its address. That process is the pod's sandbox process.

mod address;
mod arguments;
mod bootstrap;
mod containerd;
mod containers;
mod delete;
mod events;
mod info;
mod input;
mod io;
mod layers;
mod logger;
mod logging;
mod options;
mod orphans;
mod rootfs;
mod sandbox;
mod server;
mod service;
mod start;
mod uri;

use std::io::Write;
use std::process::ExitCode;

use crate::host;
use arguments::{Action, Arguments};

/// The program's name.
const NAME: &str = "containerd-shim-katavm-v2";

/// Runs the command line of this process.
#[must_use]
pub fn main() -> ExitCode {
    host::note_inherited();
    match Arguments::parse(std::env::args().skip(1)).and_then(|arguments| run(&arguments)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody reads a closed standard error.
            let _ = writeln!(std::io::stderr(), "{NAME}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let mut out = std::io::stdout();
    match arguments.action {
        Action::Version => writeln!(out, "{NAME}:\n  Version: {}", env!("CARGO_PKG_VERSION"))?,
        Action::Info => out.write_all(&info::info()?)?,
        Action::Start => out.write_all(&start::start(arguments)?)?,
        Action::Delete => out.write_all(&delete::delete(arguments)?)?,
        Action::Serve => server::serve(arguments)?,
    }
    Ok(())
}
