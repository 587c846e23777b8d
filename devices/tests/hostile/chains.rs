//! Malformed descriptor chains.

use crate::Outcome::{self, Alive, Either, NeedsReset};
use crate::common::*;
use crate::subject::Subject;

/// Offers a chain whose first descriptor is a good header, so that a device which looks only at that is caught too.
fn after_header(subject: &dyn Subject, machine: &mut Machine, rest: &[Desc]) {
    let (mut request, _) = subject.request();
    request.resize(request.len().max(16), 0);
    machine.put(READABLE, &request);
    let header = readable(READABLE, request.len() as u32);
    machine.submit(subject.queue(), &linked(&[&[header], rest].concat()));
}

fn raw(subject: &dyn Subject, machine: &mut Machine, descriptors: &[Desc]) {
    machine.submit(subject.queue(), descriptors);
}

fn indirect(subject: &dyn Subject, machine: &mut Machine, table: &[Desc]) {
    machine.describe_all(TABLE, table);
    let len = 16 * table.len() as u32;
    raw(subject, machine, &[Desc { addr: TABLE, len, flags: INDIRECT, next: 0 }]);
}

pub fn descriptor_loop(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    let link = |next: u16| Desc { next, flags: WRITE | NEXT, ..writable(WRITABLE, 16) };
    raw(subject, machine, &[link(1), link(2), link(0)]);
    NeedsReset
}

pub fn descriptor_loop_to_itself(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    raw(subject, machine, &[Desc { flags: NEXT, ..readable(READABLE, 16) }]);
    NeedsReset
}

pub fn next_at_table_size(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    let next = machine.rings[subject.queue()].size;
    raw(subject, machine, &[Desc { flags: NEXT, next, ..readable(READABLE, 16) }]);
    NeedsReset
}

pub fn next_far_outside(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    raw(subject, machine, &[Desc { flags: NEXT, next: u16::MAX, ..readable(READABLE, 16) }]);
    NeedsReset
}

fn head(subject: &dyn Subject, machine: &mut Machine, head: u16) -> Outcome {
    machine.offer(subject.queue(), head);
    machine.kick(subject.queue());
    machine.run();
    NeedsReset
}

pub fn head_at_table_size(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    let size = machine.rings[subject.queue()].size;
    head(subject, machine, size)
}

pub fn head_far_outside(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    head(subject, machine, u16::MAX)
}

pub fn loop_in_indirect_table(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    let link = |next: u16| Desc { next, flags: WRITE | NEXT, ..writable(WRITABLE, 16) };
    indirect(subject, machine, &[link(1), link(0)]);
    NeedsReset
}

pub fn next_outside_indirect_table(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    // Entry 2 is good, in memory, and not part of the table.
    machine.describe(TABLE, 2, writable(WRITABLE, 64));
    indirect(subject, machine, &[Desc { flags: NEXT, next: 2, ..readable(READABLE, 16) }, writable(WRITABLE, 1)]);
    NeedsReset
}

pub fn indirect_nested(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    machine.describe(TABLE + 0x1000, 0, writable(WRITABLE, 64));
    indirect(subject, machine, &[Desc { addr: TABLE + 0x1000, len: 16, flags: INDIRECT, next: 0 }]);
    NeedsReset
}

pub fn indirect_with_next(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    machine.describe(TABLE, 0, writable(WRITABLE, 64));
    let table = Desc { addr: TABLE, len: 16, flags: INDIRECT | NEXT, next: 1 };
    raw(subject, machine, &[table, writable(WRITABLE, 64)]);
    NeedsReset
}

fn indirect_of(subject: &dyn Subject, machine: &mut Machine, addr: u64, len: u32) -> Outcome {
    machine.describe(TABLE, 0, writable(WRITABLE, 64));
    raw(subject, machine, &[Desc { addr, len, flags: INDIRECT, next: 0 }]);
    NeedsReset
}

pub fn indirect_length_zero(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    indirect_of(subject, machine, TABLE, 0)
}

pub fn indirect_length_odd(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    indirect_of(subject, machine, TABLE, 17)
}

pub fn indirect_table_of_65536(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    indirect_of(subject, machine, TABLE, 16 << 16)
}

pub fn indirect_table_of_4_gib(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    indirect_of(subject, machine, TABLE, 0xffff_fff0)
}

pub fn indirect_table_outside_memory(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    indirect_of(subject, machine, HIGH_END, 16)
}

pub fn indirect_table_beyond_end(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    machine.describe(HIGH_END - 16, 0, Desc { flags: NEXT | WRITE, next: 1, ..writable(WRITABLE, 64) });
    indirect_of(subject, machine, HIGH_END - 16, 32)
}

pub fn indirect_table_wraps(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    indirect_of(subject, machine, u64::MAX - 7, 32)
}

pub fn chain_longer_than_any_request(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    indirect(subject, machine, &linked(&vec![writable(WRITABLE, 1); 2000]));
    NeedsReset
}

pub fn buffer_of_4_gib(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    after_header(subject, machine, &[writable(WRITABLE, u32::MAX)]);
    NeedsReset
}

pub fn chain_beyond_4_gib(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    // Each buffer is all right.
    indirect(subject, machine, &linked(&vec![writable(0, LOW_END as u32); 257]));
    NeedsReset
}

pub fn address_wraps(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    after_header(subject, machine, &[writable(u64::MAX - 15, 4096)]);
    NeedsReset
}

pub fn buffer_straddles_gap(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    after_header(subject, machine, &[writable(LOW_END - 512, (HIGH_START - LOW_END) as u32 + 1024)]);
    NeedsReset
}

pub fn buffer_in_gap(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    after_header(subject, machine, &[writable(LOW_END + 4096, 64)]);
    NeedsReset
}

pub fn buffer_beyond_memory(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    after_header(subject, machine, &[writable(HIGH_END, 1)]);
    NeedsReset
}

pub fn only_first_byte_valid(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    after_header(subject, machine, &[writable(HIGH_END - 1, 4097)]);
    NeedsReset
}

pub fn only_last_byte_valid(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    after_header(subject, machine, &[writable(HIGH_START - 512, 513)]);
    NeedsReset
}

pub fn buffer_over_adjacent_regions(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    // Memory that was plugged in beside other memory: a driver sees no seam, so there must be none.
    let (request, room) = subject.request();
    let before = SEAM - u64::from(room / 2);
    machine.put(before, &vec![0xaa; room as usize]);
    let from = SEAM - (request.len() / 2) as u64 - 4096;
    machine.put(from, &request);
    let both = [readable(from, request.len() as u32), writable(before, room)];
    let present: Vec<Desc> = both.into_iter().filter(|desc| desc.len != 0).collect();
    machine.used(subject.queue());
    machine.submit(subject.queue(), &linked(&present));
    let (_, len) = machine.used(subject.queue())[0];
    subject.check(len, &machine.take(before, room as usize));
    Alive
}

pub fn readable_after_writable(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    after_header(subject, machine, &[writable(WRITABLE, 64), readable(READABLE, 64)]);
    NeedsReset
}

pub fn zero_length_buffers(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    raw(subject, machine, &linked(&[readable(READABLE, 0), readable(0, 0), writable(WRITABLE, 0), writable(0, 0)]));
    Alive
}

pub fn zero_length_buffer_outside_memory(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    raw(subject, machine, &linked(&[readable(u64::MAX, 0), writable(HIGH_END, 0), writable(LOW_END, 0)]));
    Either
}

pub fn no_writable_buffer(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    after_header(subject, machine, &[]);
    Alive
}

pub fn no_readable_buffer(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    raw(subject, machine, &[writable(WRITABLE, 4096)]);
    Alive
}

pub fn header_cut_short(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    for len in 0..16 {
        raw(subject, machine, &linked(&[readable(READABLE, len), writable(WRITABLE, 1)]));
    }
    Alive
}

pub fn header_bytewise(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    // A good request, each byte in a descriptor of its own: framing means nothing (2.7.4).
    let (request, room) = subject.request();
    machine.put(READABLE, &request);
    machine.put(WRITABLE, &vec![0xaa; room as usize]);
    let from = (0..request.len() as u64).map(|at| readable(READABLE + at, 1));
    let to = (0..u64::from(room)).map(|at| writable(WRITABLE + at, 1));
    let all: Vec<Desc> = from.chain(to).collect();
    assert!(all.len() <= 1024);
    machine.used(subject.queue());
    indirect(subject, machine, &linked(&all));
    let (_, len) = machine.used(subject.queue())[0];
    subject.check(len, &machine.take(WRITABLE, room as usize));
    Alive
}

pub fn one_byte_each(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    raw(subject, machine, &linked(&[readable(READABLE, 1), writable(WRITABLE, 1)]));
    Alive
}

pub fn every_bit_of_the_flags(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    for bit in 3..16 {
        // Bits without a meaning are none of the device's business.
        raw(subject, machine, &[Desc { flags: WRITE | 1 << bit, ..writable(WRITABLE, 128) }]);
    }
    Alive
}
