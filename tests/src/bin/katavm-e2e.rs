//! `katavm-e2e [--long | --systemd] [--list] [FILTER...]`: the end-to-end suite. Runs where `/dev/kvm` works: in the lab,
//! or on real hardware.
//!
//! With `--long` it also has the cases that take minutes each under emulation; with `--systemd` it has those that take
//! systemd as PID 1, and no others. `--list` prints the names of the cases and runs none.

use std::process::ExitCode;

use anyhow::Result;
use katavm_tests::e2e;

fn main() -> Result<ExitCode> {
    if let Some(code) = e2e::enter() {
        return Ok(code);
    }
    let (options, filters): (Vec<_>, Vec<_>) =
        std::env::args().skip(1).partition(|argument| argument.starts_with("--"));
    let has = |option: &str| options.iter().any(|other| other == option);
    if let Some(unknown) = options.iter().find(|option| !["--long", "--systemd", "--list"].contains(&option.as_str())) {
        anyhow::bail!("unknown option {unknown}");
    }
    let cases = if has("--systemd") { e2e::systemd_cases() } else { e2e::cases(has("--long")) };
    if has("--list") {
        cases.iter().filter(|case| case.is_wanted(&filters)).for_each(|case| println!("{}", case.full_name()));
        return Ok(ExitCode::SUCCESS);
    }
    let all_passed = e2e::run(&cases, &filters, &mut std::io::stdout())?;
    Ok(if all_passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
