//! What one guest may make the host do: bounded memory, bounded turns.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use crate::Outcome::{self, Alive, Either};
use crate::common::*;
use crate::heap;
use crate::subject::Subject;

/// More than any device needs for a request; far less than the guest asks for.
const HEAP: usize = 4 << 20;

/// A chain of 255 buffers of 16 MiB, all of them the same valid memory: nearly 4 GiB.
fn huge(subject: &dyn Subject, machine: &mut Machine, buffers: impl Fn(u64, u32) -> Desc) {
    let (mut request, _) = subject.request();
    request.resize(request.len().max(16), 0);
    let at = HIGH_START;
    machine.put(at, &request);
    let mut all = vec![readable(at, request.len() as u32)];
    all.extend(vec![buffers(READABLE, (LOW_END - READABLE) as u32 & !511); 255]);
    all.push(writable(HIGH_START + 4096, 1));
    let (table, queue) = (HIGH_START + (1 << 20), subject.queue());
    machine.describe_all(table, &linked(&all));
    let start = Instant::now();
    let peak = heap::peak_during(|| {
        let len = 16 * all.len() as u32;
        machine.submit(queue, &[Desc { addr: table, len, flags: INDIRECT, next: 0 }]);
    });
    assert!(peak < HEAP, "one request made the host allocate {peak} bytes");
    assert!(start.elapsed() < Duration::from_secs(10), "one request kept the event loop for {:?}", start.elapsed());
}

pub fn huge_writable_request(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    huge(subject, machine, writable);
    Either
}

pub fn huge_readable_request(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    huge(subject, machine, readable);
    Either
}

pub fn queue_full_of_requests(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    let queue = subject.queue();
    let size = machine.rings[queue].size;
    let (request, room) = subject.request();
    machine.put(READABLE, &request);
    let desc = machine.rings[queue].desc;
    let pair = [readable(READABLE, request.len() as u32), writable(WRITABLE, room)];
    for head in (0..size).step_by(2) {
        machine.describe(desc, head, Desc { flags: NEXT, next: head + 1, ..pair[0] });
        machine.describe(desc, head + 1, pair[1]);
        machine.offer(queue, head);
    }
    // One kick is enough for all of them.
    machine.kick(queue);
    machine.run();
    let used = machine.used(queue);
    let heads: Vec<u32> = (0..u32::from(size)).step_by(2).collect();
    let mut given: Vec<u32> = used.iter().map(|(head, _)| *head).collect();
    given.sort_unstable();
    assert_eq!(given, heads, "each request is answered once");
    Alive
}

/// Is true once this is dropped.
struct Sets<'a>(&'a AtomicBool);

impl Drop for Sets<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

pub fn requests_forever(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    // Another CPU of the guest refills the ring while the device works on it: each turn must end by itself.
    const ALL: u16 = 40_000;
    const MOST_PER_TURN: u16 = 2_000;
    const TURNS: usize = 20_000;
    let queue = subject.queue();
    let ring = machine.rings[queue];
    let (request, room) = subject.request();
    machine.put(READABLE, &request);
    machine.describe_all(ring.desc, &linked(&[readable(READABLE, request.len() as u32), writable(WRITABLE, room)]));
    let memory = machine.memory.clone();
    // The ring is all zeroes: every entry is head 0. It is kept full until there were enough.
    let refill = move || {
        let used = memory.load::<u16>(GuestAddress(ring.used + 2), Ordering::Acquire).unwrap();
        memory.store(ALL.min(used.saturating_add(ring.size)), GuestAddress(ring.avail + 2), Ordering::Release).unwrap();
    };
    refill();
    let over = AtomicBool::new(false);
    let most = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                refill();
            }
        });
        let _at_the_end = Sets(&over);
        let (mut most, mut served) = (0, 0);
        // A device that is broken by this does nothing more.
        for _ in 0..TURNS {
            machine.kick(queue);
            machine.turn();
            let now = machine.u16_at(ring.used + 2);
            most = most.max(now - served);
            served = now;
            if served == ALL {
                break;
            }
        }
        most
    });
    machine.run();
    assert!((1..=MOST_PER_TURN).contains(&most), "{most} requests were served in one turn");
    Either
}
