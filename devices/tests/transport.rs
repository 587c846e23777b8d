//! The transport in front of a device that does nothing but take notes, for what no real device does yet.

mod common;

use std::sync::{Arc, Mutex};

use common::{CONFIG, F_VERSION_1, INTERRUPT_STATUS, Machine, NEEDS_RESET, RUNNING, STATUS};
use event_manager::{EventOps, Events, MutEventSubscriber};
use katavm_devices::virtio::queue::QueueSet;
use katavm_devices::virtio::{ActivateError, DeviceType, SharedMemory, VirtioDevice};

#[derive(Default)]
struct Notes {
    written: Vec<(usize, Vec<u8>)>,
    activated: Vec<u64>,
    resets: usize,
    broken: bool,
}

struct Device {
    queues: QueueSet,
    notes: Arc<Mutex<Notes>>,
}

impl VirtioDevice for Device {
    fn device_type(&self) -> DeviceType {
        DeviceType::Net
    }
    fn features(&self) -> u64 {
        1 << 5
    }
    fn queues(&self) -> &QueueSet {
        &self.queues
    }
    fn queues_mut(&mut self) -> &mut QueueSet {
        &mut self.queues
    }
    fn config(&self) -> &[u8] {
        b"0123456789"
    }
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.notes.lock().unwrap().written.push((offset, data.to_vec()));
    }
    fn shared_memory(&self, id: u8) -> Option<SharedMemory> {
        (id == 3).then_some(SharedMemory { address: 0x12_3456_7000, length: 0x1_0000_2000 })
    }
    fn activate(&mut self, features: u64) -> Result<(), ActivateError> {
        let mut notes = self.notes.lock().unwrap();
        notes.activated.push(features);
        if notes.broken { Err(std::io::Error::other("no host side").into()) } else { Ok(()) }
    }
    fn reset(&mut self) {
        self.notes.lock().unwrap().resets += 1;
    }
}

impl MutEventSubscriber for Device {
    fn init(&mut self, ops: &mut EventOps) {
        self.queues.register(ops);
    }
    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        self.queues.take_kick(events.data() as usize);
    }
}

fn machine() -> (Machine, Arc<Mutex<Notes>>) {
    let notes = Arc::new(Mutex::new(Notes::default()));
    let device = Device { queues: QueueSet::new(&[16, 64]).unwrap(), notes: Arc::clone(&notes) };
    (Machine::new(Arc::new(Mutex::new(device))), notes)
}

#[test]
fn the_configuration_is_written_within_its_bounds_and_by_a_driver_only() {
    let (mut machine, notes) = machine();
    machine.transport.write(CONFIG, b"a");
    machine.set(STATUS, 1);
    machine.transport.write(CONFIG, b"b");
    machine.set(STATUS, 3);
    machine.transport.write(CONFIG, b"cd");
    machine.transport.write(CONFIG + 9, b"e");
    for (offset, data) in [(9, &b"xx"[..]), (10, b"x"), (7, b"xxxx"), (0xeff, b"x"), (u64::MAX - CONFIG, b"xx")] {
        machine.transport.write(CONFIG.wrapping_add(offset), data);
    }
    assert_eq!(notes.lock().unwrap().written, [(0, b"cd".to_vec()), (9, b"e".to_vec())]);
}

#[test]
fn a_device_that_cannot_start_says_so_and_may_be_tried_again() {
    let (mut machine, notes) = machine();
    notes.lock().unwrap().broken = true;
    machine.start();
    assert_eq!(machine.get(STATUS), RUNNING | NEEDS_RESET);
    assert_eq!(machine.get(INTERRUPT_STATUS), 2);
    assert!(machine.interrupted());
    assert!(!machine.transport.device().lock().unwrap().queues().is_active());
    notes.lock().unwrap().broken = false;
    machine.start();
    assert_eq!(machine.get(STATUS), RUNNING);
    assert!(machine.transport.device().lock().unwrap().queues().is_active());
}

#[test]
fn a_device_learns_of_each_start_reset_and_failure_once() {
    let (mut machine, notes) = machine();
    machine.start();
    machine.set(STATUS, RUNNING);
    assert_eq!(notes.lock().unwrap().activated, [F_VERSION_1 | 1 << 28 | 1 << 5]);
    let resets = notes.lock().unwrap().resets;
    machine.set(STATUS, RUNNING | 0x80);
    machine.set(STATUS, RUNNING | 0x80);
    assert_eq!(notes.lock().unwrap().resets, resets + 1);
    assert!(!machine.transport.device().lock().unwrap().queues().is_active());
}

#[test]
fn shared_memory_is_described_in_halves() {
    let (mut machine, _) = machine();
    machine.set(0xac, 3);
    assert_eq!([0xb0, 0xb4, 0xb8, 0xbc].map(|at| machine.get(at)), [0x2000, 1, 0x3456_7000, 0x12]);
    machine.set(0xac, 0x103);
    assert_eq!(machine.get(0xb0), u32::MAX, "identifiers have 8 bits");
}

#[test]
fn a_change_of_the_configuration_is_announced_to_a_running_driver() {
    let (mut machine, _) = machine();
    let before = machine.get(0xfc);
    machine.transport.config_changed();
    assert_ne!(machine.get(0xfc), before);
    assert!(!machine.interrupted(), "nobody listens yet");
    machine.start();
    machine.transport.config_changed();
    assert!(machine.interrupted());
    assert_eq!(machine.get(INTERRUPT_STATUS), 2);
}

#[test]
fn a_snapshot_of_a_device_that_cannot_start_again_is_refused() {
    let (mut machine, _) = machine();
    machine.start();
    let state = machine.transport.save();
    let (mut other, notes) = self::machine();
    notes.lock().unwrap().broken = true;
    assert!(other.transport.restore(&state).is_err());
    assert!(!other.transport.device().lock().unwrap().queues().is_active());
    other.set(STATUS, 0);
    notes.lock().unwrap().broken = false;
    other.start();
    assert_eq!(other.get(STATUS), RUNNING);
}
