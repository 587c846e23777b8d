//! Hearing of changes.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{Socket, SocketAddr};

use super::NetworkError;
use crate::host::in_network_namespace;

/// RTMGRP_LINK, RTMGRP_NEIGH, RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE, RTMGRP_IPV6_IFADDR, RTMGRP_IPV6_ROUTE.
const GROUPS: u32 = 0x1 | 0x4 | 0x10 | 0x40 | 0x100 | 0x400;

/// Tells that something has changed in a network namespace: then it is time for another [`Scan`](super::Scan).
///
/// Its descriptor is readable when there is news. Made before a scan, it misses nothing after it.
pub struct Watch {
    socket: Socket,
}

impl Watch {
    /// Watches interfaces, addresses, routes and neighbours.
    ///
    /// # Errors
    /// When the namespace cannot be entered or no socket can be had.
    pub fn new(netns: impl AsFd) -> Result<Self, NetworkError> {
        // A socket belongs to the namespace that it was made in, whoever uses it.
        let make = || -> io::Result<Socket> {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind(&SocketAddr::new(0, GROUPS))?;
            socket.set_non_blocking(true)?;
            Ok(socket)
        };
        let socket = in_network_namespace(netns, make).map_err(NetworkError::Enter)?;
        Ok(Self { socket: socket.map_err(NetworkError::Socket)? })
    }

    /// Forgets the news so far; true when there were any.
    ///
    /// # Errors
    /// Of the socket.
    pub fn take_news(&self) -> Result<bool, NetworkError> {
        let mut news = false;
        let mut bytes = [0; 16 * 1024];
        loop {
            match self.socket.recv(&mut bytes.as_mut_slice(), 0) {
                Ok(_) => news = true,
                // There were more than the socket has room for.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => news = true,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(news),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(NetworkError::Socket(error)),
            }
        }
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the socket lives as long as this, which the result borrows.
        unsafe { BorrowedFd::borrow_raw(self.socket.as_raw_fd()) }
    }
}
