//! The guest's network, and connections to the host.

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context as _, Result};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, socket};

use super::super::exchange::PORT;
use super::super::kinds::Kind;

/// The host's address on the tap, and the guest's, of a network of 30 bits (RFC 5737: for documentation alone).
pub const HOST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
const MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 252);
const INTERFACE: &str = "eth0";

/// Gives the interface its address and switches it on (netdevice(7)).
///
/// # Errors
/// When there is no such interface.
pub fn set_up() -> Result<()> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::empty(), None)?;
    for (request, address) in [(libc::SIOCSIFADDR, GUEST), (libc::SIOCSIFNETMASK, MASK)] {
        let mut interface = interface();
        let octets = libc::in_addr { s_addr: u32::from(address).to_be() };
        let address =
            libc::sockaddr_in { sin_family: libc::AF_INET as u16, sin_port: 0, sin_addr: octets, sin_zero: [0; 8] };
        // SAFETY: both are plain data of 16 bytes; the kernel looks at the family to know which one it is.
        interface.ifr_ifru.ifru_addr = unsafe { std::mem::transmute::<libc::sockaddr_in, libc::sockaddr>(address) };
        change(&socket, request, &interface)?;
    }
    let mut interface = interface();
    interface.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    change(&socket, libc::SIOCSIFFLAGS, &interface)
}

fn interface() -> libc::ifreq {
    // SAFETY: an all-zero ifreq is a valid value of it: plain integers and byte arrays.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name.iter_mut().zip(INTERFACE.bytes()).for_each(|(to, from)| *to = from.cast_signed());
    request
}

fn change(socket: &OwnedFd, request: libc::c_ulong, interface: &libc::ifreq) -> Result<()> {
    // SAFETY: these requests read one ifreq.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), request, std::ptr::from_ref(interface)) };
    nix::errno::Errno::result(done).with_context(|| format!("ioctl {request:#x} of {INTERFACE}"))?;
    Ok(())
}

/// A connection to the host's end of the benchmark.
///
/// # Errors
/// When nobody is there.
pub fn to_host(kind: Kind) -> Result<File> {
    let fd = if kind == Kind::Vsock {
        let socket = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        connect(socket.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_HOST, PORT)).context("cannot reach the host")?;
        socket
    } else {
        let port = u16::try_from(PORT).map_err(io::Error::other)?;
        let stream = TcpStream::connect((HOST, port)).context("cannot reach the host")?;
        stream.set_nodelay(true)?;
        stream.into()
    };
    Ok(fd.into())
}
