//! The listening TCP sockets of the guest's network: which there are, by sock_diag(7), and when that changes.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use katavm_protocol::agent::Listener;
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

use crate::bpf::{
    self, ADD, CALL, EXIT, Instruction, JUMP, JUMP_EQUAL, JUMP_NOT_EQUAL, LOAD_WORD, MOVE, MOVE_REGISTER, STACK,
    STORE_LONG, instruction,
};

/// So many are told of at most.
pub const MOST: usize = 1024;
/// How long news are gathered: a server opens one socket after the other.
const GATHERED: Duration = Duration::from_millis(5);
/// How long the kernel may take to do what it has told of.
const SETTLED: Duration = Duration::from_millis(250);

// From <linux/sock_diag.h>, <linux/inet_diag.h>, <linux/netlink.h> and <net/tcp_states.h>.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST_DUMP: u16 = 0x301;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const TCP_LISTEN: u32 = 10;
const INET_DIAG_SKV6ONLY: u16 = 11;
/// Bytes of a struct nlmsghdr.
const HEADER: usize = 16;
/// Bytes of a struct inet_diag_msg.
const MESSAGE: usize = 72;

/// All that there are, at most [`MOST`], in no order.
///
/// # Errors
/// That the kernel does not tell (CONFIG_INET_DIAG).
pub fn list() -> io::Result<Vec<Listener>> {
    let mut all = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        match dump(family as u8, &mut all) {
            // A kernel without IPv6.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) && family == libc::AF_INET6 => {}
            done => done?,
        }
    }
    all.truncate(MOST);
    Ok(all)
}

fn dump(family: u8, all: &mut Vec<Listener>) -> io::Result<()> {
    let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
    socket.bind_auto()?;
    // struct inet_diag_req_v2: family, protocol, extensions, padding, states; which socket: all zeroes is any.
    let mut request = [0; HEADER + 56];
    put(&mut request, 0, &(72_u32).to_ne_bytes());
    put(&mut request, 4, &SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    put(&mut request, 6, &NLM_F_REQUEST_DUMP.to_ne_bytes());
    put(&mut request, HEADER, &[family, libc::IPPROTO_TCP as u8]);
    put(&mut request, HEADER + 4, &(1_u32 << TCP_LISTEN).to_ne_bytes());
    socket.send(&request, 0)?;
    loop {
        let (bytes, _) = socket.recv_from_full()?;
        let mut rest = bytes.as_slice();
        while let Some((len, kind)) = number(rest, 0).zip(number(rest, 4)) {
            let message = rest.get(HEADER..len as usize).unwrap_or_default();
            match kind as u16 {
                NLMSG_DONE => return Ok(()),
                NLMSG_ERROR => {
                    let code = number(message, 0).unwrap_or_default().cast_signed();
                    return Err(io::Error::from_raw_os_error(code.saturating_neg()));
                }
                _ => all.extend(listener(message)),
            }
            rest = rest.get((len as usize).next_multiple_of(4).max(HEADER)..).unwrap_or_default();
        }
    }
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes.iter_mut().skip(at).zip(value).for_each(|(to, from)| *to = *from);
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// Of a struct inet_diag_msg and what follows it.
fn listener(message: &[u8]) -> Option<Listener> {
    let family = i32::from(*message.first()?);
    let port = u16::from_be_bytes(message.get(4..6)?.try_into().ok()?);
    let ip = message.get(8..if family == libc::AF_INET6 { 24 } else { 12 })?;
    let mut v6_only = false;
    // struct rtattr: length and kind, 16 bits each, and the value; aligned to 4 bytes.
    let mut attributes = message.get(MESSAGE..)?;
    while let Some(head) = number(attributes, 0) {
        let (len, kind) = ((head & 0xffff) as usize, (head >> 16) as u16);
        if kind == INET_DIAG_SKV6ONLY {
            v6_only = attributes.get(4).is_some_and(|value| *value != 0);
        }
        attributes = attributes.get(len.next_multiple_of(4).max(4)..).unwrap_or_default();
    }
    Some(Listener { ip: ip.to_vec(), port: port.into(), v6_only, ..Default::default() })
}

/// What [`list`] gives, again and again.
pub struct Changes {
    watch: Watch,
    told: Option<Vec<Listener>>,
    /// The last of the news may not have had its effect yet.
    settling: bool,
}

impl Changes {
    /// From now on, of the network that this process is in and the processes of a control group. Must be called on a
    /// tokio runtime.
    ///
    /// # Errors
    /// Those of [`Watch::new`].
    pub fn new(cgroup: &Path) -> io::Result<Self> {
        Ok(Self { watch: Watch::new(cgroup)?, told: None, settling: false })
    }

    /// At first all that there are, then all that there are when that has changed.
    ///
    /// # Errors
    /// Those of [`list`] and of the watch.
    pub async fn next(&mut self) -> io::Result<Vec<Listener>> {
        loop {
            let mut all = tokio::task::spawn_blocking(list).await.map_err(io::Error::other)??;
            all.sort_by(|a, b| (&a.ip, a.port).cmp(&(&b.ip, b.port)));
            if self.told.as_ref() != Some(&all) {
                self.told = Some(all.clone());
                return Ok(all);
            }
            self.wait().await?;
        }
    }

    async fn wait(&mut self) -> io::Result<()> {
        let changed = match self.settling {
            // The kernel tells of the end of a listening socket a moment before it.
            true => timeout(SETTLED, self.watch.changed()).await.ok(),
            false => Some(self.watch.changed().await),
        };
        self.settling = changed.is_some();
        if let Some(changed) = changed {
            changed?;
            tokio::time::sleep(GATHERED).await;
        }
        Ok(())
    }
}

/// Tells that a socket has begun to listen, or that one is about to listen no more: a BPF program of the control group
/// of its process, which the kernel runs then. Nothing is asked while nothing happens.
pub struct Watch {
    ring: AsyncFd<OwnedFd>,
    positions: Positions,
    /// The program is attached as long as this is open.
    _link: OwnedFd,
}

impl Watch {
    /// Watches from now on. Must be called on a tokio runtime.
    ///
    /// # Errors
    /// That the kernel lacks what it takes.
    pub fn new(cgroup: &Path) -> io::Result<Self> {
        let page = page_size()?;
        let ring = bpf::ring(u32::try_from(page).map_err(io::Error::other)?)?;
        let positions = Positions::of(&ring, page)?;
        let program = bpf::load(bpf::SOCK_OPS, &compile(&ring))?;
        let link = bpf::link(&program, &File::open(cgroup)?, bpf::AT_SOCK_OPS)?;
        // SAFETY: an OwnedFd is the same open descriptor until it is dropped, and `AsyncFd` owns it from here on.
        let ring = unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) }.map_err(io::Error::from)?;
        Ok(Self { ring, positions, _link: link })
    }

    /// Returns when there is something new, also if that was before.
    ///
    /// # Errors
    /// Those of epoll.
    pub async fn changed(&self) -> io::Result<()> {
        loop {
            self.ring.readable().await?.clear_ready();
            if self.positions.take() {
                return Ok(());
            }
        }
    }
}

/// What the program and this exchange: how far the ring has been written, and how far it has been read. What is in
/// it says nothing more.
struct Positions {
    page: usize,
    written: NonNull<AtomicU64>,
    read: NonNull<AtomicU64>,
}

// SAFETY: the pointers are to memory that is mapped as long as this lives, and only accessed atomically.
unsafe impl Send for Positions {}
// SAFETY: as above.
unsafe impl Sync for Positions {}

impl Positions {
    fn of(ring: &OwnedFd, page: usize) -> io::Result<Self> {
        // The reader's page, and the first of the writer's (Documentation/bpf/ringbuf.rst).
        let read = map(ring, page, libc::PROT_READ | libc::PROT_WRITE, 0)?;
        match map(ring, page, libc::PROT_READ, page) {
            Ok(written) => Ok(Self { page, written, read }),
            Err(error) => {
                unmap(read, page);
                Err(error)
            }
        }
    }

    /// Takes what is there; whether there was anything.
    fn take(&self) -> bool {
        // SAFETY: both are mapped, aligned to a page, and are 64-bit counters at its beginning.
        let (written, read) = unsafe { (self.written.as_ref(), self.read.as_ref()) };
        let written = written.load(Ordering::Acquire);
        read.swap(written, Ordering::AcqRel) != written
    }
}

impl Drop for Positions {
    fn drop(&mut self) {
        for mapping in [self.written, self.read] {
            unmap(mapping, self.page);
        }
    }
}

/// Maps a page of the ring that begins with a counter.
fn map(ring: &OwnedFd, page: usize, access: libc::c_int, offset: usize) -> io::Result<NonNull<AtomicU64>> {
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: a new mapping, which replaces none.
    let mapping = unsafe { libc::mmap(std::ptr::null_mut(), page, access, libc::MAP_SHARED, ring.as_raw_fd(), offset) };
    if mapping == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(mapping.cast()).ok_or_else(|| io::Error::other("a mapping at address 0"))
}

/// Of a mapping by [`map`] that is used no more.
fn unmap(mapping: NonNull<AtomicU64>, page: usize) {
    // SAFETY: it was mapped with this length, and its only owner gives it up.
    unsafe { libc::munmap(mapping.as_ptr().cast(), page) };
}

fn page_size() -> io::Result<usize> {
    let size = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)?;
    size.and_then(|size| usize::try_from(size).ok()).ok_or_else(|| io::Error::other("no page size"))
}

/// The program (linux/bpf.h: struct bpf_sock_ops has the operation first, and its arguments after it).
fn compile(ring: &OwnedFd) -> Vec<Instruction> {
    const BPF_SOCK_OPS_STATE_CB: u32 = 10;
    const BPF_SOCK_OPS_TCP_LISTEN_CB: u32 = 11;
    const BPF_SOCK_OPS_STATE_CB_FLAG: u32 = 4;
    const SOCK_OPS_CB_FLAGS_SET: u32 = 59;
    const RINGBUF_OUTPUT: u32 = 130;
    const BPF_RB_FORCE_WAKEUP: u32 = 2;
    let [map, map_rest] = bpf::load_map(1, ring);
    vec![
        instruction(LOAD_WORD, 2, 1, 0, 0),
        instruction(JUMP_EQUAL, 2, 0, 4, BPF_SOCK_OPS_TCP_LISTEN_CB),
        instruction(JUMP_NOT_EQUAL, 2, 0, 13, BPF_SOCK_OPS_STATE_CB),
        // The state that it was in.
        instruction(LOAD_WORD, 2, 1, 4, 0),
        instruction(JUMP_EQUAL, 2, 0, 3, TCP_LISTEN),
        instruction(JUMP, 0, 0, 10, 0),
        // One that listens: its next state is to be told as well. Connections that it accepts inherit that.
        instruction(MOVE, 2, 0, 0, BPF_SOCK_OPS_STATE_CB_FLAG),
        instruction(CALL, 0, 0, 0, SOCK_OPS_CB_FLAGS_SET),
        // Tell.
        instruction(STORE_LONG, STACK, 0, -8, 0),
        map,
        map_rest,
        instruction(MOVE_REGISTER, 2, STACK, 0, 0),
        instruction(ADD, 2, 0, 0, -8_i32 as u32),
        instruction(MOVE, 3, 0, 0, 8),
        instruction(MOVE, 4, 0, 0, BPF_RB_FORCE_WAKEUP),
        instruction(CALL, 0, 0, 0, RINGBUF_OUTPUT),
        instruction(MOVE, 0, 0, 0, 1),
        instruction(EXIT, 0, 0, 0, 0),
    ]
}
