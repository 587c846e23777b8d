//! The entropy device behind its transport.

mod common;

use std::sync::{Arc, Mutex};

use common::{Machine, WRITABLE, linked, readable, writable};
use katavm_devices::rng::{Rng, RngState};

fn machine() -> Machine {
    let mut machine = Machine::new(Arc::new(Mutex::new(Rng::new().unwrap())));
    machine.start();
    machine
}

#[test]
fn each_request_gets_other_bytes() {
    let mut machine = machine();
    let mut seen = Vec::new();
    for _ in 0..10 {
        let (len, bytes) = machine.exchange(0, &[], 32);
        assert_eq!(len, Some(32));
        assert!(!seen.contains(&bytes));
        seen.push(bytes);
    }
}

#[test]
fn a_request_gets_at_most_64_kib_and_nothing_beyond_is_touched() {
    let mut machine = machine();
    let (len, bytes) = machine.exchange(0, &[], 1 << 20);
    assert_eq!(len, Some(64 << 10));
    assert!(bytes[64 << 10..].iter().all(|byte| *byte == 0xaa));
    // The last bytes of what was promised are random as well.
    assert!(bytes[(64 << 10) - 32..64 << 10].iter().any(|byte| *byte != 0xaa));
}

#[test]
fn several_buffers_are_filled_in_order() {
    let mut machine = machine();
    machine.put(WRITABLE, &[0xaa; 300]);
    machine.submit(0, &linked(&[writable(WRITABLE, 40), writable(WRITABLE + 100, 0), writable(WRITABLE + 200, 40)]));
    assert_eq!(machine.used(0), [(0, 80)]);
    let bytes = machine.take(WRITABLE, 300);
    assert!(bytes[..40].iter().any(|byte| *byte != 0xaa) && bytes[200..240].iter().any(|byte| *byte != 0xaa));
    assert!(bytes[40..200].iter().chain(&bytes[240..]).all(|byte| *byte == 0xaa));
}

#[test]
fn readable_buffers_are_left_alone() {
    let mut machine = machine();
    machine.put(WRITABLE, &[0xaa; 64]);
    machine.submit(0, &[readable(WRITABLE, 64)]);
    assert_eq!(machine.used(0), [(0, 0)]);
    assert_eq!(machine.take(WRITABLE, 64), [0xaa; 64]);
}

#[test]
fn one_turn_serves_a_bounded_number_of_requests() {
    let mut machine = machine();
    machine.describe_all(machine.rings[0].desc, &[writable(WRITABLE, 8); 64]);
    (0..64).for_each(|head| machine.offer(0, head));
    machine.kick(0);
    let mut turns = Vec::new();
    while machine.turn() > 0 {
        turns.push(machine.used(0).len());
    }
    assert_eq!(turns.iter().sum::<usize>(), 64);
    assert!(turns.iter().all(|served| *served <= 16), "{turns:?}");
}

#[test]
fn the_state_is_stored() {
    let state = Rng::new().unwrap().save();
    let stored: RngState = postcard::from_bytes(&postcard::to_stdvec(&state).unwrap()).unwrap();
    assert_eq!(stored, state);
    assert!(Rng::restore(&stored).is_ok());
}
