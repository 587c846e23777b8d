//! `start`: finds the server of a container's pod, or makes it, and tells containerd where it is.

use std::fs;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use anyhow::Context as _;

use super::address::{Address, group};
use super::arguments::Arguments;
use super::bootstrap::Bootstrap;
use super::server::state_root;
use crate::state::StateRoot;

/// The descriptor of the socket that a server finds at its start.
pub const LISTENER: i32 = 3;
/// The variable with the socket for events.
pub const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";
/// How much likelier than its parent a server is to be killed for want of memory.
const OOM_SCORE: i32 = 1;

/// Gives what containerd is to be told: the address of the server. That of a new one listens already when this returns.
///
/// # Errors
/// That the server cannot be made.
pub fn start(arguments: &Arguments) -> anyhow::Result<Vec<u8>> {
    let bootstrap = Bootstrap::read(arguments);
    let bundle = std::env::current_dir().context("cannot tell the current folder, which is the bundle")?;
    let root = StateRoot::open(state_root(&arguments.namespace))?;
    let mut address = Address::of(&arguments.address, &arguments.namespace, &group(&bundle, &arguments.id));
    if let Some(folder) = bootstrap.socket_dir() {
        address = address.within(&folder);
    }
    let claimed = address.claim().with_context(|| format!("cannot make the socket {}", address.url()))?;
    if let Some(listener) = claimed {
        let mut server = Command::new(std::env::current_exe().context("cannot tell where this program is")?);
        server.args(["-namespace", &arguments.namespace, "-id", &arguments.id, "-address", &arguments.address]);
        if arguments.debug || bootstrap.debug() {
            server.arg("-debug");
        }
        if let Some(path) = bootstrap.config_path() {
            server.arg("-config").arg(path);
        }
        if let Some(address) = bootstrap.ttrpc_address() {
            server.env(TTRPC_ADDRESS, address);
        }
        // A server has no use for them, and containerd reads the output of this program to its end.
        server.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        let fd = listener.as_fd().as_raw_fd();
        // SAFETY: dup2(2) and fcntl(2) are async-signal-safe (signal-safety(7)), and `listener` is open until the
        // process is made.
        unsafe {
            server.pre_exec(move || match fd {
                LISTENER if libc::fcntl(fd, libc::F_SETFD, 0) == 0 => Ok(()),
                fd if fd != LISTENER && libc::dup2(fd, LISTENER) == LISTENER => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            })
        };
        let server = server.spawn().context("cannot make the server")?;
        if let Err(error) = fs::write("shim.pid", server.id().to_string()).and_then(|()| adjust(server.id())) {
            log::warn!("{error}");
        }
    }
    // containerd 1.x looks for it after a restart.
    fs::write("address", address.url()).context("cannot write the server's address to the bundle")?;
    bootstrap.answer(&address.url(), arguments, root.path())
}

fn adjust(pid: u32) -> std::io::Result<()> {
    let own = fs::read_to_string("/proc/self/oom_score_adj")?;
    let score = own.trim().parse::<i32>().unwrap_or_default() + OOM_SCORE;
    fs::write(format!("/proc/{pid}/oom_score_adj"), score.min(1000).to_string())
}
