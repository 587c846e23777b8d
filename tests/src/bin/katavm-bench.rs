//! `katavm-bench`: benchmarks with peers beside us. Meant for the counting lab (`./just bench`).

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
        /// How many of them once more under strace: slow, and what it counts hardly varies.
        #[arg(long, default_value_t = 3)]
        traced: u32,
    },
    /// A container's life by the OCI command line, beside runc and crun.
    Oci {
        /// Containers of each runtime.
        #[arg(long, default_value_t = 10)]
        runs: u32,
    },
    /// What a guest's requests of its devices cost, beside the monitors that this machine has.
    Io {
        /// Kinds of devices; all of them unless told.
        kinds: Vec<bench::io::Kind>,
        /// Boots of each monitor.
        #[arg(long, default_value_t = 5)]
        runs: u32,
    },
    /// A pod's life through containerd's CRI plugin, beside runc.
    Pod {
        /// Pods of each runtime.
        #[arg(long, default_value_t = 7)]
        runs: u32,
    },
}

fn main() -> Result<()> {
    if let Some(done) = bench::io::enter() {
        return done;
    }
    match Cli::parse() {
        Cli::Boot { runs, traced } => bench::boot::run(runs, traced, &mut std::io::stdout()),
        Cli::Oci { runs } => bench::oci::run(runs, &mut std::io::stdout()),
        Cli::Io { kinds, runs } => {
            let kinds = if kinds.is_empty() { bench::io::Kind::ALL.into() } else { kinds };
            bench::io::run(&kinds, runs, &mut std::io::stdout())
        }
        Cli::Pod { runs } => bench::pod::run(runs, &mut std::io::stdout()),
    }
}
