//! Cases that are scripts of the shell, as people type them.

use std::process::Command;

use anyhow::{Result, ensure};

use super::Context;

/// Seconds that a script may take, emulated and on a busy machine.
const LIMIT: &str = "600";

/// Runs a script of bash with `set -u` in the case's folder, and gives its standard output; its end must be good.
pub fn script(context: &Context, text: &str) -> Result<String> {
    let output = Command::new("timeout")
        .args(["-k", "5", LIMIT, "bash", "-euc", text])
        .current_dir(context.scratch())
        .output()?;
    context.note("stdout", output.stdout.clone());
    context.note("stderr", output.stderr.clone());
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    if !output.status.success() {
        // The next case finds a clean host all the same.
        let clean = "for id in $(katavm list -q); do katavm delete --force $id; done";
        Command::new("timeout").args(["-k", "5", LIMIT, "sh", "-c", clean]).output()?;
    }
    ensure!(output.status.success(), "{}: {told}", output.status);
    Ok(String::from_utf8(output.stdout)?)
}

/// Asks for exactly these lines.
pub fn expect(output: &str, lines: &[&str]) -> Result<()> {
    let got: Vec<_> = output.lines().collect();
    ensure!(got == lines, "{got:#?} instead of {lines:#?}");
    Ok(())
}
