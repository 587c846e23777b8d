//! `katavm-e2e`: the end-to-end suite. Runs where `/dev/kvm` works: in the lab, or on real hardware.

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use katavm_tests::e2e::{self, Boot};
use katavm_tests::files;

/// Run end-to-end cases.
#[derive(Parser)]
#[command(name = "katavm-e2e")]
struct Cli {
    /// The cases of this boot alone [default: all but those that take systemd as PID 1]
    #[arg(long, value_enum)]
    boot: Option<Boot>,
    /// Also the cases that take minutes each under emulation
    #[arg(long)]
    long: bool,
    /// Print the names of the cases and run none
    #[arg(long)]
    list: bool,
    /// Only cases with one of these words in their name
    filters: Vec<String>,
}

fn main() -> Result<ExitCode> {
    if let Some(code) = files::enter().or_else(e2e::enter) {
        return Ok(code);
    }
    let Cli { boot, long, list, filters } = Cli::parse();
    let boots = boot.map_or_else(|| vec![Boot::Plain, Boot::Engines, Boot::Containerd], |boot| vec![boot]);
    let cases: Vec<_> = boots.into_iter().flat_map(|boot| e2e::cases(boot, long)).collect();
    if list {
        cases.iter().filter(|case| case.is_wanted(&filters)).for_each(|case| println!("{}", case.full_name()));
        return Ok(ExitCode::SUCCESS);
    }
    let all_passed = e2e::run(&cases, &filters, &mut std::io::stdout())?;
    Ok(if all_passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
