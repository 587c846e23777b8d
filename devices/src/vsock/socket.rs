//! The device's end of a host stream: a non-blocking Unix socket that moves bytes from and to guest memory.

use std::io::{self, IoSlice, Read as _};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use crate::virtio::queue::Buffers;

/// One end of a socket pair.
pub(super) struct Socket(UnixStream);

impl Socket {
    /// A connected pair: the device's end and the host's, which blocks as sockets do.
    pub fn pair() -> io::Result<(Self, UnixStream)> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        Ok((Self(ours), theirs))
    }

    /// Takes over an end that another device had.
    pub fn adopt(fd: OwnedFd) -> io::Result<Self> {
        let stream = UnixStream::from(fd);
        // Only a Unix socket has such an address; anything else is no end of ours.
        stream.local_addr()?;
        stream.set_nonblocking(true)?;
        Ok(Self(stream))
    }

    /// Gives the end away.
    pub fn into_fd(self) -> OwnedFd {
        self.0.into()
    }

    /// Writes the first `len` bytes of `data`, or fewer, straight from guest memory (`sendmsg(2)`).
    pub fn send_from(&self, data: &Buffers<'_>, len: usize) -> io::Result<usize> {
        self.send_vectors(&mut data.iovecs(len))
    }

    /// Writes `data` (`sendmsg(2)`).
    pub fn send(&self, data: &[IoSlice<'_>]) -> io::Result<usize> {
        let vector =
            |slice: &IoSlice<'_>| libc::iovec { iov_base: slice.as_ptr().cast_mut().cast(), iov_len: slice.len() };
        self.send_vectors(&mut data.iter().map(vector).collect::<Vec<_>>())
    }

    fn send_vectors(&self, vectors: &mut [libc::iovec]) -> io::Result<usize> {
        // SAFETY: an all-zero msghdr is a valid one: no name, no data, no control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = vectors.as_mut_ptr();
        message.msg_iovlen = vectors.len();
        // MSG_NOSIGNAL: a host end that went away is an error here, not the end of the process.
        // SAFETY: the descriptor is open, and the vectors, all of mapped memory, outlive the call, which only reads them.
        let sent = unsafe { libc::sendmsg(self.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }

    /// Reads up to `len` bytes straight into guest memory, one buffer after the other (`readv(2)`); zero is the end of the
    /// stream.
    pub fn receive_into<'b, 'm: 'b>(
        &self,
        buffers: impl IntoIterator<Item = &'b Buffers<'m>>,
        len: usize,
    ) -> io::Result<usize> {
        let buffers = buffers.into_iter();
        let (mut vectors, mut left) = (Vec::with_capacity(buffers.size_hint().0), len);
        for buffer in buffers {
            let added = buffer.add_iovecs(left, &mut vectors);
            left -= added;
            // Without a gap: not even all of this one, for it has too many pieces or there is enough.
            if added < buffer.remaining() {
                break;
            }
        }
        let count = i32::try_from(vectors.len()).unwrap_or(libc::UIO_MAXIOV).min(libc::UIO_MAXIOV);
        // SAFETY: the descriptor is open, and the vectors describe guest memory that stays mapped while
        // `buffers` live; nothing in this process relies on what is in it.
        let received = unsafe { libc::readv(self.as_raw_fd(), vectors.as_ptr(), count) };
        usize::try_from(received).map_err(|_| io::Error::last_os_error())
    }

    /// Closes one direction or both.
    pub fn shutdown(&self, how: Shutdown) {
        // It fails only when the other end is gone, which its event tells as well.
        let _ = self.0.shutdown(how);
    }

    /// Closes the end so that the host end sees the end of the stream.
    pub fn close(mut self) {
        // With bytes unread in it, closing would be ECONNRESET to the host end. No more come in after
        // the shutdown, so this ends.
        let _ = self.0.shutdown(Shutdown::Both);
        let mut scratch = [0; 16 * 1024];
        while self.0.read(&mut scratch).is_ok_and(|len| len > 0) {}
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
