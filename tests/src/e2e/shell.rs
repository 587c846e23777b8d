//! Cases that are scripts of the shell, as people type them.

use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::{Context, limit};

/// How long before its limit a script is looked at: what is waited for is still there then.
const BEFORE: Duration = Duration::from_secs(10);

/// Runs a script of bash with `set -u` in the case's folder, and gives its standard output; its end must be good.
pub fn script(context: &Context, text: &str) -> Result<String> {
    let limit = context.script_limit().as_secs().max(1).to_string();
    let late = context.script_limit().saturating_sub(BEFORE);
    let look = limit::look(late)?;
    let output = Command::new("timeout")
        .args(["-k", "5", &limit, "bash", "-euc", text])
        .current_dir(context.scratch())
        .output()?;
    context.note("stdout", output.stdout.clone());
    context.note("stderr", output.stderr.clone());
    let mut told = String::from_utf8_lossy(&output.stderr).into_owned();
    if let Some(threads) = look.end() {
        told.push_str(&format!("what threads waited for after {} s:\n{threads}", late.as_secs()));
    }
    if !output.status.success() {
        // The next case finds a clean host all the same.
        let clean = "for id in $(katavm list -q); do katavm delete --force $id; done";
        Command::new("timeout").args(["-k", "5", &limit, "sh", "-c", clean]).output()?;
    }
    let written = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{}: {told}it had written:\n{written}", output.status);
    Ok(String::from_utf8(output.stdout)?)
}

/// Asks for exactly these lines.
pub fn expect(output: &str, lines: &[&str]) -> Result<()> {
    let got: Vec<_> = output.lines().collect();
    ensure!(got == lines, "{got:#?} instead of {lines:#?}");
    Ok(())
}
