//! The guest's only program: it goes through all workloads, and says how long each took.
//!
//! Requests are Linux' asynchronous ones (io_submit(2)) past the page cache, as fio's `libaio` makes them.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use katavm_guest_image::cpio::Archive;
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use super::workloads::{DISK, DONE, WORKLOADS, Workload, marks};

const DEVICE: &str = "/dev/vda";
/// How long the host may take to look at its counters.
const LOOK: Duration = Duration::from_millis(50);

/// An initramfs with this program as its init.
///
/// # Errors
/// When one of its files cannot be read.
pub fn initramfs() -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    for folder in ["dev", "lib64", "lib", "lib/x86_64-linux-gnu", "usr", "usr/lib", "usr/lib/x86_64-linux-gnu"] {
        archive.directory(folder, 0o755)?;
    }
    archive.character_device("dev/console", 0o600, (5, 1))?;
    archive.file("init", 0o755, &fs::read(std::env::current_exe()?)?)?;
    let maps = fs::read_to_string("/proc/self/maps")?;
    let mapped = maps.lines().filter_map(|line| line.split_ascii_whitespace().nth(5));
    let mut libraries: Vec<&str> = mapped.filter(|path| path.contains(".so")).collect();
    libraries.sort_unstable();
    libraries.dedup();
    for library in libraries {
        let content = fs::read(library).with_context(|| format!("cannot read {library}"))?;
        let name = Path::new(library).file_name().and_then(|name| name.to_str()).context("a library without a name")?;
        if name.starts_with("ld-linux") {
            archive.file("lib64/ld-linux-x86-64.so.2", 0o755, &content)?;
        }
        archive.file(format!("lib/x86_64-linux-gnu/{name}"), 0o755, &content)?;
    }
    Ok(archive.finish())
}

/// What the init does, to the end of its machine.
pub fn run() {
    match work() {
        Ok(()) => println!("io done"),
        Err(error) => println!("io failed: {error:#}"),
    }
    let _ = io::stdout().flush();
    // SAFETY: tcdrain(3) on the console takes a descriptor and nothing else.
    unsafe { libc::tcdrain(libc::STDOUT_FILENO) };
    mark(DONE);
    // It does not return.
    let _ = reboot(RebootMode::RB_AUTOBOOT);
}

fn work() -> Result<()> {
    mount(Some("dev"), "/dev", Some("devtmpfs"), MsFlags::empty(), None::<&str>).context("cannot mount /dev")?;
    let disk = File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(DEVICE);
    let disk = disk.with_context(|| format!("cannot open {DEVICE}"))?;
    for (index, workload) in WORKLOADS.iter().enumerate() {
        let mut queue = Queue::new(&disk, workload)?;
        let (begin, end) = marks(index);
        mark(begin);
        sleep(LOOK);
        let start = Instant::now();
        queue.run()?;
        let took = start.elapsed();
        mark(end);
        sleep(LOOK);
        println!("io {} {}", workload.name, took.as_nanos());
    }
    Ok(())
}

/// Leaves the guest, in a way that KVM's trace shows.
fn mark(leaf: u32) {
    std::hint::black_box(std::arch::x86_64::__cpuid(leaf));
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
struct Queue<'a> {
    disk: &'a File,
    workload: &'a Workload,
    context: libc::c_ulong,
    buffers: *mut libc::c_void,
    random: u64,
    next: usize,
}

impl<'a> Queue<'a> {
    fn new(disk: &'a File, workload: &'a Workload) -> Result<Self> {
        let mut context: libc::c_ulong = 0;
        // SAFETY: io_setup(2) writes a number to `context`.
        let done = unsafe { libc::syscall(libc::SYS_io_setup, workload.depth, &raw mut context) };
        ensure!(done == 0, "io_setup: {}", io::Error::last_os_error());
        let len = workload.depth * workload.len;
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::POPULATE);
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let buffers = unsafe { mmap_anonymous(std::ptr::null_mut(), len, access, flags) }?;
        Ok(Self { disk, workload, context, buffers, random: 0x9e37_79b9_7f4a_7c15, next: 0 })
    }

    /// Keeps as many requests under way as it may, until all are done.
    fn run(&mut self) -> Result<()> {
        let Workload { depth, count, len, .. } = *self.workload;
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
        let Workload { len, random, writes, .. } = *self.workload;
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

impl Drop for Queue<'_> {
    fn drop(&mut self) {
        let len = self.workload.depth * self.workload.len;
        // SAFETY: io_destroy(2) waits for requests that are under way; after it nobody knows the mapping any more.
        unsafe {
            libc::syscall(libc::SYS_io_destroy, self.context);
            let _ = munmap(self.buffers, len);
        }
    }
}
