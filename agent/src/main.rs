//! PID 1 of the guest, and the helper that it executes from the same file.
//!
//! The entry is C's: Rust's own runtime would abort where /dev/null is not there yet and descriptors 0 to 2 are closed,
//! as they are in a guest without a console.
#![no_main]

use std::path::{Path, PathBuf};

use katavm_agent::{end, helper, server};

/// Called by the C runtime. Arguments are read by `std::env`, which has them without Rust's own entry.
#[unsafe(no_mangle)]
pub extern "C" fn main(_argc: i32, _argv: *const *const std::ffi::c_char) -> i32 {
    let mut arguments = std::env::args_os();
    let program = PathBuf::from(arguments.next().unwrap_or_default());
    if helper::id_map::is_id_map(&program) {
        return helper::id_map::run(&program, arguments);
    }
    if helper::pause::is_pause(&program) {
        return helper::pause::run();
    }
    let name = arguments.next().unwrap_or_default();
    match (name.to_str(), arguments.next()) {
        (Some(name), Some(directory)) if helper::is_helper(name) => helper::run(Path::new(&directory)),
        _ if std::process::id() == 1 => server::run(),
        _ => {
            end::print_to_stderr("this is PID 1 of a katavm guest; it does nothing elsewhere");
            1
        }
    }
}
