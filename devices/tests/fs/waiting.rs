//! Requests that wait on the host are in nobody's way.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use event_manager::{EventManager, SubscriberOps};
use katavm_devices::fs::ExportOptions;
use katavm_devices::virtio::Worker;

use crate::driver::{Guest, Msg, Posted, REQUESTS, scratch, u32_at};

const LIMIT: Duration = Duration::from_secs(20);

/// Threads that serve `workers` until this is dropped.
struct Threads {
    over: Arc<AtomicBool>,
    running: Vec<JoinHandle<()>>,
}

impl Threads {
    fn start(workers: &[Worker]) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let running = workers.iter().map(|worker| {
            let (worker, over) = (Arc::clone(worker), Arc::clone(&over));
            thread::spawn(move || {
                let mut events = EventManager::<Worker>::new().unwrap();
                events.add_subscriber(worker);
                while !over.load(Ordering::Relaxed) {
                    events.run_with_timeout(50).unwrap();
                }
            })
        });
        Self { running: running.collect(), over }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        for thread in self.running.drain(..) {
            thread.join().unwrap();
        }
    }
}

/// A lease of this process on a file (fcntl(2)): who opens it waits until it is dropped.
struct Lease(File);

impl Lease {
    /// None, with the reason printed, on file systems without leases.
    fn take(path: &Path) -> Option<Self> {
        let file = File::create(path).unwrap();
        // SAFETY: from now on the signal that tells of who waits is ignored in this process, and so does not end it.
        unsafe { libc::signal(libc::SIGIO, libc::SIG_IGN) };
        // SAFETY: takes plain integers; the descriptor is open.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK) } == 0 {
            return Some(Self(file));
        }
        println!("SKIPPED: no leases here: {}", std::io::Error::last_os_error());
        None
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // SAFETY: as above.
        unsafe { libc::fcntl(self.0.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK) };
    }
}

/// Asks for a file to be opened.
fn open(guest: &mut Guest, node: u64, lane: u16) -> Posted {
    let request = guest.request(14, node, &Msg::new().u32(libc::O_RDONLY.cast_unsigned()).u32(0));
    guest.post(lane, REQUESTS, &request, 16 + 16)
}

fn awaited(guest: &Guest, posted: Posted) -> Vec<u8> {
    let start = Instant::now();
    loop {
        if let Some(reply) = guest.reply(posted) {
            assert_eq!(u32_at(&reply, 4), 0, "it goes well");
            return reply;
        }
        assert!(start.elapsed() < LIMIT, "no reply");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn others_are_served_while_some_wait() {
    let (_dir, path) = scratch();
    let names = ["a", "b", "c"];
    names.iter().for_each(|name| fs::write(path.join(name), name).unwrap());
    let mut guest = Guest::mount(&path, ExportOptions::default());
    let root = guest.root();
    let nodes: Vec<u64> = names.iter().map(|name| guest.lookup(root, name).unwrap().node).collect();
    let Some(first) = Lease::take(&path.join("a")) else { return };
    let Some(second) = Lease::take(&path.join("b")) else { return };
    // This thread is the driver's alone.
    let _threads = Threads::start(guest.workers());
    let waiting = [open(&mut guest, nodes[0], 1), open(&mut guest, nodes[1], 2)];
    for _ in 0..50 {
        let posted = open(&mut guest, nodes[2], 0);
        awaited(&guest, posted);
    }
    assert!(waiting.iter().all(|posted| guest.reply(*posted).is_none()), "both wait for their leases");
    drop(second);
    awaited(&guest, waiting[1]);
    assert!(guest.reply(waiting[0]).is_none(), "the other waits on");
    drop(first);
    awaited(&guest, waiting[0]);
    // And they are at work again.
    let posted = open(&mut guest, nodes[2], 0);
    awaited(&guest, posted);
}

#[test]
fn a_reset_waits_for_what_is_under_way() {
    let (_dir, path) = scratch();
    fs::write(path.join("a"), "a").unwrap();
    let mut guest = Guest::mount(&path, ExportOptions::default());
    let root = guest.root();
    let node = guest.lookup(root, "a").unwrap().node;
    let Some(lease) = Lease::take(&path.join("a")) else { return };
    let _threads = Threads::start(guest.workers());
    let posted = open(&mut guest, node, 1);
    thread::sleep(Duration::from_millis(50));
    let start = Instant::now();
    let patience = Duration::from_millis(200);
    let giver = thread::spawn(move || {
        thread::sleep(patience);
        drop(lease);
    });
    guest.reset_device();
    assert!(start.elapsed() >= patience, "the driver may not have its memory back while a request is under way");
    assert!(guest.reply(posted).is_none(), "what was asked before the reset is not answered after it");
    giver.join().unwrap();
}
