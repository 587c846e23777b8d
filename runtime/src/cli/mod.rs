//! The command line.

mod arguments;
mod background;
mod check;
mod config;
mod console;
mod control;
mod create;
mod delete;
mod events;
mod exec;
mod features;
mod gc;
mod member;
mod messages;
mod pid_file;
mod ps;
mod run;
mod spec;
mod state;
mod update;

use std::process::ExitCode;

use anyhow::Context;
use clap::{CommandFactory, Parser};

use crate::host;
use crate::launch;
use crate::sandbox::size::SizeOptions;
use crate::settings::Settings;
use crate::state::{Found, Id, StateRoot};
use crate::timings::Timings;
pub use arguments::LogFormat;
use arguments::{Arguments, Command, Config, Global, Machine};
pub use features::described_features;
pub use messages::log_to;

/// What every failure of katavm itself ends with, as with runc.
const FAILURE: u8 = 1;
/// The same of `exec`, whose other codes are the process' own.
const EXEC_FAILURE: u8 = 255;

/// What the command line looks like, for those who write about it.
#[must_use]
pub fn definition() -> clap::Command {
    Arguments::command()
}

/// Runs the command line of this process.
#[must_use]
pub fn main() -> ExitCode {
    host::note_inherited();
    let timings = Timings::start();
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // What --help and --version print goes to standard output; nothing can be done if that is closed.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(FAILURE) } else { ExitCode::SUCCESS };
        }
    };
    let failure = if matches!(arguments.command, Command::Exec(_)) { EXEC_FAILURE } else { FAILURE };
    match dispatch(arguments, timings) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let text = format!("{error:#}");
            messages::error(&text);
            ExitCode::from(failure)
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
        Command::Create(options) => create::create(&global, options),
        Command::Start(options) => control::start(&global, &options.id),
        Command::State(options) => state::state(&global, &options.id),
        Command::List(options) => state::list(&global, &options),
        Command::Ps(options) => ps::ps(&global, &options),
        Command::Exec(options) => exec::exec(&global, options),
        Command::Kill(options) => control::kill(&global, &options),
        Command::Delete(options) => delete::delete(&global, &options),
        Command::Pause(options) => control::pause(&global, &options.id),
        Command::Resume(options) => control::resume(&global, &options.id),
        Command::Update(options) => update::update(&global, &options),
        Command::Events(options) => events::events(&global, &options),
        Command::Spec(options) => spec::spec(&options),
        Command::Features => features::features(),
        Command::Check(options) => Ok(check::check(&global, &options)),
        Command::Gc => gc::gc(&global),
        Command::Config(Config::Show) => config::show(&global),
    }
}

/// Opens the state root and removes what dead sandboxes left in it.
fn state_root(global: &Global) -> anyhow::Result<StateRoot> {
    let root = StateRoot::open(global.root.clone().unwrap_or_else(crate::state::default_root))?;
    let swept = root.sweep().context("cannot sweep up after dead containers")?;
    for id in swept {
        log::info!("removed what was left of container {id}");
    }
    Ok(root)
}

/// A container that must be there.
fn find(global: &Global, id: &Id) -> anyhow::Result<Found> {
    Ok(state_root(global)?.find(id)?)
}

fn launch_options(global: &Global, machine: Machine, console: bool) -> anyhow::Result<launch::Options> {
    let Machine { cpus, memory, kernel, initrd } = machine;
    let settings = Settings::load(global.config.as_deref())?;
    let size = SizeOptions { memory, cpus, ..Default::default() };
    Ok(launch::Options {
        size,
        kernel,
        initrd,
        console,
        systemd_cgroup: Some(global.systemd_cgroup),
        settings,
        user_network: None,
    })
}
