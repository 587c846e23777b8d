//! The guest's only program: it goes through all workloads of its kind, and says how long each took.

pub mod connect;
pub mod disk;
pub mod files;

use std::fs;
use std::io::{self, Write as _};
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use katavm_guest_image::cpio::Archive;
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};

use super::exchange;
use super::kinds::{DONE, Kind, Work, Workload, marks};

/// The word of the kernel's command line that has the kind, which the kernel puts into init's environment.
pub const KIND: &str = "KATAVM_IO";
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
    let name = std::env::var(KIND).context("the command line names no kind")?;
    let kind = Kind::of(&name).with_context(|| format!("no such kind: {name:?}"))?;
    mount(Some("dev"), "/dev", Some("devtmpfs"), MsFlags::empty(), None::<&str>).context("cannot mount /dev")?;
    match kind {
        Kind::Network => connect::set_up().context("cannot set up the network")?,
        Kind::Files => files::set_up().context("cannot mount the shared files")?,
        Kind::Disk | Kind::Vsock => {}
    }
    for (index, workload) in kind.workloads().iter().enumerate() {
        let mut load = prepare(kind, workload).with_context(|| workload.name)?;
        let (begin, end) = marks(index);
        mark(begin);
        sleep(LOOK);
        let start = Instant::now();
        load().with_context(|| workload.name)?;
        let took = start.elapsed();
        mark(end);
        sleep(LOOK);
        println!("io {} {}", workload.name, took.as_nanos());
    }
    Ok(())
}

/// Everything of a workload that is not to be measured; the rest is what is given.
fn prepare(kind: Kind, workload: &Workload) -> Result<Box<dyn FnMut() -> Result<()>>> {
    let count = workload.count;
    Ok(match workload.work {
        Work::Requests(requests) => {
            let mut queue = disk::Queue::new(requests)?;
            Box::new(move || queue.run(count))
        }
        Work::Exchange(exchange) => {
            let streams = (0..exchange.streams()).map(|_| connect::to_host(kind)).collect::<Result<Vec<_>>>()?;
            Box::new(move || Ok(exchange::ask(exchange, count, &streams)?))
        }
        Work::Files(work) => Box::new(move || files::run(work, count)),
    })
}

/// Leaves the guest, in a way that KVM's trace shows.
fn mark(leaf: u32) {
    std::hint::black_box(std::arch::x86_64::__cpuid(leaf));
}
