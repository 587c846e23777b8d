//! What is done to the host and needs its privileges, or changes the process as a whole.
//!
//! No other module of the runtime makes such system calls: this is where a broker process can take over later.

mod cgroup;
mod children;
mod clock;
mod code;
mod files;
mod idmap;
mod limits;
mod loops;
mod mounts;
mod namespaces;
mod netns;
mod processes;
mod users;

pub use cgroup::{Cgroup, has_cgroup_v2};
pub use children::{adopt_orphans, reap, reap_orphans, spawn};
pub use clock::{ClockChanges, now_ns};
pub use code::let_go_of_code;
pub use files::{
    EmptyTmpfs, FileKind, Place, identity, may_use_directory, open_disk, open_shared, scratch_file, system_message,
};
pub use idmap::{IdMap, IdRange};
pub use limits::raise_open_files;
pub use mounts::{
    MountChanges, MountSource, attach_inside, change_root, clone_tree, list_mounts, make_read_only, mount, mount_of,
    mount_sources, new_proc, private_copy, receive_mounts_only, unmount,
};
pub use namespaces::{enter_new_namespaces, is_own_network, join_namespace, open_namespace, run_in_namespaces_of};
pub use netns::{has_ipv6_route, in_network_namespace, make_tap, network_setting, network_table, set_network_setting};
pub use processes::{
    Fork, close_inherited, detach, exit_now, fork, fork_ignoring_signals, fork_into_pid_namespace, kill, kill_and_reap,
    kill_program, let_go_of_streams, note_inherited, pidfd_of_self, run_with_descriptor, set_process_name,
    start_time_ns, wait_for_end,
};
pub use users::is_root_of_host;
