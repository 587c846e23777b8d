//! A backend over a stream socket: each frame with its length in front, as passt(1) and QEMU's `-netdev stream` have it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};

use log::debug;
use vm_memory::VolatileSlice;

use super::backend::Backend;
use super::header;
use super::layout::HEADER;
use super::offloads::Offloads;

/// In front of each frame: its length, big endian.
const LENGTH: usize = 4;
/// An Ethernet header.
const FRAME_MIN: usize = 14;
/// The longest frame, with an MTU of 65520 and room for what may come before that. passt hangs up on a longer one.
const FRAME_MAX: usize = 65535;
/// Room for what is received: two of the longest frames.
const INBOX: usize = 2 * (LENGTH + FRAME_MAX);

/// The stream, with what has come of the next frames and what is left to send of the last one.
///
/// Work on packets cannot be put off here, as there is nothing to say so with.
#[derive(Debug)]
pub struct Stream {
    socket: UnixStream,
    inbox: Mutex<Inbox>,
    outbox: Mutex<Vec<u8>>,
}

#[derive(Debug)]
struct Inbox {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Stream {
    /// Takes over a connected socket.
    ///
    /// # Errors
    /// When it cannot be made not to block.
    pub fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let inbox = Inbox { bytes: vec![0; INBOX].into(), start: 0, end: 0 };
        Ok(Self { socket, inbox: Mutex::new(inbox), outbox: Mutex::default() })
    }

    /// Sends what is left of the last frame.
    fn send_rest(&self, rest: &mut Vec<u8>) -> io::Result<()> {
        while !rest.is_empty() {
            let sent = rustix::net::send(&self.socket, rest, rustix::net::SendFlags::NOSIGNAL)?;
            rest.drain(..sent);
        }
        Ok(())
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Backend for Stream {
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        if offloads.is_empty() { Ok(()) } else { Err(io::ErrorKind::Unsupported.into()) }
    }

    unsafe fn read(&self, into: &[libc::iovec]) -> io::Result<usize> {
        let mut inbox = lock(&self.inbox);
        loop {
            if let Some(frame) = inbox.frame()? {
                let len = frame.len();
                // SAFETY: the caller's promise.
                unsafe { scatter(&[&[0; HEADER], frame], into) };
                inbox.start += LENGTH + len;
                return Ok(HEADER + len);
            }
            if inbox.fill(&self.socket)? == 0 {
                return Ok(0);
            }
        }
    }

    unsafe fn write(&self, from: &[libc::iovec]) -> io::Result<()> {
        let mut rest = lock(&self.outbox);
        self.send_rest(&mut rest)?;
        let mut head = [0; HEADER];
        // SAFETY: the caller's promise.
        let frame = unsafe { split_off(from, &mut head) };
        let len = frame.iter().map(|vector| vector.iov_len).sum::<usize>();
        if header::asks_for_work(head) || !(FRAME_MIN..=FRAME_MAX).contains(&len) {
            debug!("a frame of {len} bytes, or one that is not finished, is dropped");
            return Ok(());
        }
        let length = (len as u32).to_be_bytes();
        let mut vectors = vec![libc::iovec { iov_base: length.as_ptr().cast_mut().cast(), iov_len: LENGTH }];
        vectors.extend(&frame);
        // More pieces than one call takes are sent as what is left of fewer.
        let count = vectors.len().min(libc::UIO_MAXIOV as usize);
        // SAFETY: all zeroes is a valid msghdr: null pointers and lengths of zero.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        (message.msg_iov, message.msg_iovlen) = (vectors.as_mut_ptr(), count);
        // SAFETY: the vectors describe `length` and what the caller vouches for; the kernel only reads it.
        let sent = unsafe { libc::sendmsg(self.socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
        let Ok(sent) = usize::try_from(sent) else { return Err(io::Error::last_os_error()) };
        if sent < LENGTH + len {
            rest.extend_from_slice(&length);
            // SAFETY: the caller's promise.
            unsafe { gather(&frame, &mut rest) };
            rest.drain(..sent);
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        match self.send_rest(&mut lock(&self.outbox)) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            done => done,
        }
    }
}

impl Inbox {
    /// The next frame, if all of it is there.
    fn frame(&self) -> io::Result<Option<&[u8]>> {
        let Some((length, bytes)) = self.bytes[self.start..self.end].split_first_chunk::<LENGTH>() else {
            return Ok(None);
        };
        let len = u32::from_be_bytes(*length) as usize;
        if !(FRAME_MIN..=FRAME_MAX).contains(&len) {
            // The other end has lost its place: there is no way back to the next frame.
            return Err(io::Error::from_raw_os_error(libc::EPROTO));
        }
        Ok(bytes.get(..len))
    }

    /// Receives what there is room for; 0 at the end.
    fn fill(&mut self, socket: &UnixStream) -> io::Result<usize> {
        // Only when the place for the rest of a frame might be short.
        if self.start == self.end || self.bytes.len() - self.start < LENGTH + FRAME_MAX {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let (_, got) = rustix::net::recv(socket, &mut self.bytes[self.end..], rustix::net::RecvFlags::empty())?;
        self.end += got;
        Ok(got)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Copies `parts` one after the other into memory, as much as there is room for.
///
/// # Safety
/// The vectors describe memory that may be written to.
unsafe fn scatter(parts: &[&[u8]], into: &[libc::iovec]) {
    let mut rooms = into.iter().map(|vector| (vector.iov_base.cast::<u8>(), vector.iov_len));
    let (mut place, mut room) = (std::ptr::null_mut(), 0);
    for part in parts {
        let mut part = *part;
        while !part.is_empty() {
            if room == 0 {
                let Some(next) = rooms.next() else { return };
                (place, room) = next;
                continue;
            }
            let (now, later) = part.split_at(part.len().min(room));
            // SAFETY: the caller's promise; `now` is no longer than the room at `place`.
            unsafe {
                VolatileSlice::new(place, now.len()).copy_from(now);
                place = place.add(now.len());
            }
            room -= now.len();
            part = later;
        }
    }
}

/// Appends what memory holds.
///
/// # Safety
/// The vectors describe memory that may be read.
unsafe fn gather(from: &[libc::iovec], to: &mut Vec<u8>) {
    for vector in from {
        let before = to.len();
        to.resize(before + vector.iov_len, 0);
        // SAFETY: the caller's promise.
        unsafe { VolatileSlice::new(vector.iov_base.cast(), vector.iov_len) }.copy_to(&mut to[before..]);
    }
}

/// Reads the first bytes into `head`, and returns what follows them.
///
/// # Safety
/// The vectors describe memory that may be read.
unsafe fn split_off(from: &[libc::iovec], head: &mut [u8]) -> Vec<libc::iovec> {
    let mut done = 0;
    let mut rest = Vec::with_capacity(from.len());
    for vector in from {
        let taken = vector.iov_len.min(head.len() - done);
        let place: *mut u8 = vector.iov_base.cast();
        // SAFETY: the caller's promise; `taken` is no longer than the vector.
        let after = unsafe {
            VolatileSlice::new(place, taken).copy_to(&mut head[done..done + taken]);
            place.add(taken)
        };
        done += taken;
        if taken < vector.iov_len {
            rest.push(libc::iovec { iov_base: after.cast(), iov_len: vector.iov_len - taken });
        }
    }
    rest
}
