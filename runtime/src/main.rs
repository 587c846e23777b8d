//! The `katavm` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    katavm_runtime::cli::main()
}
