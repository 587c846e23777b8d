//! What is done to the host and needs its privileges, or changes the process as a whole.
//!
//! No other module of the runtime makes such system calls: this is where a broker process can take over later.

mod files;
mod limits;
mod netns;
mod processes;

pub use files::{FileKind, open_shared, system_message};
pub use limits::raise_open_files;
pub use netns::{in_network_namespace, make_tap, network_setting};
pub use processes::{Fork, fork, ignore_all_signals, kill_and_reap, pidfd_of_self, set_process_name, start_time_ns};
