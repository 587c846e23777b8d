//! Running without a lab, where this machine's own `/dev/kvm` runs stock guests.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use super::job::Job;

/// Whether `katavm check` in this folder of binaries says that this machine runs guests.
///
/// False without the program: then nothing here could use `/dev/kvm` anyway.
#[must_use]
pub fn possible(bin_dir: &Path) -> bool {
    let katavm = bin_dir.join("katavm");
    katavm.is_file()
        && Command::new(katavm)
            .args(["check", "--quiet"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
}

/// Runs the job's command on this machine, with its folder and environment; gives its exit code.
///
/// # Errors
/// When it cannot be started.
pub fn run(job: &Job) -> Result<i32> {
    let (program, arguments) = job.argv.split_first().context("no command")?;
    let status = Command::new(program)
        .args(arguments)
        .envs(job.env.iter().map(|(name, value)| (name, value)))
        .env_remove("KATAVM_LAB")
        .current_dir(&job.cwd)
        .status()
        .with_context(|| format!("cannot run {program}"))?;
    Ok(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)))
}
