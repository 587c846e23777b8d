//! Requests of a disk: Linux' asynchronous ones (io_submit(2)) past the page cache, as fio's `libaio` makes them.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context as _, Result, ensure};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

const DEVICE: &str = "/dev/vda";
/// Bytes of the disk.
pub const DISK: usize = 128 << 20;

/// A kind of requests.
#[derive(Clone, Copy, Debug)]
pub struct Requests {
    /// Writes, else reads.
    pub writes: bool,
    /// At random places, else one after the other.
    pub random: bool,
    /// Bytes of a request.
    pub len: usize,
    /// Requests at a time.
    pub depth: usize,
}

/// `struct iocb` (linux/aio_abi.h), little-endian.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Request {
    data: u64,
    key: u32,
    rw_flags: i32,
    opcode: u16,
    priority: i16,
    descriptor: u32,
    buffer: u64,
    len: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    eventfd: u32,
}

/// `struct io_event`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Event {
    data: u64,
    request: u64,
    result: i64,
    more: i64,
}

/// Requests of one workload.
pub struct Queue {
    disk: File,
    kind: Requests,
    context: libc::c_ulong,
    buffers: *mut libc::c_void,
    random: u64,
    next: usize,
}

impl Queue {
    /// Opens the disk and has room for all requests at a time.
    ///
    /// # Errors
    /// When there is no disk.
    pub fn new(kind: Requests) -> Result<Self> {
        let disk = File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(DEVICE);
        let disk = disk.with_context(|| format!("cannot open {DEVICE}"))?;
        let mut context: libc::c_ulong = 0;
        // SAFETY: io_setup(2) writes a number to `context`.
        let done = unsafe { libc::syscall(libc::SYS_io_setup, kind.depth, &raw mut context) };
        ensure!(done == 0, "io_setup: {}", io::Error::last_os_error());
        let len = kind.depth * kind.len;
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::POPULATE);
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let buffers = unsafe { mmap_anonymous(std::ptr::null_mut(), len, access, flags) }?;
        Ok(Self { disk, kind, context, buffers, random: 0x9e37_79b9_7f4a_7c15, next: 0 })
    }

    /// Keeps as many requests under way as it may, until `count` are done.
    ///
    /// # Errors
    /// When one fails.
    pub fn run(&mut self, count: usize) -> Result<()> {
        let Requests { depth, len, .. } = self.kind;
        let mut requests = vec![Request::default(); depth];
        let mut idle: Vec<usize> = (0..depth).collect();
        let (mut begun, mut done) = (0, 0);
        while done < count {
            let fresh: Vec<usize> = idle.drain(..idle.len().min(count - begun)).collect();
            begun += fresh.len();
            for slot in &fresh {
                requests[*slot] = self.request(*slot);
            }
            let pointers: Vec<*mut Request> =
                fresh.iter().map(|slot| requests.as_mut_ptr().wrapping_add(*slot)).collect();
            // SAFETY: `requests` and the buffers that they name live until all of them are done, at the end of this
            // function; nothing looks at a buffer meanwhile.
            let taken = unsafe { libc::syscall(libc::SYS_io_submit, self.context, pointers.len(), pointers.as_ptr()) };
            ensure!(taken == pointers.len() as i64 || fresh.is_empty(), "io_submit: {taken}");
            let mut events = vec![Event::default(); depth];
            // SAFETY: `events` has room for as many as are asked for.
            let got = unsafe {
                libc::syscall(libc::SYS_io_getevents, self.context, 1_usize, depth, events.as_mut_ptr(), 0_usize)
            };
            ensure!(got > 0, "io_getevents: {}", io::Error::last_os_error());
            for event in events.iter().take(got as usize) {
                ensure!(event.result == len as i64, "a request gave {}", event.result);
                idle.push(event.data as usize);
                done += 1;
            }
        }
        Ok(())
    }

    fn request(&mut self, slot: usize) -> Request {
        let Requests { len, random, writes, .. } = self.kind;
        let places = DISK / len;
        let place = if random {
            // xorshift64
            self.random ^= self.random << 13;
            self.random ^= self.random >> 7;
            self.random ^= self.random << 17;
            (self.random % places as u64) as usize
        } else {
            self.next = (self.next + 1) % places;
            self.next
        };
        Request {
            data: slot as u64,
            opcode: u16::from(writes),
            descriptor: self.disk.as_raw_fd() as u32,
            buffer: self.buffers as u64 + (slot * len) as u64,
            len: len as u64,
            offset: (place * len) as i64,
            ..Request::default()
        }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        let len = self.kind.depth * self.kind.len;
        // SAFETY: io_destroy(2) waits for requests that are under way; after it nobody knows the mapping any more.
        unsafe {
            libc::syscall(libc::SYS_io_destroy, self.context);
            let _ = munmap(self.buffers, len);
        }
    }
}
