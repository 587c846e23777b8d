//! Queue registers and rings that are wrong.

use crate::Outcome::{self, Alive, Either, NeedsReset};
use crate::common::*;
use crate::subject::Subject;

/// Sets the device up again with `change` made to the ring of the request queue before.
fn start_with_ring(subject: &dyn Subject, machine: &mut Machine, change: impl FnOnce(&mut Ring)) {
    change(&mut machine.rings[subject.queue()]);
    machine.start();
}

/// Sets the device up again; `change` may spoil the registers of the request queue before it is made ready.
fn start_with_registers(subject: &dyn Subject, machine: &mut Machine, change: impl FnOnce(&mut Machine)) -> Outcome {
    let features = machine.offered();
    machine.negotiate(features & !F_EVENT_IDX);
    for queue in (0..machine.rings.len()).filter(|queue| *queue != subject.queue()) {
        machine.set_up(queue);
    }
    let Ring { size, desc, avail, used, .. } = machine.rings[subject.queue()];
    machine.set(QUEUE_SEL, subject.queue() as u32);
    machine.set(QUEUE_SIZE, size.into());
    machine.set_address(QUEUE_DESC, desc);
    machine.set_address(QUEUE_DRIVER, avail);
    machine.set_address(QUEUE_DEVICE, used);
    change(machine);
    machine.set(QUEUE_READY, 1);
    machine.set(STATUS, RUNNING);
    machine.kick(subject.queue());
    machine.run();
    NeedsReset
}

fn available_index(subject: &dyn Subject, machine: &mut Machine, index: u16) {
    machine.put(machine.rings[subject.queue()].avail + 2, &index.to_le_bytes());
    machine.kick(subject.queue());
    machine.run();
}

pub fn available_index_beyond_size(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    let size = machine.rings[subject.queue()].size;
    available_index(subject, machine, size + 1);
    NeedsReset
}

pub fn available_index_backwards(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    available_index(subject, machine, u16::MAX);
    NeedsReset
}

pub fn available_index_exactly_size(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    let queue = subject.queue();
    let size = machine.rings[queue].size;
    machine.describe_all(machine.rings[queue].desc, &vec![writable(WRITABLE, 128); size.into()]);
    (0..size).for_each(|head| machine.offer(queue, head));
    machine.kick(queue);
    machine.run();
    assert_eq!(machine.used(queue).len(), usize::from(size), "a full ring is served in full");
    Alive
}

pub fn same_head_twice(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    let queue = subject.queue();
    machine.describe(machine.rings[queue].desc, 0, writable(WRITABLE, 64));
    machine.offer(queue, 0);
    machine.offer(queue, 0);
    machine.kick(queue);
    machine.run();
    // A device that was done with the first before it took the second cannot tell.
    Either
}

pub fn index_wraps(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    // Both indices run over the end of 16 bits; a snapshot brings them there.
    let mut state = machine.transport.save();
    let queue = subject.queue();
    (state.queues[queue].next_avail, state.queues[queue].next_used) = (65533, 65533);
    let ring = &mut machine.rings[queue];
    (ring.next, ring.seen) = (65533, 65533);
    let Ring { avail, used, .. } = *ring;
    machine.put(avail + 2, &65533u16.to_le_bytes());
    machine.put(used + 2, &65533u16.to_le_bytes());
    let rings = machine.rings.clone();
    let (mut restored, result) = Machine::restored(subject.device(), machine.memory.clone(), &state, &rings);
    result.unwrap();
    for _ in 0..8 {
        subject.good(&mut restored);
    }
    assert!(restored.rings[queue].next < 65533, "the index has wrapped");
    assert!(!restored.needs_reset());
    Alive
}

type Area = fn(&mut Ring) -> &mut u64;
const AREAS: [Area; 3] = [|ring| &mut ring.desc, |ring| &mut ring.avail, |ring| &mut ring.used];

/// Starts with each of the three areas at `address`; every one of them must be refused.
fn each_area_at(subject: &dyn Subject, machine: &mut Machine, address: impl Fn(&Ring, usize) -> u64) -> Outcome {
    let good = machine.rings[subject.queue()];
    for (which, area) in AREAS.iter().enumerate() {
        start_with_ring(subject, machine, |ring| *area(ring) = address(&good, which));
        machine.kick(subject.queue());
        machine.run();
        assert!(machine.needs_reset(), "area {which}");
        machine.rings[subject.queue()] = good;
    }
    NeedsReset
}

fn area_len(ring: &Ring, which: usize) -> u64 {
    let size = u64::from(ring.size);
    [16 * size, 6 + 2 * size, 6 + 8 * size][which]
}

pub fn ring_outside_memory(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    each_area_at(subject, machine, |_, _| 1 << 40)
}

pub fn ring_in_gap(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    each_area_at(subject, machine, |_, _| LOW_END)
}

pub fn ring_one_byte_beyond_memory(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    each_area_at(subject, machine, |ring, which| {
        let unit = [16, 2, 4][which];
        // The last aligned place at which it does not fit any more.
        (HIGH_END - area_len(ring, which)) / unit * unit + unit
    })
}

pub fn ring_wraps(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    each_area_at(subject, machine, |_, _| u64::MAX - 15)
}

pub fn ring_to_the_last_byte(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    let good = machine.rings[subject.queue()];
    for (which, area) in AREAS.iter().enumerate() {
        let unit = [16, 2, 4][which];
        let at = (HIGH_END - area_len(&good, which)) / unit * unit;
        start_with_ring(subject, machine, |ring| *area(ring) = at);
        subject.good(machine);
        machine.rings[subject.queue()] = good;
    }
    Alive
}

pub fn rings_over_each_other(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    start_with_ring(subject, machine, |ring| (ring.avail, ring.used) = (ring.desc, ring.desc));
    for index in 0..64 {
        available_index(subject, machine, index);
    }
    Either
}

pub fn used_ring_over_descriptors(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    start_with_ring(subject, machine, |ring| ring.used = ring.desc);
    for head in 0..16 {
        machine.describe(machine.rings[subject.queue()].desc, head, writable(WRITABLE, 64));
        machine.offer(subject.queue(), head);
    }
    machine.kick(subject.queue());
    machine.run();
    Either
}

fn size(subject: &dyn Subject, machine: &mut Machine, size: u32) -> Outcome {
    start_with_registers(subject, machine, |machine| machine.set(QUEUE_SIZE, size))
}

pub fn size_zero(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    size(subject, machine, 0)
}

pub fn size_no_power_of_two(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    size(subject, machine, 3)
}

pub fn size_too_large(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    let most = u32::from(machine.rings[subject.queue()].size);
    size(subject, machine, 2 * most)
}

pub fn size_wraps_to_valid(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    // A size of 8 for whoever looks at 16 bits only.
    size(subject, machine, 0x1_0008)
}

pub fn areas_misaligned(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    for (register, off) in [(QUEUE_DESC, 8), (QUEUE_DRIVER, 1), (QUEUE_DEVICE, 2)] {
        start_with_registers(subject, machine, |machine| machine.set(register, 0x10_0000 + off));
        assert!(machine.needs_reset(), "register {register:#x}");
    }
    NeedsReset
}

pub fn no_queue_ready(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    let features = machine.offered() & !F_EVENT_IDX;
    machine.negotiate(features);
    // Areas outside memory, for a device that writes to a queue which is not ready.
    for queue in 0..machine.rings.len() {
        machine.set(QUEUE_SEL, queue as u32);
        machine.set_address(QUEUE_DEVICE, 1 << 40);
    }
    machine.set(STATUS, RUNNING);
    (0..machine.rings.len()).for_each(|queue| machine.kick(queue));
    machine.run();
    assert_eq!(machine.get(QUEUE_READY), 0);
    let _ = subject;
    Alive
}

pub fn frozen_after_driver_ok(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    let queue = subject.queue();
    let before = machine.transport.save();
    machine.set(QUEUE_SEL, queue as u32);
    for value in [0, 1, 2, 0x8000, 0x1_0000, u32::MAX] {
        for register in [0x38, 0x44, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4] {
            machine.set(register, value);
        }
    }
    assert_eq!(machine.get(QUEUE_READY), 1);
    assert_eq!(machine.transport.save().queues, before.queues, "nothing has changed");
    subject.good(machine);
    Alive
}

pub fn frozen_before_features_ok(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    machine.set(STATUS, 0);
    let fresh = machine.transport.save().queues;
    for status in [0, 1, 3] {
        machine.set(STATUS, status);
        machine.set_up(subject.queue());
        assert_eq!(machine.get(QUEUE_READY), 0);
        assert_eq!(machine.transport.save().queues, fresh, "at status {status}");
    }
    Outcome::Stopped
}

pub fn frozen_while_ready(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    let features = machine.offered();
    machine.negotiate(features & !F_EVENT_IDX);
    (0..machine.rings.len()).for_each(|queue| machine.set_up(queue));
    machine.set(QUEUE_SEL, subject.queue() as u32);
    for (register, value) in [(QUEUE_SIZE, 2), (QUEUE_SIZE, 3), (QUEUE_DESC, 0x1000), (QUEUE_DEVICE + 4, 7)] {
        machine.set(register, value);
    }
    machine.set(STATUS, RUNNING);
    subject.good(machine);
    Alive
}

pub fn queue_out_of_range(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    let features = machine.offered();
    machine.negotiate(features & !F_EVENT_IDX);
    for queue in [machine.rings.len() as u32, 0xffff, 0x1_0000, u32::MAX] {
        machine.set(QUEUE_SEL, queue);
        assert_eq!(machine.get(QUEUE_SIZE_MAX), 0, "there is no queue {queue}");
        assert_eq!(machine.get(QUEUE_READY), 0);
        for register in [0x38, 0x44, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4] {
            machine.set(register, 0x1000);
        }
    }
    (0..machine.rings.len()).for_each(|queue| machine.set_up(queue));
    machine.set(STATUS, RUNNING);
    subject.good(machine);
    Alive
}

pub fn notify_out_of_range(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    for queue in [machine.rings.len() as u32, 0xffff, 0x1_0000, u32::MAX] {
        machine.set(QUEUE_NOTIFY, queue);
    }
    machine.run();
    subject.good(machine);
    Alive
}

pub fn notify_before_driver_ok(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    let queue = subject.queue();
    let features = machine.offered();
    machine.negotiate(features & !F_EVENT_IDX);
    (0..machine.rings.len()).for_each(|queue| machine.set_up(queue));
    machine.describe(machine.rings[queue].desc, 0, writable(WRITABLE, 64));
    machine.offer(queue, 0);
    machine.kick(queue);
    machine.run();
    assert!(machine.used(queue).is_empty(), "nothing is taken before DRIVER_OK");
    Outcome::Stopped
}

pub fn notify_storm(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    for _ in 0..10_000 {
        machine.kick(subject.queue());
    }
    machine.run();
    Alive
}

pub fn buffers_into_the_rings(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    // The device is asked to write over the very tables that it reads from.
    let queue = subject.queue();
    let ring = machine.rings[queue];
    for (addr, len) in [(ring.desc, 16 * u32::from(ring.size)), (ring.avail, 512), (ring.used, 512)] {
        let (request, _) = subject.request();
        machine.put(READABLE, &request);
        let both = [readable(READABLE, request.len() as u32), writable(addr, len)];
        machine.submit(queue, &linked(&both));
    }
    Either
}

pub fn used_event_ahead(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    // A nonsense used_event may cost the driver an interrupt, nothing else.
    let features = machine.offered();
    machine.start_with(features);
    let queue = subject.queue();
    let ring = machine.rings[queue];
    for event in [0u16, 1, 77, 0x7fff, 0x8000, 0xffff] {
        machine.put(ring.avail + 4 + 2 * u64::from(ring.size), &event.to_le_bytes());
        let (request, room) = subject.request();
        let (len, answer) = machine.exchange(queue, &request, room);
        subject.check(len.expect("served"), &answer);
    }
    Alive
}
