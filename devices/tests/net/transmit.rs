//! Guest to host.

use crate::common::*;
use crate::driver::*;

fn next(far: &std::os::unix::net::UnixDatagram) -> Option<Vec<u8>> {
    let mut bytes = vec![0; 1 << 17];
    let len = far.recv(&mut bytes).ok()?;
    bytes.truncate(len);
    Some(bytes)
}

#[test]
fn a_packet_arrives_as_it_was_sent() {
    let (mut driver, far) = Driver::attached();
    // A header that asks for a checksum at the host: it is the backend's to understand.
    let mut sent = packet(1000, 1);
    sent[..12].copy_from_slice(&[1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0]);
    let (len, _) = driver.machine.exchange(TX, &sent, 0);
    assert_eq!(len, Some(0), "nothing is written to what was sent");
    assert_eq!(next(&far), Some(sent));
    assert!(driver.machine.interrupted());
    assert_eq!(next(&far), None);
}

#[test]
fn framing_means_nothing() {
    let (mut driver, far) = Driver::attached();
    let sent = packet(100, 2);
    driver.machine.put(READABLE, &sent);
    let cuts = [0, 1, 7, 7, 30, 112];
    let pieces: Vec<Desc> = cuts.windows(2).map(|cut| readable(READABLE + cut[0], (cut[1] - cut[0]) as u32)).collect();
    driver.machine.submit(TX, &linked(&pieces));
    assert_eq!(next(&far), Some(sent.clone()));
    // In an indirect table, a byte each.
    let pieces: Vec<Desc> = (0..112).map(|at| readable(READABLE + at, 1)).collect();
    driver.machine.describe_all(TABLE, &linked(&pieces));
    driver.machine.submit(TX, &[Desc { addr: TABLE, len: 16 * 112, flags: INDIRECT, next: 0 }]);
    assert_eq!(next(&far), Some(sent));
}

#[test]
fn the_longest_packet_goes_out_and_a_longer_one_does_not() {
    let (mut driver, far) = Driver::attached();
    let longest = packet(18 + 65535, 3);
    assert_eq!(driver.machine.exchange(TX, &longest, 0).0, Some(0));
    assert_eq!(next(&far), Some(longest));
    assert_eq!(driver.machine.exchange(TX, &packet(18 + 65536, 4), 0).0, Some(0), "it is given back all the same");
    assert_eq!(next(&far), None);
}

#[test]
fn what_is_no_packet_is_dropped() {
    let (mut driver, far) = Driver::attached();
    for len in [1, 11, 12, 25] {
        assert_eq!(driver.machine.exchange(TX, &vec![1; len], 0).0, Some(0), "{len} bytes");
    }
    // Nothing but room to write, which is none of this queue's business.
    driver.machine.submit(TX, &[writable(WRITABLE, 2000)]);
    assert_eq!(driver.machine.used(TX), [(0, 0)]);
    assert_eq!(next(&far), None);
    driver.machine.exchange(TX, &packet(14, 5), 0);
    assert_eq!(next(&far), Some(packet(14, 5)), "an Ethernet header alone is one");
}

#[test]
fn without_a_link_packets_are_lost_and_given_back() {
    let mut driver = Driver::new();
    assert_eq!(driver.machine.exchange(TX, &packet(100, 6), 0).0, Some(0));
    let (mut driver, far) = driver.attach();
    driver.machine.run();
    assert_eq!(next(&far), None, "what was sent before is gone");
    assert_eq!(driver.machine.exchange(TX, &packet(100, 7), 0).0, Some(0));
    assert_eq!(next(&far), Some(packet(100, 7)));
}

/// Offers packets of one byte more each, heads 0 to `count`.
fn offer_many(driver: &mut Driver, count: u16) {
    for head in 0..count {
        let sent = packet(100 + usize::from(head), head as u8);
        let address = READABLE + 1024 * u64::from(head);
        driver.machine.put(address, &sent);
        driver.machine.describe(driver.machine.rings[TX].desc, head, readable(address, sent.len() as u32));
        driver.machine.offer(TX, head);
    }
}

#[test]
fn a_backend_that_is_full_loses_nothing() {
    let (mut driver, far) = Driver::attached();
    offer_many(&mut driver, 200);
    driver.machine.kick(TX);
    driver.machine.run();
    let mut given = driver.machine.used(TX).len();
    assert!((1..200).contains(&given), "a socket has no room for 200 packets, but for some: {given}");
    for head in 0..200u8 {
        // Room for one more: the device is told by an event.
        assert_eq!(next(&far), Some(packet(100 + usize::from(head), head)), "in order");
        driver.machine.run();
        given += driver.machine.used(TX).len();
    }
    assert_eq!((given, next(&far)), (200, None));
}

#[test]
fn a_link_that_goes_down_frees_what_waited_for_it() {
    let (mut driver, far) = Driver::attached();
    offer_many(&mut driver, 200);
    driver.machine.kick(TX);
    driver.machine.run();
    driver.net.lock().unwrap().detach();
    driver.machine.run();
    assert_eq!(driver.machine.used(TX).len(), 200);
    drop(far);
}

#[test]
fn a_turn_has_an_end() {
    let mut driver = Driver::new();
    offer_many(&mut driver, 200);
    driver.machine.kick(TX);
    driver.machine.turn();
    assert_eq!(driver.machine.used(TX).len(), 64);
    driver.machine.run();
    assert_eq!(driver.machine.used(TX).len(), 136);
}
