//! `katavm-e2e [FILTER...]`: the end-to-end suite. Runs where `/dev/kvm` works: in the lab, or on real hardware.

use std::process::ExitCode;

use anyhow::Result;
use katavm_tests::e2e;

fn main() -> Result<ExitCode> {
    let filters: Vec<String> = std::env::args().skip(1).collect();
    let all_passed = e2e::run(&e2e::cases(), &filters, &mut std::io::stdout())?;
    Ok(if all_passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
