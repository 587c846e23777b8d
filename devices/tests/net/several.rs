//! Several pairs of queues, and the control queue.

use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};

use katavm_devices::net::{Asked, Net, NetConfig, NetError, NetState, Offloads};

use crate::common::*;
use crate::driver::*;

const PAIRS: u16 = 3;
/// By the number of pairs; with VIRTIO_NET_F_MQ.
const CONTROL: usize = 6;
const F_CTRL_VQ: u64 = 1 << 17;
const F_MQ: u64 = 1 << 22;
const ROOM: u32 = 1536;
const OK: u8 = 0;
const ERR: u8 = 1;

fn several() -> NetConfig {
    NetConfig { pairs: PAIRS, offloads: Offloads::CSUM, ..settings() }
}

/// What a wire's queue was switched to, one after the other.
type Switched = Arc<Mutex<Vec<bool>>>;

/// A device with so many wires, and what switched their queues.
fn with_wires(accepted: u64, count: usize) -> (Driver, Vec<UnixDatagram>, Vec<Switched>) {
    let driver = Driver::with(several(), accepted);
    let (wires, far): (Vec<_>, Vec<_>) = (0..count).map(|_| Wire::pair()).unzip();
    let switched = wires.iter().map(|wire| wire.switched.clone()).collect();
    driver.net.lock().unwrap().attach_queues(wires).unwrap();
    (driver, far, switched)
}

/// What the control queue answers.
fn command(driver: &mut Driver, queue: usize, bytes: &[u8]) -> u8 {
    let (len, answer) = driver.machine.exchange(queue, bytes, 1);
    assert_eq!(len, Some(1));
    answer[0]
}

fn use_pairs(driver: &mut Driver, count: u16) -> u8 {
    let [low, high] = count.to_le_bytes();
    command(driver, CONTROL, &[4, 0, low, high])
}

/// A packet by a pair's transmit queue, as it arrives.
fn send(driver: &mut Driver, pair: usize, seed: u8) {
    assert_eq!(driver.machine.exchange(2 * pair + TX, &packet(60, seed), 0).0, Some(0));
}

fn seed_of(far: &UnixDatagram) -> Option<u8> {
    let mut bytes = [0; 100];
    far.recv(&mut bytes).ok().map(|_| bytes[12])
}

/// Buffers for a pair's receive queue.
fn offer(driver: &mut Driver, pair: usize, heads: std::ops::Range<u16>) {
    let queue = 2 * pair;
    for head in heads {
        let address = WRITABLE + 0x4000 * pair as u64 + u64::from(head) * u64::from(ROOM);
        driver.machine.describe(driver.machine.rings[queue].desc, head, writable(address, ROOM));
        driver.machine.offer(queue, head);
    }
    driver.machine.kick(queue);
    driver.machine.run();
}

#[test]
fn the_number_of_pairs_is_told_and_bounded() {
    let mut driver = Driver::with(several(), u64::MAX);
    let mut bytes = [0; 2];
    driver.machine.transport.read(CONFIG + 8, &mut bytes);
    assert_eq!(u16::from_le_bytes(bytes), PAIRS);
    assert_eq!(driver.machine.offered() & (F_MQ | F_CTRL_VQ), F_MQ | F_CTRL_VQ);
    assert_eq!(driver.machine.rings.len(), CONTROL + 1);
    for pairs in [0, 9, u16::MAX] {
        let error = Net::new(NetConfig { pairs, ..several() }).err().unwrap();
        assert!(matches!(error, NetError::Pairs(bad) if bad == pairs), "{error}");
    }
}

#[test]
fn each_pair_has_its_backend_once_the_driver_uses_it() {
    let (mut driver, far, switched) = with_wires(!F_EVENT_IDX, 3);
    let last = |wire: usize| *switched[wire].lock().unwrap().last().unwrap();
    assert_eq!([last(0), last(1), last(2)], [true, false, false], "one, to begin with");
    (0..3).for_each(|pair| offer(&mut driver, pair, 0..2));
    far[1].send(&packet(60, 1)).unwrap();
    driver.machine.run();
    assert_eq!(driver.machine.used(2).len(), 0);
    assert_eq!(use_pairs(&mut driver, 3), OK);
    assert_eq!([last(0), last(1), last(2)], [true; 3]);
    assert_eq!(driver.machine.used(2), [(0, 72)], "what waited for the second");
    for (pair, far) in far.iter().enumerate() {
        send(&mut driver, pair, 10 + pair as u8);
        assert_eq!(seed_of(far), Some(10 + pair as u8));
        driver.machine.used(2 * pair);
        far.send(&packet(60, 20 + pair as u8)).unwrap();
        driver.machine.run();
        assert_eq!(driver.machine.used(2 * pair).len(), 1);
    }
    assert_eq!(use_pairs(&mut driver, 2), OK);
    assert_eq!([last(0), last(1), last(2)], [true, true, false]);
    for bad in [0, 4, u16::MAX] {
        assert_eq!(use_pairs(&mut driver, bad), ERR, "{bad}");
    }
    assert_eq!(driver.net.lock().unwrap().save().asked.unwrap().pairs, 2, "it is as it was");
    // A new driver begins with one again.
    driver.machine.set(STATUS, 0);
    assert_eq!([last(0), last(1), last(2)], [false; 3]);
    driver.machine.start();
    assert_eq!([last(0), last(1), last(2)], [true, false, false]);
}

#[test]
fn pairs_share_what_there_is_of_backends() {
    let (mut driver, far, _) = with_wires(!F_EVENT_IDX, 1);
    assert_eq!(use_pairs(&mut driver, 3), OK);
    (0..3).for_each(|pair| offer(&mut driver, pair, 0..2));
    for pair in 0..3 {
        send(&mut driver, pair, pair as u8);
        assert_eq!(seed_of(&far[0]), Some(pair as u8));
        far[0].send(&packet(60, 1)).unwrap();
    }
    driver.machine.run();
    assert_eq!([0, 2, 4].map(|queue| driver.machine.used(queue).len()), [2, 0, 0], "one of them reads");
    // More backends than pairs: the others get nothing to read.
    let (wires, _far): (Vec<_>, Vec<_>) = (0..5).map(|_| Wire::pair()).unzip();
    let switched: Vec<_> = wires.iter().map(|wire| wire.switched.clone()).collect();
    driver.net.lock().unwrap().attach_queues(wires).unwrap();
    let last = |wire: usize| *switched[wire].lock().unwrap().last().unwrap();
    assert_eq!([0, 1, 2, 3, 4].map(last), [true, true, true, false, false]);
    assert!(driver.net.lock().unwrap().attach_queues(Vec::<Wire>::new()).is_err());
    assert_eq!(driver.link_status(), 0);
}

#[test]
fn without_the_feature_the_control_queue_follows_the_first_pair() {
    let (mut driver, far, _) = with_wires(!(F_EVENT_IDX | F_MQ), 3);
    assert_eq!(command(&mut driver, 2, &[4, 0, 2, 0]), ERR, "there is nothing to choose");
    assert_eq!(command(&mut driver, 2, &[5, 0, 2, 0, 0, 0, 0, 0, 0, 0]), OK);
    send(&mut driver, 0, 5);
    assert_eq!(seed_of(&far[0]), Some(5));
    // The same after a restore.
    let state = driver.net.lock().unwrap().save();
    let transport = driver.machine.transport.save();
    let net = Arc::new(Mutex::new(Net::restore(&state).unwrap()));
    let (machine, result) = Machine::restored(net.clone(), driver.memory(), &transport, &driver.machine.rings);
    result.unwrap();
    let mut driver = Driver { machine, net };
    assert_eq!(command(&mut driver, 2, &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0]), OK);
}

#[test]
fn without_a_control_queue_there_is_one_pair() {
    let (mut driver, _far, _) = with_wires(!(F_EVENT_IDX | F_CTRL_VQ), 3);
    driver.machine.exchange(CONTROL, &[4, 0, 2, 0], 1);
    driver.machine.exchange(2, &[4, 0, 2, 0], 1);
    assert_eq!(driver.net.lock().unwrap().save().asked.unwrap().pairs, 1);
    assert!(!driver.machine.needs_reset());
}

#[test]
fn commands_that_no_driver_may_give_are_refused() {
    let (mut driver, ..) = with_wires(!F_EVENT_IDX, 3);
    // Promiscuous mode, a table of addresses, a VLAN, an announcement, and what nobody knows; too short and too long.
    let rows: [&[u8]; 10] = [
        &[0, 0, 1],
        &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        &[2, 0, 5, 0],
        &[3, 0],
        &[4, 1, 2, 0],
        &[99, 99],
        &[4],
        &[4, 0, 2],
        &[4, 0, 2, 0, 0],
        &[5, 0, 2, 0, 0, 0, 0, 0, 0],
    ];
    for row in rows {
        assert_eq!(command(&mut driver, CONTROL, row), ERR, "{row:?}");
    }
    // No room for the answer.
    assert_eq!(driver.machine.exchange(CONTROL, &[4, 0, 2, 0], 0).0, Some(0));
    assert!(!driver.machine.needs_reset());
    assert_eq!(use_pairs(&mut driver, 3), OK);
}

#[test]
fn the_driver_changes_what_it_takes() {
    let settings = NetConfig { offloads: Offloads::CSUM | Offloads::TSO4, ..several() };
    let (wire, far) = Wire::pair();
    let offloads = wire.offloads.clone();
    let mut driver = Driver::with(settings, !F_EVENT_IDX);
    driver.net.lock().unwrap().attach(wire).unwrap();
    let last = || *offloads.lock().unwrap().last().unwrap();
    let set = |driver: &mut Driver, bits: u64| command(driver, CONTROL, &[&[5, 0][..], &bits.to_le_bytes()].concat());
    assert_eq!(last(), Offloads::CSUM | Offloads::TSO4);
    assert_eq!(set(&mut driver, 1 << 1), OK);
    assert_eq!(last(), Offloads::CSUM);
    // Now buffers for one frame are enough, and a packet of the old terms is dropped.
    driver.offer_rooms(0..2, ROOM);
    let mut segment = packet(100, 1);
    segment[..2].copy_from_slice(&[1, 1]);
    far.send(&segment).unwrap();
    far.send(&packet(100, 2)).unwrap();
    assert_eq!(driver.received(ROOM), [(0, in_buffers(packet(100, 2), 1))]);
    // Not negotiated; no offload; nothing without the checksum.
    for bits in [1 << 8, 1 << 5, 1, u64::MAX] {
        assert_eq!(set(&mut driver, bits), ERR, "{bits:#x}");
    }
    assert_eq!(last(), Offloads::CSUM);
    assert_eq!(set(&mut driver, 1 << 7), OK);
    assert_eq!(last(), Offloads::empty());
    assert_eq!(set(&mut driver, 1 << 7 | 1 << 1), OK);
    assert_eq!(last(), Offloads::CSUM | Offloads::TSO4);
}

#[test]
fn what_was_asked_for_survives_a_restore() {
    let (mut driver, _far, _) = with_wires(!F_EVENT_IDX, 3);
    assert_eq!(use_pairs(&mut driver, 2), OK);
    assert_eq!(command(&mut driver, CONTROL, &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0]), OK);
    offer(&mut driver, 1, 0..2);
    let state = driver.net.lock().unwrap().save();
    assert_eq!(state.asked, Some(Asked { pairs: 2, to_guest: 0 }));
    let transport = driver.machine.transport.save();
    // A hostile state asks for more than there is.
    let spoilt = NetState { asked: Some(Asked { pairs: 77, to_guest: u32::MAX }), ..state.clone() };
    for (state, expected) in
        [(spoilt, Asked { pairs: 3, to_guest: 1 }), (state.clone(), Asked { pairs: 2, to_guest: 0 })]
    {
        let mut net = Net::restore(&state).unwrap();
        let (wires, far): (Vec<_>, Vec<_>) = (0..3).map(|_| Wire::pair()).unzip();
        net.attach_queues(wires).unwrap();
        let net = Arc::new(Mutex::new(net));
        let (mut machine, result) = Machine::restored(net.clone(), driver.memory(), &transport, &driver.machine.rings);
        result.unwrap();
        assert_eq!(net.lock().unwrap().save(), NetState { asked: Some(expected), ..state });
        far[1].send(&packet(60, 3)).unwrap();
        machine.run();
        assert_eq!(machine.used(2).first().map(|(_, len)| *len), Some(72));
        // For the next machine in this memory.
        machine.put(machine.rings[2].used + 2, &0u16.to_le_bytes());
    }
    assert!(Net::restore(&NetState { pairs: 0, ..state.clone() }).is_err());
    assert!(Net::restore(&NetState { pairs: 1000, ..state }).is_err());
}

#[test]
fn a_queue_that_fails_stops_the_others() {
    let (mut driver, far, _) = with_wires(!F_EVENT_IDX, 3);
    assert_eq!(use_pairs(&mut driver, 3), OK);
    // Outside the table.
    driver.machine.offer(5, 999);
    driver.machine.kick(5);
    driver.machine.run();
    assert!(driver.machine.needs_reset());
    for queue in [TX, 3, CONTROL] {
        assert_eq!(driver.machine.exchange(queue, &packet(60, 1), 0).0, None, "queue {queue}");
    }
    assert_eq!(far.iter().filter_map(seed_of).count(), 0);
    driver.machine.start();
    send(&mut driver, 0, 7);
    assert_eq!(seed_of(&far[0]), Some(7));
}

#[test]
fn a_link_that_is_held_down_loses_what_comes_and_goes() {
    let (mut driver, far, _) = with_wires(!F_EVENT_IDX, 3);
    offer(&mut driver, 0, 0..4);
    driver.machine.set(INTERRUPT_ACK, 3);
    driver.net.lock().unwrap().set_link(false);
    assert_eq!((driver.link_status(), driver.machine.get(INTERRUPT_STATUS)), (0, 2));
    far[0].send(&packet(60, 1)).unwrap();
    driver.machine.run();
    assert_eq!(driver.machine.used(0).len(), 0);
    send(&mut driver, 0, 2);
    assert_eq!(seed_of(&far[0]), None);
    driver.machine.set(INTERRUPT_ACK, 3);
    driver.net.lock().unwrap().set_link(false);
    assert_eq!(driver.machine.get(INTERRUPT_STATUS) & 2, 0, "nothing changed");
    driver.net.lock().unwrap().set_link(true);
    assert_eq!((driver.link_status(), driver.machine.get(INTERRUPT_STATUS)), (1, 2));
    driver.machine.run();
    assert_eq!(driver.machine.used(0).len(), 0, "what came meanwhile is lost");
    far[0].send(&packet(60, 3)).unwrap();
    driver.machine.run();
    assert_eq!(driver.machine.used(0).len(), 1);
    send(&mut driver, 0, 4);
    assert_eq!(seed_of(&far[0]), Some(4));
    // Held down it stays, whatever backends come.
    driver.net.lock().unwrap().set_link(false);
    let (mut driver, _far) = driver.attach();
    assert_eq!(driver.link_status(), 0);
    driver.net.lock().unwrap().set_link(true);
    assert_eq!(driver.link_status(), 1);
}
