//! The device status field, features and resets, misused.

use crate::Outcome::{self, Alive, NeedsReset, Stopped};
use crate::common::*;
use crate::subject::Subject;

pub fn every_step_from_every_status(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    const LEGAL: [u32; 5] = [0, 1, 3, 11, 15];
    for from in 0..LEGAL.len() {
        for value in 0..=0xffu32 {
            let features = machine.offered();
            machine.set(STATUS, 0);
            for status in &LEGAL[1..=from] {
                machine.set(STATUS, *status);
                if *status == 3 {
                    machine.accept(features);
                }
            }
            let current = LEGAL[from];
            assert_eq!(machine.get(STATUS), current);
            machine.set(STATUS, value);
            let now = machine.get(STATUS) & !NEEDS_RESET;
            let value = value & !NEEDS_RESET;
            let failed = value & 0x80 != 0 && value & current == current && value & 0x30 == 0;
            let gates = (value & !current & 12).count_ones();
            let expected = match value {
                0 => 0,
                _ if failed => current | 0x80,
                _ if LEGAL.contains(&value) && value & current == current && gates <= 1 => {
                    // Without features (skipped with DRIVER), FEATURES_OK is refused.
                    if value == 11 && current < 3 { current } else { value }
                }
                _ => current,
            };
            assert_eq!(now, expected, "{current:#x} <- {value:#x}");
        }
    }
    let _ = subject;
    machine.set(STATUS, 0);
    Stopped
}

pub fn driver_ok_without_features_ok(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    machine.set(STATUS, 0);
    machine.set(STATUS, 1);
    machine.set(STATUS, 3);
    machine.set(STATUS, 7);
    machine.set(STATUS, 15);
    assert_eq!(machine.get(STATUS), 3, "the steps were refused");
    machine.kick(subject.queue());
    machine.run();
    Stopped
}

pub fn features_ok_twice(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    let features = machine.offered() & !F_EVENT_IDX;
    machine.negotiate(features);
    machine.accept(F_VERSION_1);
    machine.set(STATUS, 11);
    assert_eq!(machine.transport.save().driver_features, features, "features are settled by the first");
    (0..machine.rings.len()).for_each(|queue| machine.set_up(queue));
    machine.set(STATUS, RUNNING);
    machine.set(STATUS, RUNNING);
    machine.set(STATUS, 11);
    subject.good(machine);
    Alive
}

pub fn unoffered_features(_: &dyn Subject, machine: &mut Machine) -> Outcome {
    let offered = machine.offered();
    for bit in (0..64).filter(|bit| offered & 1 << bit == 0) {
        machine.negotiate(F_VERSION_1 | 1 << bit);
        assert_eq!(machine.get(STATUS), 3, "FEATURES_OK is refused for bit {bit}");
        machine.set(STATUS, 15);
        assert_eq!(machine.get(STATUS), 3);
    }
    Stopped
}

pub fn version_1_missing(_: &dyn Subject, machine: &mut Machine) -> Outcome {
    let offered = machine.offered();
    machine.negotiate(offered & !F_VERSION_1);
    assert_eq!(machine.get(STATUS), 3, "FEATURES_OK is refused");
    Stopped
}

pub fn features_after_features_ok(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    let before = machine.transport.save().driver_features;
    machine.accept(u64::MAX);
    machine.accept(0);
    machine.set(DRIVER_FEATURES_SEL, 2);
    machine.set(DRIVER_FEATURES, 1);
    assert_eq!(machine.transport.save().driver_features, before);
    subject.good(machine);
    Alive
}

pub fn failed_stops_everything(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    let queue = subject.queue();
    machine.set(STATUS, 0x8f);
    assert_eq!(machine.get(STATUS), 0x8f);
    machine.describe(machine.rings[queue].desc, 0, writable(WRITABLE, 64));
    machine.offer(queue, 0);
    machine.kick(queue);
    machine.run();
    assert!(machine.used(queue).is_empty(), "a device that was given up takes nothing");
    machine.set(STATUS, 15);
    assert_eq!(machine.get(STATUS), 0x8f, "only a reset is heard");
    Stopped
}

/// Leaves a request in the ring with its kick under way, resets, and lets the device look at it.
fn pending_then(subject: &dyn Subject, machine: &mut Machine, reset: impl FnOnce(&mut Machine)) {
    let queue = subject.queue();
    let (request, room) = subject.request();
    machine.put(READABLE, &request);
    machine.put(WRITABLE, &vec![0xaa; room as usize]);
    let both = [readable(READABLE, request.len() as u32), writable(WRITABLE, room)];
    let size = machine.rings[queue].size;
    machine.describe_all(machine.rings[queue].desc, &linked(&both));
    (0..size).for_each(|_| machine.offer(queue, 0));
    machine.kick(queue);
    reset(machine);
    let ring = machine.rings[queue];
    let used = machine.take(ring.used, 6 + 8 * usize::from(ring.size));
    machine.put(WRITABLE, &vec![0xbb; room as usize]);
    machine.interrupted();
    machine.run();
    assert_eq!(machine.take(ring.used, used.len()), used, "the used ring is not written after a reset");
    assert!(machine.take(WRITABLE, room as usize).iter().all(|byte| *byte == 0xbb), "nor is a buffer");
    assert!(!machine.interrupted(), "nor is the driver interrupted");
}

pub fn reset_with_request_pending(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    pending_then(subject, machine, |machine| machine.set(STATUS, 0));
    Stopped
}

pub fn reset_between_turns(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    // The device has served some and kicked itself for the rest.
    pending_then(subject, machine, |machine| {
        machine.turn();
        machine.set(STATUS, 0);
    });
    Stopped
}

pub fn kick_after_failure(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    let queue = subject.queue();
    machine.put(machine.rings[queue].avail + 2, &u16::MAX.to_le_bytes());
    machine.kick(queue);
    machine.run();
    assert!(machine.needs_reset());
    // All is well in the ring again, but it is too late.
    let ring = machine.rings[queue];
    machine.put(ring.avail + 2, &0u16.to_le_bytes());
    machine.describe(ring.desc, 0, writable(WRITABLE, 64));
    machine.offer(queue, 0);
    machine.kick(queue);
    machine.run();
    assert!(machine.used(queue).is_empty(), "a failed device takes nothing");
    machine.set(STATUS, RUNNING | NEEDS_RESET);
    machine.set(STATUS, RUNNING);
    NeedsReset
}

pub fn start_a_hundred_times(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    for _ in 0..100 {
        machine.start();
        let (request, room) = subject.request();
        let (len, answer) = machine.exchange(subject.queue(), &request, room);
        subject.check(len.expect("served"), &answer);
    }
    Alive
}

pub fn high_status_bits(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    for bit in 8..32 {
        machine.set(STATUS, 1 << bit);
        machine.set(STATUS, RUNNING | 1 << bit);
        machine.set(STATUS, 0x80 | 1 << bit);
        assert_eq!(machine.get(STATUS), RUNNING);
    }
    subject.good(machine);
    Alive
}
