//! From the kernel's first exec to a guest that containers can live in.

mod cgroups;
mod cmdline;
mod mounts;

use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};

pub use cmdline::Cmdline;

use crate::error::Error;

/// Descriptors that a process may have: soft and hard, what a service of a common Linux system gets.
pub const NOFILE: (u64, u64) = (1024, 524_288);

/// Prepares the guest.
///
/// # Errors
/// What could not be done and which kernel option it takes.
pub fn prepare() -> Result<Cmdline, Error> {
    mounts::give_real_root()?;
    mounts::mount_all()?;
    let cmdline = Cmdline::read();
    if cmdline.debug {
        crate::log::enable_debug();
    }
    cgroups::prepare()?;
    loopback_up().map_err(|error| Error::io("cannot bring up lo (CONFIG_NET, CONFIG_INET)", error))?;
    limits();
    // Grace periods by interprocessor interrupts: making a container waits for several, a tick or two each otherwise.
    // A kernel without the file (CONFIG_TINY_RCU) does not wait.
    let _ = std::fs::write("/sys/kernel/rcu_expedited", "1");
    // A sandbox that asks for no other name keeps this one.
    nix::unistd::sethostname("katavm").map_err(|error| Error::io("cannot set the host name", error.into()))?;
    Ok(cmdline)
}

fn limits() {
    // Not vital: what cannot be raised stays as the kernel made it.
    let _ = setrlimit(Resource::RLIMIT_NOFILE, NOFILE.1, NOFILE.1);
    let _ = setrlimit(Resource::RLIMIT_NPROC, RLIM_INFINITY, RLIM_INFINITY);
}

/// Brings up `lo` (netdevice(7), SIOCSIFFLAGS).
fn loopback_up() -> std::io::Result<()> {
    use std::os::fd::AsRawFd;
    let socket = std::os::unix::net::UnixDatagram::unbound()?;
    // SAFETY: ifreq is plain data; all zeroes is a value of it.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads an ifreq, and `request` is one.
    nix::errno::Errno::result(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) })?;
    Ok(())
}
