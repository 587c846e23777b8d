//! Frames over a stream socket.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use katavm_devices::net::{NetConfig, Offloads, Stream};

use crate::common::*;
use crate::driver::*;

const MANY: u16 = 48;
const ROOM: u32 = 1536;

/// A device on one end of a stream, the other end not blocking.
fn on_stream() -> (Driver, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let driver = Driver::with(NetConfig { offloads: Offloads::empty(), mtu: Some(65520), ..settings() }, !F_EVENT_IDX);
    driver.net.lock().unwrap().attach(Stream::new(ours).unwrap()).unwrap();
    (driver, theirs)
}

/// As it goes over the stream.
fn framed(packet: &[u8]) -> Vec<u8> {
    let frame = &packet[12..];
    [&(frame.len() as u32).to_be_bytes()[..], frame].concat()
}

fn arrived(far: &mut UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    let mut bytes = [0; 1 << 16];
    while let Ok(len @ 1..) = far.read(&mut bytes) {
        all.extend_from_slice(&bytes[..len]);
    }
    all
}

#[test]
fn frames_pass_both_ways_with_their_lengths() {
    let (mut driver, mut far) = on_stream();
    driver.offer_rooms(0..MANY, ROOM);
    assert_eq!(driver.machine.exchange(TX, &packet(60, 1), 0).0, Some(0));
    assert_eq!(arrived(&mut far), framed(&packet(60, 1)));
    far.write_all(&[framed(&packet(60, 2)), framed(&packet(3000, 3))].concat()).unwrap();
    let all = driver.received(ROOM);
    assert_eq!(all[0], (0, in_buffers(packet(60, 2), 1)));
    let joined: Vec<u8> = all.into_iter().skip(1).flat_map(|(_, bytes)| bytes).collect();
    assert_eq!(joined, in_buffers(packet(3000, 3), 2));
}

#[test]
fn a_frame_may_come_in_pieces() {
    let (mut driver, mut far) = on_stream();
    driver.offer_rooms(0..MANY, ROOM);
    let bytes = [framed(&packet(100, 1)), framed(&packet(14, 2)), framed(&packet(1000, 3))].concat();
    let mut came = Vec::new();
    for piece in bytes.chunks(7) {
        far.write_all(piece).unwrap();
        came.extend(driver.received(ROOM).into_iter().map(|(_, bytes)| bytes));
    }
    let expected = [packet(100, 1), packet(14, 2), packet(1000, 3)].map(|packet| in_buffers(packet, 1));
    assert_eq!(came, expected);
}

#[test]
fn many_long_frames_come_whole_and_in_order() {
    let (mut driver, mut far) = on_stream();
    driver.offer_rooms(0..256, 4096);
    let (mut next, mut came) = (0, 0);
    let (mut out, mut head) = (Vec::new(), 0u16);
    while came < 40 {
        while next < 40 && out.len() < 1 << 18 {
            out.extend(framed(&packet(65_000 + next, next as u8)));
            next += 1;
        }
        while let Ok(len @ 1..) = far.write(&out) {
            out.drain(..len);
        }
        let mut joined = Vec::new();
        for (buffer, bytes) in driver.received(4096) {
            assert_eq!(buffer, head % 256, "in order");
            head += 1;
            if joined.is_empty() {
                joined = bytes;
            } else {
                joined.extend(bytes);
            }
            if joined.len() == 12 + 65_000 + came {
                assert_eq!(joined[12..], packet(65_000 + came, came as u8)[12..]);
                came += 1;
                joined.clear();
            }
            driver.offer_rooms(buffer..buffer + 1, 4096);
        }
        assert!(joined.is_empty(), "a packet is given whole");
    }
}

#[test]
fn what_does_not_fit_at_once_is_sent_later_and_whole() {
    let (mut driver, mut far) = on_stream();
    let address = |head: u16| READABLE + 0x1_1000 * u64::from(head);
    let mut expected = Vec::new();
    for head in 0..30 {
        let sent = packet(60_000 + usize::from(head), head as u8);
        expected.extend(framed(&sent));
        driver.machine.put(address(head), &sent);
        driver.machine.describe(driver.machine.rings[TX].desc, head, readable(address(head), sent.len() as u32));
        driver.machine.offer(TX, head);
    }
    driver.machine.kick(TX);
    driver.machine.run();
    assert!(driver.machine.used(TX).len() < 30, "the socket has room for fewer");
    let mut came = Vec::new();
    while came.len() < expected.len() {
        let more = arrived(&mut far);
        assert!(!more.is_empty() || came.len() == expected.len(), "{} of {}", came.len(), expected.len());
        came.extend(more);
        driver.machine.run();
    }
    assert!(came == expected);
}

#[test]
fn what_nobody_could_finish_is_dropped() {
    let (mut driver, mut far) = on_stream();
    let mut unfinished = packet(60, 1);
    unfinished[0] = 1;
    let mut segment = packet(60, 2);
    segment[1] = 1;
    for bad in [unfinished, segment, packet(65_536, 3)] {
        assert_eq!(driver.machine.exchange(TX, &bad, 0).0, Some(0));
    }
    assert_eq!(driver.machine.exchange(TX, &packet(65_535, 4), 0).0, Some(0));
    driver.machine.run();
    assert!(arrived(&mut far) == framed(&packet(65_535, 4)));
}

#[test]
fn an_end_that_closes_or_talks_nonsense_takes_the_link_down() {
    for nonsense in [vec![], 13u32.to_be_bytes().to_vec(), 65_536u32.to_be_bytes().to_vec(), vec![0xff; 100]] {
        let (mut driver, mut far) = on_stream();
        driver.offer_rooms(0..MANY, ROOM);
        assert_eq!(driver.link_status(), 1);
        far.write_all(&nonsense).unwrap();
        if nonsense.is_empty() {
            drop(far);
        }
        driver.machine.run();
        assert_eq!(driver.link_status(), 0);
        assert_eq!(driver.machine.exchange(TX, &packet(60, 1), 0).0, Some(0), "the guest goes on");
    }
}
