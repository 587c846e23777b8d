//! Network namespaces, and what is made in them.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

const TUN: &str = "/dev/net/tun";
// From <linux/if_tun.h>.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const IFF_TAP: libc::c_short = 0x0002;
const IFF_MULTI_QUEUE: libc::c_short = 0x0100;
const IFF_NO_PI: libc::c_short = 0x1000;
const IFF_VNET_HDR: libc::c_short = 0x4000;

/// Runs `work` in a network namespace, on a thread that is there for nothing else: no other thread of the process
/// ever is in a namespace that is not its own, whatever `work` does and however it ends.
///
/// # Errors
/// When no thread can be had, when the descriptor is no network namespace, when this process may not enter it.
pub fn in_network_namespace<T: Send>(netns: impl AsFd, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    let netns = netns.as_fd();
    let enter = move || {
        move_into_link_name_space(netns, Some(LinkNameSpaceType::Network))?;
        Ok(work())
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("netns".into()).spawn_scoped(scope, enter)?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Makes a tap interface in the network namespace of the calling thread: Ethernet frames with a `struct virtio_net_hdr`
/// in front, and a descriptor for each of `queues` queues, at least one. It is there as long as one of them is open. A
/// `%d` in `name` becomes a free number.
///
/// # Errors
/// Those of open(2) and of TUNSETIFF. `InvalidInput` for a name that no interface can have.
pub fn make_tap(name: &str, queues: u16) -> io::Result<(Vec<OwnedFd>, String)> {
    let several = if queues > 1 { IFF_MULTI_QUEUE } else { 0 };
    let (first, name) = open_tap(name, several)?;
    let others = (1..queues).map(|_| Ok(open_tap(&name, several)?.0));
    let queues = std::iter::once(Ok(first)).chain(others).collect::<io::Result<_>>()?;
    Ok((queues, name))
}

fn open_tap(name: &str, flags: libc::c_short) -> io::Result<(OwnedFd, String)> {
    let tun = OpenOptions::new().read(true).write(true).open(TUN).map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => io::Error::new(error.kind(), format!("no permission to open {TUN}")),
        _ => error,
    })?;
    let tun = OwnedFd::from(tun);
    // SAFETY: an all-zero ifreq is a valid value of it: plain integers and byte arrays.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{name:?} is too long for an interface")));
    }
    request.ifr_name.iter_mut().zip(name.bytes()).for_each(|(to, from)| *to = from.cast_signed());
    request.ifr_ifru.ifru_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | flags;
    // SAFETY: TUNSETIFF reads one ifreq and writes the name into it.
    Errno::result(unsafe { libc::ioctl(tun.as_raw_fd(), TUNSETIFF, &raw mut request) })?;
    let name = request.ifr_name.iter().take_while(|byte| **byte != 0).map(|byte| byte.cast_unsigned());
    Ok((tun, String::from_utf8_lossy(&name.collect::<Vec<u8>>()).into_owned()))
}

/// The value of a network setting of the calling thread's namespace, by its path under /proc/sys/net.
///
/// # Errors
/// When there is no such setting, or no /proc.
pub fn network_setting(path: &str) -> io::Result<String> {
    Ok(std::fs::read_to_string(format!("/proc/sys/net/{path}"))?.trim().to_owned())
}

/// Changes a network setting of the calling thread's namespace, by its path under /proc/sys/net.
///
/// # Errors
/// When there is no such setting, no /proc, or this process may not.
pub fn set_network_setting(path: &str, value: &str) -> io::Result<()> {
    std::fs::write(format!("/proc/sys/net/{path}"), value)
}

/// A table of the calling thread's network namespace, by its name in /proc/net (proc_net(5)).
///
/// # Errors
/// When there is no such table, or no /proc.
pub fn network_table(name: &str) -> io::Result<String> {
    std::fs::read_to_string(format!("/proc/thread-self/net/{name}"))
}

/// Whether this process' network has a way for IPv6 to the world.
#[must_use]
pub fn has_ipv6_route() -> bool {
    // Destination, its prefix, source, its prefix, next hop, metric, references, uses, flags, interface (proc_net(5)).
    let is_default = |line: &str| {
        let words: Vec<_> = line.split_whitespace().collect();
        words.get(1) == Some(&"00") && words.last().is_some_and(|interface| *interface != "lo")
    };
    // A kernel without IPv6 has no such table.
    network_table("ipv6_route").is_ok_and(|table| table.lines().any(is_default))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_network_namespace_can_be_entered() {
        let other = std::fs::File::open("/proc/self/ns/mnt").unwrap();
        assert!(in_network_namespace(&other, || ()).is_err());
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(in_network_namespace(&file, || ()).is_err());
    }

    #[test]
    fn a_name_that_is_too_long_is_refused() {
        // Where there is no /dev/net/tun, that is the error.
        assert!(make_tap("a-name-of-16-is-", 1).is_err());
    }
}
