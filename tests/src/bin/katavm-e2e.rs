//! `katavm-e2e`: the end-to-end suite. Runs where `/dev/kvm` works: in the lab, or on real hardware.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Parser;
use katavm_tests::e2e::{self, Boot, CASE_LIMIT};
use katavm_tests::files;

/// How long a case may take if long ones are wanted: some of them work for an hour.
const LONG_LIMIT: Duration = Duration::from_secs(7200);

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
    /// Only the cases that come after this one
    #[arg(long, value_name = "CASE")]
    after: Option<String>,
    /// How long a case may take before it is told what it waits for, and this program ends [default: 900; with --long 7200]
    #[arg(long, value_name = "SECONDS")]
    limit: Option<u64>,
    /// Only cases with one of these words in their name
    filters: Vec<String>,
}

fn main() -> Result<ExitCode> {
    if let Some(code) = files::enter().or_else(e2e::enter) {
        return Ok(code);
    }
    let Cli { boot, long, list, after, limit, filters } = Cli::parse();
    let boots = boot.map_or_else(|| vec![Boot::Plain, Boot::Engines, Boot::Containerd, Boot::Cri], |boot| vec![boot]);
    let mut cases: Vec<_> = boots.into_iter().flat_map(|boot| e2e::cases(boot, long)).collect();
    if let Some(after) = after {
        let last = cases.iter().position(|case| case.full_name() == after);
        cases.drain(..=last.with_context(|| format!("there is no case {after}"))?);
    }
    if list {
        cases.iter().filter(|case| case.is_wanted(&filters)).for_each(|case| println!("{}", case.full_name()));
        return Ok(ExitCode::SUCCESS);
    }
    let limit = limit.map_or(if long { LONG_LIMIT } else { CASE_LIMIT }, Duration::from_secs);
    let all_passed = e2e::run(&cases, &filters, limit, &mut std::io::stdout())?;
    Ok(if all_passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
