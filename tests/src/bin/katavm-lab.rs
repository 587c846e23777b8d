//! `katavm-lab`: a disposable Debian machine with a real `kvm_amd`, for tests, benchmarks and looking around.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};
use katavm_guest_image::support::step::say;
use katavm_tests::lab::{self, Access, Job, Lab, Machine, Outcome, Places, RawMode, Streams, direct};

/// Run commands in a disposable Debian machine with nested virtualization.
#[derive(Parser)]
#[command(name = "katavm-lab", version)]
struct Cli {
    #[command(subcommand)]
    command: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Build what the lab needs.
    Setup,
    /// Run a command; its exit code and streams are passed through (124: time limit, 125: the lab failed).
    Run {
        #[command(flatten)]
        options: Options,
        /// Seconds after which the lab is ended.
        #[arg(long, value_name = "SECONDS", default_value_t = 600)]
        limit: u64,
        /// Give the command a terminal.
        #[arg(long, short)]
        tty: bool,
        /// Run it again if the lab crashed in the middle (its stdin must not be needed).
        #[arg(long, value_name = "N", default_value_t = 0)]
        retry_crash: u32,
        /// A shell command if it is one word, else a program and its arguments.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Look around in a shell.
    Shell {
        #[command(flatten)]
        options: Options,
    },
}

#[derive(Args)]
struct Options {
    /// Use the lab even where this machine's /dev/kvm runs guests.
    #[arg(long)]
    lab: bool,
    /// The clock counts executed instructions, 1 ns each; one CPU.
    #[arg(long)]
    counting: bool,
    /// Boot systemd and run the command as a unit of it.
    #[arg(long)]
    systemd: bool,
    /// Memory, in M or G.
    #[arg(long, value_name = "SIZE", default_value = "8G", value_parser = mebibytes)]
    memory: u32,
    /// CPUs.
    #[arg(long, value_name = "N", default_value_t = 2)]
    cpus: u32,
    /// The folder of katavm and the shim, first in PATH [default: $KATAVM_BIN_DIR, else the lab profile's folder].
    #[arg(long, value_name = "DIR")]
    bin_dir: Option<PathBuf>,
    /// Show another folder, read-only, at its own path.
    #[arg(long, value_name = "DIR")]
    share: Vec<PathBuf>,
    /// The same, and what is written there is forgotten at the end.
    #[arg(long, value_name = "DIR")]
    scratch: Vec<PathBuf>,
    /// The same, and what is written there is written outside.
    #[arg(long, value_name = "DIR")]
    writable: Vec<PathBuf>,
    /// Set a variable of the command's environment.
    #[arg(long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Write the machine's console to this file.
    #[arg(long, value_name = "FILE")]
    console: Option<PathBuf>,
}

fn main() -> ExitCode {
    lab::guest::enter();
    match act(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            say(&format!("error: {error:#}"));
            ExitCode::from(125)
        }
    }
}

fn act(action: Action) -> Result<ExitCode> {
    match action {
        Action::Setup => {
            Lab::new(Places::find(None)?)?;
            Ok(ExitCode::SUCCESS)
        }
        Action::Run { options, limit, tty, retry_crash, command } => {
            let places = options.places()?;
            let mut job = places.job(words(command));
            options.adjust(&mut job)?;
            if !options.lab && !options.counting && !options.systemd && direct::possible(&places.bin_dir) {
                say("this machine's /dev/kvm runs guests: running the command directly");
                return Ok(exit(direct::run(&job)?));
            }
            if tty {
                job.terminal = Some(lab::terminal_size());
            }
            let mut lab = Lab::new(places)?;
            lab.retry_crash = retry_crash;
            run(&lab, &job, &options.machine(Duration::from_secs(limit)), tty)
        }
        Action::Shell { options } => {
            let places = options.places()?;
            let mut job = places.job(vec!["/bin/bash".into(), "-i".into()]);
            options.adjust(&mut job)?;
            job.terminal = Some(lab::terminal_size());
            let lab = Lab::new(places)?;
            run(&lab, &job, &options.machine(Duration::from_secs(7 * 24 * 3600)), true)
        }
    }
}

impl Options {
    fn places(&self) -> Result<Places> {
        let mut places = Places::find(self.bin_dir.clone())?;
        let lists =
            [(&self.share, Access::ReadOnly), (&self.scratch, Access::Scratch), (&self.writable, Access::Writable)];
        for (folders, access) in lists {
            for folder in folders {
                let path = folder.canonicalize().with_context(|| format!("cannot share {}", folder.display()))?;
                places.extra.push((path, access));
            }
        }
        Ok(places)
    }

    fn adjust(&self, job: &mut Job) -> Result<()> {
        job.systemd = self.systemd;
        // With a counting clock an idle machine's five seconds pass in no time.
        job.heartbeat = !self.counting;
        for setting in &self.env {
            let Some((name, value)) = setting.split_once('=') else { bail!("--env {setting}: give NAME=VALUE") };
            job.set_env(name, value);
        }
        Ok(())
    }

    fn machine(&self, limit: Duration) -> Machine {
        Machine {
            memory_mib: self.memory,
            cpus: self.cpus,
            counting: self.counting,
            limit,
            console: self.console.clone(),
        }
    }
}

fn run(lab: &Lab, job: &Job, machine: &Machine, raw: bool) -> Result<ExitCode> {
    lab::block_signals()?;
    let mode = if raw { RawMode::enter().ok() } else { None };
    let outcome = lab.run(job, machine, Streams::inherit()?)?;
    drop(mode);
    Ok(match outcome {
        Outcome::Exited(code) => exit(code),
        Outcome::TimedOut(limit) => {
            say(&format!("the lab was ended at its time limit of {} s", limit.as_secs()));
            exit(124)
        }
        Outcome::Signalled(number) => exit(128 + number),
        Outcome::Crashed(failure) => {
            let when = if failure.started { "while the command ran" } else { "before the command started" };
            say(&format!(
                "the lab itself failed {when}: {}; the end of its console:\n{}",
                failure.reason, failure.console
            ));
            exit(125)
        }
    })
}

/// One word is for the shell, several are an argument vector.
fn words(command: Vec<String>) -> Vec<String> {
    if command.len() == 1 {
        return ["/bin/bash", "-c"].map(String::from).into_iter().chain(command).collect();
    }
    command
}

fn exit(code: i32) -> ExitCode {
    ExitCode::from(u8::try_from(code).unwrap_or(125))
}

fn mebibytes(text: &str) -> Result<u32, String> {
    let (number, factor) = match text.as_bytes().last() {
        Some(b'G' | b'g') => (&text[..text.len() - 1], 1024),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 1),
        _ => return Err("give a size such as 8G or 512M".into()),
    };
    number
        .parse::<u32>()
        .ok()
        .and_then(|number| number.checked_mul(factor))
        .ok_or_else(|| format!("{number} is not a number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_need_a_unit() {
        assert_eq!(mebibytes("8G"), Ok(8192));
        assert_eq!(mebibytes("512M"), Ok(512));
        assert!(mebibytes("8192").is_err() && mebibytes("xG").is_err() && mebibytes("").is_err());
    }

    #[test]
    fn one_word_is_a_shell_command() {
        assert_eq!(words(vec!["a; b".into()]), ["/bin/bash", "-c", "a; b"]);
        assert_eq!(words(vec!["a".into(), "b".into()]), ["a", "b"]);
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
