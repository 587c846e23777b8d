//! Host to guest.

use crate::common::*;
use crate::driver::*;
use katavm_devices::net::{NetConfig, Offloads};

/// Enough for the longest packet.
const MANY: u16 = 48;
const ROOM: u32 = 1536;

#[test]
fn a_packet_arrives_in_one_buffer() {
    let (mut driver, far) = Driver::attached();
    driver.offer_rooms(0..MANY, ROOM);
    far.send(&packet(1000, 1)).unwrap();
    assert_eq!(driver.received(ROOM), [(0, in_buffers(packet(1000, 1), 1))]);
    assert!(driver.machine.interrupted());
    // The buffers that the device has taken besides are used for what comes next.
    far.send(&packet(14, 2)).unwrap();
    far.send(&packet(1524, 3)).unwrap();
    let all = driver.received(ROOM);
    assert_eq!(all, [(1, in_buffers(packet(14, 2), 1)), (2, in_buffers(packet(1524, 3), 1))]);
    // What no packet was in is as it was.
    assert_eq!(driver.machine.take((32 << 20) + 3 * u64::from(ROOM), ROOM as usize), [0xaa; ROOM as usize]);
}

#[test]
fn a_long_packet_is_spread_over_buffers() {
    let (mut driver, far) = Driver::attached();
    driver.offer_rooms(0..MANY, ROOM);
    for (len, buffers) in [(1525, 2), (2 * 1536 - 12, 2), (20_000, 14)] {
        let sent = packet(len, 4);
        far.send(&sent).unwrap();
        let all = driver.received(ROOM);
        assert_eq!(all.len(), usize::from(buffers), "{len} bytes");
        let joined: Vec<u8> = all.into_iter().flat_map(|(_, bytes)| bytes).collect();
        assert_eq!(joined, in_buffers(sent, buffers));
    }
}

#[test]
fn the_longest_packet_arrives() {
    let (mut driver, far) = Driver::attached();
    driver.offer_rooms(0..MANY, ROOM);
    let mut sent = packet(65_549, 5);
    // A TCP segment that is still to be cut, over IPv4, with congestion notification.
    sent[..10].copy_from_slice(&[1, 0x81, 54, 0, 180, 5, 34, 0, 16, 0]);
    far.send(&sent).unwrap();
    let joined: Vec<u8> = driver.received(ROOM).into_iter().flat_map(|(_, bytes)| bytes).collect();
    assert_eq!(joined, in_buffers(sent, 43));
}

#[test]
fn a_packet_waits_for_buffers() {
    let (mut driver, far) = Driver::attached();
    far.send(&packet(100, 6)).unwrap();
    assert_eq!(driver.received(ROOM), []);
    driver.offer_rooms(0..MANY - 6, ROOM);
    assert_eq!(driver.received(ROOM), [], "the packet might be longer than these");
    driver.offer_rooms(MANY - 6..MANY, ROOM);
    assert_eq!(driver.received(ROOM), [(0, in_buffers(packet(100, 6), 1))]);
}

#[test]
fn without_segmentation_buffers_for_a_frame_are_enough() {
    let offloads = Offloads::CSUM;
    let (mut driver, far) = Driver::with(NetConfig { offloads, ..settings() }, !F_EVENT_IDX).attach();
    driver.offer_rooms(0..2, ROOM);
    far.send(&packet(1518, 7)).unwrap();
    assert_eq!(driver.received(ROOM), [(0, in_buffers(packet(1518, 7), 1))]);
}

#[test]
fn without_mergeable_buffers_each_packet_has_its_own() {
    let (mut driver, far) = Driver::with(settings(), !(F_EVENT_IDX | F_MRG_RXBUF)).attach();
    driver.offer_rooms(0..3, ROOM);
    far.send(&packet(500, 8)).unwrap();
    // One byte too long, and one that fits exactly.
    far.send(&packet(1525, 1)).unwrap();
    far.send(&packet(1524, 9)).unwrap();
    let all = driver.received(ROOM);
    assert_eq!(all, [(0, in_buffers(packet(500, 8), 1)), (1, in_buffers(packet(1524, 9), 1))]);
}

#[test]
fn useless_buffers_come_back_empty() {
    let (mut driver, far) = Driver::attached();
    // Not a byte beyond a header; nothing at all; nothing that the device may write.
    let table = driver.machine.rings[RX].desc;
    for (head, desc) in [(100, writable(WRITABLE, 12)), (101, writable(WRITABLE, 0)), (102, readable(READABLE, 2000))] {
        driver.machine.describe(table, head, desc);
        driver.machine.offer(RX, head);
    }
    driver.offer_rooms(0..MANY, ROOM);
    far.send(&packet(60, 10)).unwrap();
    driver.machine.run();
    assert_eq!(driver.machine.used(RX), [(100, 0), (101, 0), (102, 0), (0, 72)]);
}

#[test]
fn useless_buffers_are_taken_in_turns_as_well() {
    let (mut driver, far) = Driver::attached();
    driver.machine.run();
    far.send(&packet(60, 12)).unwrap();
    let table = driver.machine.rings[RX].desc;
    for head in 0..256 {
        driver.machine.describe(table, head, writable(WRITABLE, 12));
        driver.machine.offer(RX, head);
    }
    driver.machine.turn();
    assert_eq!(driver.machine.used(RX).len(), 64);
    driver.machine.run();
    assert_eq!(driver.machine.used(RX).len(), 192);
    driver.offer_rooms(0..MANY, ROOM);
    assert_eq!(driver.received(ROOM), [(0, in_buffers(packet(60, 12), 1))]);
}

#[test]
fn work_that_the_driver_did_not_agree_to_is_not_left_to_it() {
    let offloads = Offloads::CSUM | Offloads::TSO4;
    let (mut driver, far) = Driver::with(NetConfig { offloads, ..settings() }, !F_EVENT_IDX).attach();
    driver.offer_rooms(0..MANY, ROOM);
    for (gso, arrives) in [(0, true), (1, true), (0x81, false), (3, false), (4, false), (5, false), (9, false)] {
        let mut sent = packet(100, gso);
        sent[1] = gso;
        far.send(&sent).unwrap();
        let all = driver.received(ROOM);
        assert_eq!(all.len(), usize::from(arrives), "type {gso:#x}");
    }
    // The buffers of what was dropped are used for what follows.
    far.send(&packet(77, 1)).unwrap();
    assert_eq!(driver.received(ROOM), [(2, in_buffers(packet(77, 1), 1))]);
}

#[test]
fn flags_that_were_not_negotiated_are_cleared() {
    let offloads = Offloads::empty();
    let (mut driver, far) = Driver::with(NetConfig { offloads, ..settings() }, !F_EVENT_IDX).attach();
    driver.offer_rooms(0..4, ROOM);
    let mut sent = packet(100, 1);
    sent[0] = 2;
    far.send(&sent).unwrap();
    assert_eq!(driver.received(ROOM), [(0, in_buffers(packet(100, 1), 1))]);
}

#[test]
fn what_is_no_packet_is_dropped() {
    let (mut driver, far) = Driver::attached();
    driver.offer_rooms(0..MANY, ROOM);
    far.send(&[1; 5]).unwrap();
    far.send(&packet(60, 11)).unwrap();
    assert_eq!(driver.received(ROOM), [(0, in_buffers(packet(60, 11), 1))]);
}

#[test]
fn a_flood_is_taken_in_turns() {
    let (mut driver, far) = Driver::attached();
    let mut sent = 0;
    driver.offer_rooms(0..256, ROOM);
    let mut came = Vec::new();
    while came.len() < 150 {
        // As many as the socket has room for.
        while sent < 150 && far.send(&packet(60, sent)).is_ok() {
            sent += 1;
        }
        came.extend(driver.received(ROOM));
    }
    let expected: Vec<_> = (0..150).map(|seed| (u16::from(seed), in_buffers(packet(60, seed), 1))).collect();
    assert_eq!(came, expected);
}

#[test]
fn a_driver_that_asks_for_one_interrupt_per_batch_gets_it() {
    let (mut driver, far) = Driver::with(settings(), u64::MAX).attach();
    driver.offer_rooms(0..MANY + 16, ROOM);
    // used_event stands behind the ring of the driver area.
    let used_event = driver.machine.rings[RX].avail + 4 + 2 * 256;
    assert!(driver.machine.interrupted(), "the link came up");
    driver.machine.put(used_event, &4u16.to_le_bytes());
    let mut interrupts = Vec::new();
    for seed in 0..8 {
        far.send(&packet(60, seed)).unwrap();
        assert_eq!(driver.received(ROOM).len(), 1);
        interrupts.push(driver.machine.interrupted());
    }
    assert_eq!(interrupts, [false, false, false, false, true, false, false, false]);
    // A packet of several buffers passes the awaited one.
    driver.machine.put(used_event, &10u16.to_le_bytes());
    far.send(&packet(10_000, 9)).unwrap();
    assert_eq!(driver.received(ROOM).len(), 7);
    assert!(driver.machine.interrupted());
}
