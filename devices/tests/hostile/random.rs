//! A driver without a plan. The same numbers every time, so that a failure comes again.

use crate::Outcome::{self, Either, Stopped};
use crate::common::*;
use crate::subject::Subject;

const OPERATIONS: usize = 20_000;
const ROUNDS: usize = 400;

/// xorshift64*, by Vigna.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 16) % end
    }

    fn of<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.below(values.len() as u64) as usize]
    }

    fn address(&mut self) -> u64 {
        let near = self.of(&[0, READABLE, WRITABLE, TABLE, LOW_END, HIGH_START, SEAM, HIGH_END, 1 << 32, 0]);
        near.wrapping_add(self.below(1 << 13)).wrapping_sub(1 << 12)
    }

    fn value(&mut self) -> u32 {
        match self.below(4) {
            0 => self.of(&[0, 1, 2, 3, 11, 15, 0x8f, u32::MAX]),
            1 => 1 << self.below(32),
            2 => self.address() as u32,
            _ => self.next() as u32,
        }
    }

    fn len(&mut self) -> u32 {
        match self.below(8) {
            0 => self.next() as u32,
            1 => 0,
            _ => self.of(&[1, 2, 16, 17, 20, 32, 512, 513, 4096, 0x10000]),
        }
    }

    fn desc(&mut self, entries: u16) -> Desc {
        let flags = match self.below(8) {
            0 => self.next() as u16,
            1 => INDIRECT,
            2..=4 => self.of(&[NEXT, NEXT | WRITE]),
            _ => self.of(&[0, WRITE]),
        };
        // Mostly sensible, or nothing would ever get past the first check.
        let addr = if self.below(8) == 0 { self.address() } else { READABLE + self.below(1 << 22) };
        let next = self.below(u64::from(entries) + 1) as u16;
        Desc { addr, len: self.len(), flags, next }
    }
}

fn registers(subject: &dyn Subject, machine: &mut Machine, seed: u64) -> Outcome {
    let mut dice = Dice(seed);
    for _ in 0..OPERATIONS {
        match dice.below(16) {
            0 => machine.start(),
            1 => {
                let queue = dice.below(machine.rings.len() as u64) as usize;
                machine.kick(queue);
            }
            2 => {
                machine.turn();
            }
            3 => {
                let mut bytes = vec![0; dice.below(17) as usize];
                let offset = if dice.below(8) == 0 { dice.next() } else { dice.below(0x1100) };
                machine.transport.read(offset, &mut bytes);
            }
            4 => {
                let bytes = vec![dice.next() as u8; dice.below(17) as usize];
                let offset = if dice.below(8) == 0 { dice.next() } else { dice.below(0x1100) };
                machine.transport.write(offset, &bytes);
            }
            5 => {
                let queue = dice.below(machine.rings.len() as u64) as usize;
                let (table, entry) = (machine.rings[queue].desc, dice.below(4) as u16);
                let desc = dice.desc(4);
                machine.describe(table, entry, desc);
                machine.offer(queue, entry);
            }
            6..=9 => {
                let status = dice.of(&[0, 1, 3, 11, 15, 0x80, 15 | 0x40]);
                machine.set(STATUS, status);
            }
            10..=12 => {
                let register = dice.of(&[0x30, 0x38, 0x44, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4]);
                let value = dice.value();
                machine.set(register, value);
            }
            _ => {
                let register = 4 * dice.below(0x48);
                let value = dice.value();
                machine.set(register, value);
                machine.get(register);
            }
        }
    }
    machine.set(STATUS, 0);
    machine.run();
    let _ = subject;
    Stopped
}

fn rings(subject: &dyn Subject, machine: &mut Machine, seed: u64) -> Outcome {
    let mut dice = Dice(seed);
    let queue = subject.queue();
    let mut answered = 0;
    for _ in 0..ROUNDS {
        if machine.needs_reset() {
            let features = machine.offered() & !if dice.below(2) == 0 { F_EVENT_IDX } else { 0 };
            machine.start_with(features);
        }
        let (mut request, _) = subject.request();
        request.resize(request.len().max(64), 0);
        for _ in 0..dice.below(4) {
            let at = dice.below(request.len() as u64) as usize;
            request[at] = dice.next() as u8;
        }
        machine.put(READABLE, &request);
        for entry in 0..16 {
            let desc = dice.desc(16);
            machine.describe(TABLE, entry, desc);
            let desc = dice.desc(16);
            machine.describe(machine.rings[queue].desc, entry, desc);
        }
        // One good start of a chain now and then.
        if dice.below(2) == 0 {
            let first = Desc { flags: NEXT, next: 1, ..readable(READABLE, request.len() as u32) };
            machine.describe(machine.rings[queue].desc, 0, first);
            let len = dice.len() & 0xffff;
            machine.describe(machine.rings[queue].desc, 1, writable(WRITABLE, len));
        }
        for _ in 0..=dice.below(4) {
            let head = dice.below(17) as u16;
            machine.offer(queue, head);
        }
        if dice.below(32) == 0 {
            machine.put(machine.rings[queue].avail + 2, &(dice.next() as u16).to_le_bytes());
        }
        machine.kick(queue);
        machine.run();
        answered += machine.used(queue).len();
    }
    assert!(answered > 0, "some of it must have made sense");
    Either
}

pub fn random_registers_1(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    registers(subject, machine, 1)
}

pub fn random_registers_2(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    registers(subject, machine, 0x1234_5678_9abc_def0)
}

pub fn random_registers_3(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    registers(subject, machine, 0xdead_beef)
}

pub fn random_registers_4(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    registers(subject, machine, u64::MAX)
}

pub fn random_rings_1(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    rings(subject, machine, 1)
}

pub fn random_rings_2(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    rings(subject, machine, 0x1234_5678_9abc_def0)
}

pub fn random_rings_3(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    rings(subject, machine, 0xdead_beef)
}

pub fn random_rings_4(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    rings(subject, machine, u64::MAX)
}
