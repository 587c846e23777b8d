//! Debian packages that a build step needs on this machine.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::step::say;

/// Installs those of `packages` that are missing, with `apt-get`; by sudo when not root.
///
/// # Errors
/// When the machine has no `dpkg`/`apt-get`, when neither root nor sudo is to be had, or when the installation fails.
pub fn ensure(packages: &[&str]) -> Result<()> {
    let mut missing = Vec::new();
    for package in packages {
        if !installed(package)? {
            missing.push(*package);
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    say(&format!("installing Debian packages: {}", missing.join(" ")));
    apt_get(&["update", "-q"])?;
    let mut args = vec!["install", "-y", "-q", "--no-install-recommends"];
    args.extend(missing);
    apt_get(&args)
}

fn installed(package: &str) -> Result<bool> {
    let output = Command::new("dpkg-query")
        .args(["-W", "-f", "${Status}", package])
        .stderr(Stdio::null())
        .output()
        .context("cannot run dpkg-query: katavm's build recipes need Debian 12 or 13")?;
    Ok(output.stdout.ends_with(b" installed"))
}

fn apt_get(args: &[&str]) -> Result<()> {
    // SAFETY: geteuid only reads the caller's credentials and cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    let mut command = if root { Command::new("apt-get") } else { Command::new("sudo") };
    if !root {
        command.args(["env", "DEBIAN_FRONTEND=noninteractive", "apt-get"]);
    }
    // A machine that has just started may be installing its own updates.
    command.args(["-o", "DPkg::Lock::Timeout=600"]);
    // apt-get's chatter goes to stderr: stdout belongs to the caller's own result.
    let status = command
        .args(args)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .stdout(std::io::stderr())
        .status()
        .context("cannot run apt-get (as root or by sudo)")?;
    if !status.success() {
        bail!("apt-get {} ended with {status}", args.join(" "));
    }
    Ok(())
}
