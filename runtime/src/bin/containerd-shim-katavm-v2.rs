//! containerd's shim for katavm.

use std::process::ExitCode;

fn main() -> ExitCode {
    katavm_runtime::shim::main()
}
