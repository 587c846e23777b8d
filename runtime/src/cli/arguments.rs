//! What the command line looks like.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::sandbox::size::{DEFAULT_MEMORY_MIB, DEFAULT_VCPUS, MINIMUM_MEMORY_MIB, MemorySize};
use crate::state::Id;

/// Runs containers, each in a virtual machine of its own.
#[derive(Debug, Parser)]
#[command(name = "katavm", version, max_term_width = 100)]
pub struct Arguments {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// Options of all commands.
#[derive(Debug, Args)]
pub struct Global {
    /// Folder for the state of running containers [default: /run/katavm, or $XDG_RUNTIME_DIR/katavm for a user who is not root]
    #[arg(long, global = true, value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// Write warnings and other messages to this file, and nowhere else
    #[arg(long, global = true, value_name = "FILE")]
    pub log: Option<PathBuf>,
    /// How the lines of --log look
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text, value_name = "FORMAT")]
    pub log_format: LogFormat,
    /// What to tell of: error, warn, info, debug or trace
    #[arg(long, global = true, default_value = "warn", value_name = "LEVEL", value_parser = level)]
    pub log_level: log::LevelFilter,
}

/// runc's names for levels as well: engines pass them on.
fn level(text: &str) -> Result<log::LevelFilter, String> {
    match text {
        "warning" => Ok(log::LevelFilter::Warn),
        "fatal" | "panic" => Ok(log::LevelFilter::Error),
        other => other.parse().map_err(|_| "one of error, warn, info, debug, trace".to_owned()),
    }
}

/// How the lines of a log file look: those of runc.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// time="..." level=warning msg="..."
    Text,
    /// One JSON object per line
    Json,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the container of a bundle, with its streams and signals, and end with its exit code
    Run(Run),
    /// Find out whether this host can run guests, and say what to do if not
    Check(Check),
    /// Remove what killed sandboxes have left behind
    Gc,
}

/// Options of `run`.
#[derive(Debug, Args)]
pub struct Run {
    /// The folder that holds config.json and the root file system
    pub bundle: PathBuf,
    /// The container's name [default: a random one]
    #[arg(long, value_name = "ID")]
    pub id: Option<Id>,
    #[arg(long, value_name = "N", help = format!("CPUs of the guest [default: from the bundle's CPU limit, else {DEFAULT_VCPUS}]"))]
    pub cpus: Option<u32>,
    #[arg(long, value_name = "SIZE", help = format!(
        "Memory of the guest: 512, 512M, 1G; at least {MINIMUM_MEMORY_MIB}M [default: from the bundle's memory limit, else {DEFAULT_MEMORY_MIB}M]"))]
    pub memory: Option<MemorySize>,
    /// The guest's kernel: an ELF vmlinux or a bzImage [default: the installed guest image's]
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// The guest's initramfs, with the agent in it [default: the installed guest image's]
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Copy the guest's console to standard error
    #[arg(long)]
    pub console: bool,
    /// Tell on standard error, at the end, when the steps happened
    #[arg(long, value_enum, value_name = "FORMAT", num_args = 0..=1, require_equals = true, default_missing_value = "table")]
    pub timings: Option<TimingsFormat>,
}

/// How timings are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TimingsFormat {
    /// For people
    Table,
    /// One line of JSON, nanoseconds
    Json,
}

/// Options of `check`.
#[derive(Debug, Args)]
pub struct Check {
    /// Say nothing: the exit code tells
    #[arg(long, short)]
    pub quiet: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(arguments: &[&str]) -> Run {
        let all = ["katavm", "run"].iter().chain(arguments);
        match Arguments::try_parse_from(all).unwrap().command {
            Command::Run(run) => run,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_definition_holds() {
        use clap::CommandFactory;
        Arguments::command().debug_assert();
    }

    #[test]
    fn timings_may_stand_before_the_bundle() {
        assert_eq!(run(&["--timings", "bundle"]).timings, Some(TimingsFormat::Table));
        assert_eq!(run(&["--timings=json", "bundle"]).timings, Some(TimingsFormat::Json));
        assert_eq!(run(&["bundle"]).timings, None);
    }

    #[test]
    fn wrong_values_are_named() {
        for (arguments, words) in [
            (["--memory", "lots"], "write MiB as 512 or 512M"),
            (["--id", "a/b"], "invalid container id"),
            (["--cpus", "x"], "--cpus"),
        ] {
            let all = ["katavm", "run", "bundle"].iter().chain(&arguments);
            let error = Arguments::try_parse_from(all).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
