//! Snapshots: good ones, and ones that lie.

use katavm_devices::virtio::mmio::MmioState;

use crate::Outcome::{self, Alive, NeedsReset};
use crate::common::*;
use crate::subject::Subject;

/// As it is read back from a file.
fn stored(state: &MmioState) -> MmioState {
    postcard::from_bytes(&postcard::to_stdvec(state).unwrap()).unwrap()
}

fn restore(subject: &dyn Subject, machine: &Machine, state: &MmioState) -> Result<Machine, String> {
    let memory = machine.memory.clone();
    let (restored, result) = Machine::restored(subject.device(), memory, &stored(state), &machine.rings);
    result.map(|()| restored).map_err(|error| error.to_string())
}

pub fn good_snapshot(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    subject.good(machine);
    let state = machine.transport.save();
    assert_eq!(stored(&state), state);
    let mut restored = restore(subject, machine, &state).unwrap();
    assert_eq!(restored.transport.save(), state);
    restored.run();
    subject.good(&mut restored);
    assert_eq!(restored.get(STATUS), RUNNING);
    Alive
}

type Lie = (&'static str, fn(&mut MmioState));

const LIES: [Lie; 23] = [
    ("size 0", |state| state.queues[0].size = 0),
    ("size 3", |state| state.queues[0].size = 3),
    ("size beyond the most", |state| state.queues[0].size = 0x8000),
    ("another greatest size", |state| state.queues[0].max_size = 0x4000),
    ("greatest size 0", |state| state.queues[0].max_size = 0),
    ("no queues", |state| state.queues.clear()),
    ("a queue too many", |state| state.queues.push(state.queues[0].clone())),
    ("table outside memory", |state| state.queues[0].desc_table = 1 << 40),
    ("table misaligned", |state| state.queues[0].desc_table += 8),
    ("driver area beyond the end", |state| state.queues[0].avail_ring = HIGH_END - 2),
    ("device area wraps", |state| state.queues[0].used_ring = u64::MAX - 3),
    ("device area in the gap", |state| state.queues[0].used_ring = LOW_END),
    ("head outside the table", |state| state.queues[0].in_flight = vec![state.queues[0].size]),
    ("the same head twice", |state| state.queues[0].in_flight = vec![1, 1]),
    ("more heads than the table has", |state| state.queues[0].in_flight = (0..=state.queues[0].size).collect()),
    ("heads of a queue that is not ready", |state| {
        state.queues[0].ready = false;
        state.queues[0].in_flight = vec![0];
    }),
    ("EVENT_IDX that was not negotiated", |state| state.queues[0].event_idx = true),
    ("features that are not offered", |state| state.driver_features |= 1 << 63),
    ("without VERSION_1", |state| state.driver_features &= !F_VERSION_1),
    ("status 0xff", |state| state.status = 0xff),
    ("status without FEATURES_OK", |state| state.status = 7),
    ("status of 32 bits", |state| state.status = 0x1_000f),
    ("DEVICE_NEEDS_RESET within the status", |state| state.status |= NEEDS_RESET),
];

pub fn snapshot_lies(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    let truth = machine.transport.save();
    for (what, lie) in LIES {
        let mut state = truth.clone();
        lie(&mut state);
        let (mut liar, result) =
            Machine::restored(subject.device(), machine.memory.clone(), &stored(&state), &machine.rings);
        assert!(result.is_err(), "{what}");
        // Refused as a whole: the device is as new.
        assert_eq!(liar.get(STATUS), 0, "{what}");
        liar.run();
        liar.start();
        subject.good(&mut liar);
    }
    machine.start();
    Alive
}

pub fn snapshot_with_indices_astray(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    // Nothing is impossible about any of these numbers, so they are found out in use.
    let truth = machine.transport.save();
    for (avail, used) in [(1, 0), (0x8000, 0), (0xffff, 0xffff)] {
        let mut state = truth.clone();
        (state.queues[subject.queue()].next_avail, state.queues[subject.queue()].next_used) = (avail, used);
        state.selectors = [u32::MAX; 4];
        state.config_generation = u32::MAX;
        state.interrupt_status = u32::MAX;
        let mut restored = restore(subject, machine, &state).unwrap();
        assert_eq!(restored.get(INTERRUPT_STATUS), 3);
        restored.run();
        for register in (0..CONFIG).step_by(4) {
            restored.get(register);
        }
        restored.start();
        subject.good(&mut restored);
    }
    machine.start();
    Alive
}

pub fn stale_event_index_after_restore(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    let queue = subject.queue();
    let features = machine.offered();
    machine.start_with(features);
    let (request, room) = subject.request();
    let (len, answer) = machine.exchange(queue, &request, room);
    subject.check(len.expect("served"), &answer);
    // The driver believes an old avail_event and makes a request available without a kick;
    // then the snapshot is taken.
    machine.put(WRITABLE, &vec![0xaa; room as usize]);
    machine.offer(queue, 0);
    let state = machine.transport.save();
    assert!(state.queues[queue].event_idx);
    let mut restored = restore(subject, machine, &state).unwrap();
    restored.used(queue);
    restored.put(restored.rings[queue].avail + 4 + 2 * u64::from(restored.rings[queue].size), &1u16.to_le_bytes());
    restored.run();
    let used = restored.used(queue);
    assert_eq!(used.len(), 1, "the request is found without a kick");
    subject.check(used[0].1, &restored.take(WRITABLE, room as usize));
    assert!(restored.interrupted(), "and its end is announced");
    machine.start();
    Alive
}

pub fn snapshot_of_failed_device(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    machine.put(machine.rings[subject.queue()].avail + 2, &u16::MAX.to_le_bytes());
    machine.kick(subject.queue());
    machine.run();
    let state = machine.transport.save();
    assert!(state.needs_reset);
    let mut restored = restore(subject, machine, &state).unwrap();
    assert!(restored.needs_reset());
    assert_eq!(restored.get(INTERRUPT_STATUS), 2);
    restored.run();
    restored.start();
    subject.good(&mut restored);
    NeedsReset
}

pub fn snapshot_in_the_middle_of_set_up(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    let features = machine.offered() & !F_EVENT_IDX;
    machine.negotiate(features);
    machine.set_up(subject.queue());
    let state = machine.transport.save();
    let mut restored = restore(subject, machine, &state).unwrap();
    for queue in (0..restored.rings.len()).filter(|queue| *queue != subject.queue()) {
        restored.set_up(queue);
    }
    restored.set(STATUS, RUNNING);
    subject.good(&mut restored);
    machine.start();
    Alive
}
