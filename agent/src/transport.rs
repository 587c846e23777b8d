//! Connections with the host: vsock, or unix sockets where the kernel command line asks for them (tests do).
//!
//! A connected socket of either family is read, written and shut down alike, so both are a `UnixStream` here.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use katavm_protocol::ports::HOST_CID;
use nix::errno::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Where unix sockets are, when they stand in for vsock ports: `<port>.sock`.
pub const UNIX_DIR: &str = "/run/katavm/ports";

/// The family of the connections with the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Transport {
    /// AF_VSOCK; the only peer that is accepted is the host.
    #[default]
    Vsock,
    /// AF_UNIX sockets in [`UNIX_DIR`].
    Unix,
}

/// A listening socket.
pub struct Listener {
    socket: OwnedFd,
    transport: Transport,
}

impl From<UnixListener> for Listener {
    fn from(listener: UnixListener) -> Self {
        Self { socket: listener.into(), transport: Transport::Unix }
    }
}

impl Transport {
    /// Listens on a port of the guest.
    ///
    /// # Errors
    /// Those of socket(2), bind(2) and listen(2); `EAFNOSUPPORT` when the kernel has no vsock.
    pub fn listen(self, port: u32) -> io::Result<Listener> {
        let socket = match self {
            Self::Vsock => {
                let socket = vsock_socket()?;
                let address = vsock_address(libc::VMADDR_CID_ANY, port);
                // SAFETY: `address` is a sockaddr_vm of the length that is passed.
                Errno::result(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), ADDRESS_LEN) })?;
                // SAFETY: listen(2) takes no pointer.
                Errno::result(unsafe { libc::listen(socket.as_raw_fd(), 128) })?;
                socket
            }
            Self::Unix => UnixListener::bind(unix_path(port))?.into(),
        };
        Ok(Listener { socket, transport: self })
    }

    /// Dials a port of the host, and blocks until it answers or refuses.
    ///
    /// # Errors
    /// Those of connect(2).
    pub fn dial_host(self, port: u32) -> io::Result<UnixStream> {
        match self {
            Self::Vsock => {
                let socket = vsock_socket()?;
                let address = vsock_address(HOST_CID, port);
                // SAFETY: `address` is a sockaddr_vm of the length that is passed.
                Errno::result(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), ADDRESS_LEN) })?;
                Ok(socket.into())
            }
            Self::Unix => UnixStream::connect(unix_path(port)),
        }
    }
}

impl Listener {
    /// The next connection from the host. Connections from elsewhere are closed unheard.
    ///
    /// # Errors
    /// Those of accept4(2); `WouldBlock` when the socket does not block and nobody waits.
    pub fn accept(&self) -> io::Result<UnixStream> {
        loop {
            let mut address = vsock_address(0, 0);
            let mut len = ADDRESS_LEN;
            let (pointer, len_pointer) = match self.transport {
                Transport::Vsock => ((&raw mut address).cast(), &raw mut len),
                Transport::Unix => (std::ptr::null_mut(), std::ptr::null_mut()),
            };
            // SAFETY: either both pointers are null, or `address` has room for the `len` bytes that are announced.
            let fd = unsafe { libc::accept4(self.socket.as_raw_fd(), pointer, len_pointer, libc::SOCK_CLOEXEC) };
            let fd = match Errno::result(fd) {
                Ok(fd) => fd,
                Err(Errno::EINTR | Errno::ECONNABORTED) => continue,
                Err(error) => return Err(error.into()),
            };
            // SAFETY: accept4 just made this descriptor, and nothing else owns it.
            let connection = unsafe { UnixStream::from_raw_fd(fd) };
            let host = len == ADDRESS_LEN && address.svm_cid == HOST_CID;
            if self.transport == Transport::Unix || host {
                return Ok(connection);
            }
            crate::debug!("closed a connection from cid {}", address.svm_cid);
        }
    }

    /// The connections, to be awaited. Must be called on a tokio runtime.
    ///
    /// # Errors
    /// Those of fcntl(2) and epoll_ctl(2).
    pub fn incoming(self) -> io::Result<Incoming> {
        // SAFETY: F_SETFL takes a number; of the flags a listening socket has none other that matters.
        Errno::result(unsafe { libc::fcntl(self.socket.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) })?;
        // SAFETY: an OwnedFd is the same open descriptor until it is dropped, and `AsyncFd` owns it from here on.
        let socket = unsafe { AsyncFd::register_with_interest(self.socket.try_clone()?, Interest::READABLE) };
        Ok(Incoming { listener: self, socket: socket? })
    }
}

/// How long accepting rests after an error, such as that of too many open files.
const REST: Duration = Duration::from_millis(200);

/// The connections of a listener.
pub struct Incoming {
    listener: Listener,
    socket: AsyncFd<OwnedFd>,
}

impl Incoming {
    /// The next one, however long that takes. None is lost when the future is dropped.
    pub async fn next(&self) -> tokio::net::UnixStream {
        loop {
            match self.accept().await {
                Ok(connection) => return connection,
                Err(error) => {
                    crate::error!("cannot accept a connection of the host: {error}");
                    tokio::time::sleep(REST).await;
                }
            }
        }
    }

    /// The next one. None is lost when the future is dropped.
    ///
    /// # Errors
    /// Those of [`Listener::accept`].
    pub async fn accept(&self) -> io::Result<tokio::net::UnixStream> {
        loop {
            let mut guard = self.socket.readable().await?;
            if let Ok(connection) = guard.try_io(|_| self.listener.accept()) {
                let connection = connection?;
                connection.set_nonblocking(true)?;
                return tokio::net::UnixStream::from_std(connection);
            }
        }
    }
}

fn unix_path(port: u32) -> std::path::PathBuf {
    Path::new(UNIX_DIR).join(format!("{port}.sock"))
}

fn vsock_socket() -> io::Result<OwnedFd> {
    // SAFETY: socket(2) takes no pointer.
    let fd = Errno::result(unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: socket just made this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

const ADDRESS_LEN: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

fn vsock_address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: sockaddr_vm is plain data; all zeroes is a value of it.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}
