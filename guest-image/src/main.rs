//! `katavm-guest-image build` prints the folder with the kernel and the initramfs, building them first where needed.

use clap::{Parser, Subcommand};
use katavm_guest_image::{image, kernel};

/// Builds what a katavm guest boots from.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build the guest image, or find it in the cache, and print its folder.
    ///
    /// The folder holds vmlinux, bzImage, initramfs, config and kernel-release; `guest-image/current` in the cache
    /// leads to it. The cache is $KATAVM_CACHE, else $XDG_CACHE_HOME/katavm, else ~/.cache/katavm.
    Build {
        /// Leave the initramfs out: the folder printed is the kernel's.
        #[arg(long)]
        kernel_only: bool,
    },
}

fn main() -> anyhow::Result<()> {
    let Command::Build { kernel_only } = Arguments::parse().command;
    let folder = if kernel_only { kernel::build()? } else { image::build()? };
    image::report_sizes(&folder)?;
    println!("{}", folder.display());
    Ok(())
}
