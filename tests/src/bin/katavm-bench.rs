//! `katavm-bench`: benchmarks with peers beside us. Meant for the counting lab (`./just bench`).

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;
use katavm_tests::bench;

/// Measure katavm beside its peers.
#[derive(Parser)]
#[command(name = "katavm-bench")]
enum Cli {
    /// From the start of the process to the guest's userspace and to a ready agent.
    Boot {
        /// Boots of each monitor.
        #[arg(long, default_value_t = 10)]
        runs: u32,
    },
    /// Boot one guest with its console on stdout.
    #[command(hide = true)]
    BootOne {
        /// The kernel.
        kernel: PathBuf,
        /// The initramfs.
        initramfs: PathBuf,
    },
}

fn main() -> Result<()> {
    match Cli::parse() {
        Cli::Boot { runs } => bench::boot::run(runs, &mut std::io::stdout()),
        Cli::BootOne { kernel, initramfs } => bench::boot_one(kernel, initramfs),
    }
}
