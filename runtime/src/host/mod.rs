//! What is done to the host and needs its privileges, or changes the process as a whole.
//!
//! No other module of the runtime makes such system calls: this is where a broker process can take over later.

mod files;
mod limits;
mod processes;

pub use files::{FileKind, may_use_directory, open_shared, system_message};
pub use limits::raise_open_files;
pub use processes::{Fork, fork, ignore_all_signals, kill_and_reap, pidfd_of_self, set_process_name, start_time_ns};
