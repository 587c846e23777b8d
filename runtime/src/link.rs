//! The link: a connected pair of sequenced-packet sockets between the sandbox process and whoever stands for a
//! container's process on the host, a stand-in or a `katavm exec`. Each packet is one message.
//!
//! The end of the link is a message, too: it means that the other side has died.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::descriptor::awaited;

/// The longest message in bytes; a text that would not fit is cut by whoever sends it.
const LONGEST: usize = 16 * 1024;
/// Descriptors that travel with one message: the three standard streams, a lock and a link.
const DESCRIPTORS: usize = 5;

/// From the sandbox process to the one that stands for a container's process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToStandIn {
    /// The [`Hello`] was heard.
    Heard,
    /// The container is made: its root file system and volumes have all their mount points now.
    Made,
    /// The container's process has ended with this status.
    Exited(u32),
}

/// From the one that stands for a container's process to the sandbox process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromStandIn {
    /// It is in its namespaces, or why not: its first message.
    Entered(Result<(), String>),
    /// Its view of the container's file systems is made, or why not.
    Settled(Result<(), String>),
    /// It received this signal.
    Signal(i32),
    /// The terminal has another size.
    Resized,
}

/// The first message on a link that was made by connecting to the sandbox process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Greeting {
    /// A process is about to be asked for.
    Process(Hello),
    /// What happens to this container is to be told, by [`ToWatcher`].
    Watch(String),
}

/// From the sandbox process to one that watches a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToWatcher {
    /// The [`Greeting`] was heard: what happens from now on is told.
    Heard,
    /// It cannot be watched, and why.
    Refused(String),
    /// The kernel of the guest has killed a process of the container for want of memory.
    OutOfMemory,
    /// The container's first process has ended.
    Exited,
}

/// What is passed for a process; the standard streams travel with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The container.
    pub container_id: String,
    /// Empty: the container's first process.
    pub exec_id: String,
    /// Which of the standard streams are passed, in this order.
    pub streams: [bool; 3],
    /// The only one that is passed is the terminal.
    pub terminal: bool,
    /// For the first process of a further container: its state directory. The lock of that and the link to the
    /// container's stand-in are passed after the streams.
    pub state: Option<PathBuf>,
}

/// A link whose other end is not used by this process.
///
/// # Errors
/// Those of socketpair(2).
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// Sends one message; blocks where the socket does.
///
/// # Errors
/// Those of sendmsg(2); `EPIPE` when the other side is gone.
pub fn send<T: Serialize>(link: &OwnedFd, message: &T, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::other("too many descriptors for one message"));
    }
    sendmsg(link, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Receives one message and what travels with it; nothing at the end of the link.
///
/// # Errors
/// Those of recvmsg(2), and `InvalidData` for what is no such message.
pub fn receive<T: DeserializeOwned>(link: &OwnedFd) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut bytes = vec![0; LONGEST];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        match recvmsg(link, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::CONNRESET) => return Ok(None),
            other => break other?,
        }
    };
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            descriptors.extend(fds);
        }
    }
    if received.bytes == 0 {
        return Ok(None);
    }
    let message = serde_json::from_slice(bytes.get(..received.bytes).unwrap_or_default())?;
    Ok(Some((message, descriptors)))
}

/// The sandbox process' end, awaited.
#[derive(Debug)]
pub struct Link {
    fd: AsyncFd<OwnedFd>,
}

impl Link {
    /// Takes a socket of [`pair`] or one that was connected. Must be called on a tokio runtime.
    ///
    /// # Errors
    /// Those of fcntl(2) and epoll_ctl(2).
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Self { fd: awaited(fd, Interest::READABLE | Interest::WRITABLE)? })
    }

    /// The next message; nothing when the other side has died. Nothing is lost when the future is dropped.
    ///
    /// # Errors
    /// Those of [`receive`].
    pub async fn receive<T: DeserializeOwned>(&self) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
        loop {
            let mut guard = self.fd.readable().await?;
            if let Ok(result) = guard.try_io(|fd| receive(fd.get_ref())) {
                return result;
            }
        }
    }

    /// Sends a message.
    ///
    /// # Errors
    /// Those of [`send`].
    pub async fn send<T: Serialize>(&self, message: &T) -> io::Result<()> {
        loop {
            let mut guard = self.fd.writable().await?;
            if let Ok(result) = guard.try_io(|fd| send(fd.get_ref(), message, &[])) {
                return result;
            }
        }
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.get_ref().as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;

    use super::*;

    #[test]
    fn messages_and_descriptors_arrive_in_order_and_the_end_is_told() {
        let (ours, theirs) = pair().unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        send(&ours, &FromStandIn::Signal(15), &[writer.as_fd()]).unwrap();
        send(&ours, &FromStandIn::Resized, &[]).unwrap();
        drop((ours, writer));
        let (first, mut fds) = receive::<FromStandIn>(&theirs).unwrap().unwrap();
        assert_eq!(first, FromStandIn::Signal(15));
        io::Write::write_all(&mut File::from(fds.pop().unwrap()), b"through").unwrap();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "through");
        let (second, fds) = receive::<FromStandIn>(&theirs).unwrap().unwrap();
        assert_eq!((second, fds.len()), (FromStandIn::Resized, 0));
        assert!(receive::<FromStandIn>(&theirs).unwrap().is_none());
    }

    #[test]
    fn the_awaited_end_hears_and_answers() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (ours, theirs) = pair().unwrap();
            let link = Link::new(ours).unwrap();
            link.send(&ToStandIn::Exited(7)).await.unwrap();
            assert_eq!(receive::<ToStandIn>(&theirs).unwrap().unwrap().0, ToStandIn::Exited(7));
            send(&theirs, &FromStandIn::Settled(Ok(())), &[]).unwrap();
            let (message, _) = link.receive::<FromStandIn>().await.unwrap().unwrap();
            assert_eq!(message, FromStandIn::Settled(Ok(())));
            drop(theirs);
            assert!(link.receive::<FromStandIn>().await.unwrap().is_none());
        });
    }
}
