//! The balloon behind its transport.

mod common;

use std::sync::{Arc, Mutex};

use common::{CONFIG, HIGH_START, INTERRUPT_STATUS, Machine, WRITABLE, linked, writable};
use katavm_devices::balloon::{Balloon, BalloonState};
use katavm_devices::virtio::VirtioDevice as _;

const PAGE: usize = 4096;
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const REPORTING: usize = 2;
/// `VIRTIO_BALLOON_F_DEFLATE_ON_OOM` and `VIRTIO_BALLOON_F_PAGE_REPORTING`.
const FEATURES: u64 = 1 << 2 | 1 << 5;
const ACTUAL: u64 = CONFIG + 4;

fn machine() -> (Machine, Arc<Mutex<Balloon>>) {
    let balloon = Arc::new(Mutex::new(Balloon::new().unwrap()));
    let mut machine = Machine::new(balloon.clone());
    assert_eq!(machine.offered() & 0xff, FEATURES);
    machine.start();
    (machine, balloon)
}

/// Fills pages, each with its place in the row.
fn fill(machine: &Machine, start: u64, count: usize) {
    for index in 0..count {
        machine.put(start + (index * PAGE) as u64, &vec![index as u8 + 1; PAGE]);
    }
}

/// Which of some pages still have what was put there; the others must have nothing.
fn kept(machine: &Machine, start: u64, count: usize) -> Vec<usize> {
    let is_kept = |index: &usize| {
        let bytes = machine.take(start + (index * PAGE) as u64, PAGE);
        let byte = bytes[0];
        assert!(bytes.iter().all(|other| *other == byte) && (byte == 0 || byte == *index as u8 + 1), "{index}: {byte}");
        byte != 0
    };
    (0..count).filter(is_kept).collect()
}

fn numbers(pages: &[u32]) -> Vec<u8> {
    pages.iter().flat_map(|page| page.to_le_bytes()).collect()
}

#[test]
fn reported_pages_go_back_to_the_host() {
    let (mut machine, balloon) = machine();
    fill(&machine, WRITABLE, 8);
    let at = |index: u64| WRITABLE + index * PAGE as u64;
    machine.submit(REPORTING, &linked(&[writable(at(1), 2 * PAGE as u32), writable(at(5), PAGE as u32)]));
    assert_eq!(machine.used(REPORTING), [(0, 0)]);
    assert_eq!(kept(&machine, WRITABLE, 8), [0, 3, 4, 6, 7]);
    assert_eq!(balloon.lock().unwrap().given_back(), 3 * PAGE as u64);
}

#[test]
fn a_report_is_answered_before_the_vcpu_goes_on() {
    let (mut machine, balloon) = machine();
    let by_vcpu = [INFLATE, DEFLATE, REPORTING].map(|queue| balloon.lock().unwrap().served_by_vcpu(queue));
    assert_eq!(by_vcpu, [false, false, true]);
    fill(&machine, WRITABLE, 3);
    for _ in 0..3 {
        machine.describe_all(machine.rings[REPORTING].desc, &linked(&[writable(WRITABLE, PAGE as u32)]));
        machine.offer(REPORTING, 0);
        machine.kick(REPORTING);
        assert_eq!(machine.used(REPORTING), [(0, 0)]);
    }
    assert_eq!(kept(&machine, WRITABLE, 3), [1, 2]);
    assert_eq!(machine.turn(), 0, "the event loop has nothing to do with it");
}

#[test]
fn many_reports_at_once_are_shared_with_the_event_loop() {
    let (mut machine, _) = machine();
    fill(&machine, WRITABLE, 5);
    for page in 0..5 {
        let report = writable(WRITABLE + page * PAGE as u64, PAGE as u32);
        machine.describe_all(machine.rings[REPORTING].desc + 16 * page, &[report]);
        machine.offer(REPORTING, page as u16);
    }
    machine.kick(REPORTING);
    assert_eq!(kept(&machine, WRITABLE, 5), [2, 3, 4]);
    machine.run();
    assert!(kept(&machine, WRITABLE, 5).is_empty());
}

#[test]
fn pages_that_are_reported_in_part_stay() {
    let (mut machine, balloon) = machine();
    fill(&machine, WRITABLE, 3);
    machine.submit(REPORTING, &[writable(WRITABLE + 1, 2 * PAGE as u32)]);
    assert_eq!(kept(&machine, WRITABLE, 3), [0, 2]);
    machine.submit(REPORTING, &[writable(WRITABLE + 1, PAGE as u32 - 1)]);
    assert_eq!(kept(&machine, WRITABLE, 3), [0, 2]);
    assert_eq!(balloon.lock().unwrap().given_back(), PAGE as u64);
}

#[test]
fn nothing_is_reported_by_a_driver_that_has_not_asked_for_it() {
    let (mut machine, _) = machine();
    let features = machine.offered() & !FEATURES & !common::F_EVENT_IDX;
    machine.start_with(features);
    fill(&machine, WRITABLE, 1);
    machine.submit(REPORTING, &[writable(WRITABLE, PAGE as u32)]);
    assert_eq!(kept(&machine, WRITABLE, 1), [0]);
}

#[test]
fn pages_in_the_balloon_go_back_to_the_host() {
    let (mut machine, balloon) = machine();
    fill(&machine, WRITABLE, 8);
    let page = (WRITABLE / PAGE as u64) as u32;
    let (len, _) = machine.exchange(INFLATE, &numbers(&[page + 5, page + 1, page + 2]), 0);
    assert_eq!(len, Some(0));
    assert_eq!(kept(&machine, WRITABLE, 8), [0, 3, 4, 6, 7]);
    // They are there again when they are needed.
    assert_eq!(machine.exchange(DEFLATE, &numbers(&[page + 5, page + 1, page + 2]), 0).0, Some(0));
    fill(&machine, WRITABLE, 8);
    assert_eq!(kept(&machine, WRITABLE, 8).len(), 8);
    assert_eq!(balloon.lock().unwrap().given_back(), 3 * PAGE as u64);
}

#[test]
fn pages_of_nobody_are_passed_over() {
    let (mut machine, balloon) = machine();
    fill(&machine, HIGH_START, 2);
    let page = (HIGH_START / PAGE as u64) as u32;
    // One in the gap below, the last number there is, and half a number at the end.
    let mut request = numbers(&[page - 1, u32::MAX, page + 1]);
    request.extend([1, 2]);
    assert_eq!(machine.exchange(INFLATE, &request, 0).0, Some(0));
    assert!(!machine.needs_reset());
    assert_eq!(balloon.lock().unwrap().given_back(), PAGE as u64);
    assert_eq!(kept(&machine, HIGH_START, 2), [0]);
}

#[test]
fn the_driver_is_told_of_a_target_and_tells_what_it_holds() {
    let (mut machine, balloon) = machine();
    balloon.lock().unwrap().set_target(3);
    assert_eq!(machine.get(INTERRUPT_STATUS) & 2, 2);
    assert_eq!(machine.get(CONFIG), 3 * 256);
    machine.set(ACTUAL, 2 * 256);
    assert_eq!(balloon.lock().unwrap().held_mib(), 2);
    // The target is not the driver's.
    machine.set(CONFIG, 7);
    assert_eq!(machine.get(CONFIG), 3 * 256);
    assert_eq!(balloon.lock().unwrap().save(), BalloonState { num_pages: 3 * 256, actual: 2 * 256 });
}

#[test]
fn the_state_is_stored() {
    let state = BalloonState { num_pages: 7, actual: 5 };
    let stored: BalloonState = postcard::from_bytes(&postcard::to_stdvec(&state).unwrap()).unwrap();
    assert_eq!(Balloon::restore(&stored).unwrap().save(), state);
}
