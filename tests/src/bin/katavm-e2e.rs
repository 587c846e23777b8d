//! `katavm-e2e [--long] [FILTER...]`: the end-to-end suite. Runs where `/dev/kvm` works: in the lab, or on real hardware.
//!
//! With `--long` it also has the cases that take minutes each under emulation.

use std::process::ExitCode;

use anyhow::Result;
use katavm_tests::e2e;

fn main() -> Result<ExitCode> {
    let (options, filters): (Vec<_>, Vec<_>) = std::env::args().skip(1).partition(|argument| argument == "--long");
    let all_passed = e2e::run(&e2e::cases(!options.is_empty()), &filters, &mut std::io::stdout())?;
    Ok(if all_passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
