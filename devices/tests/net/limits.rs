//! Limits of what goes through.

use std::time::{Duration, Instant};

use katavm_devices::net::{NetConfig, NetLimits};
use katavm_devices::rate::{Limits, Rate};

use crate::common::*;
use crate::driver::*;

const MANY: u16 = 200;
const ROOM: u32 = 1536;

/// Packets in a second, and at once.
fn packets(per_second: u64, burst: u64) -> Limits {
    Limits { operations: Some(Rate { per_second, burst }), bandwidth: None }
}

fn bytes(per_second: u64, burst: u64) -> Limits {
    Limits { bandwidth: Some(Rate { per_second, burst }), operations: None }
}

fn limited(receive: Limits, transmit: Limits) -> NetConfig {
    NetConfig { limits: NetLimits { receive, transmit }, ..settings() }
}

/// Lets the device work until `done`; how long that took.
fn until(driver: &mut Driver, mut done: impl FnMut(&mut Driver) -> bool) -> Duration {
    let start = Instant::now();
    loop {
        driver.machine.run();
        if done(driver) {
            return start.elapsed();
        }
        assert!(start.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn what_is_sent_too_fast_waits_in_the_queue() {
    let (mut driver, far) = Driver::with(limited(Limits::default(), packets(50, 3)), !F_EVENT_IDX).attach();
    for head in 0..10 {
        let address = READABLE + 1024 * u64::from(head);
        driver.machine.put(address, &packet(60, head as u8));
        driver.machine.describe(driver.machine.rings[TX].desc, head, readable(address, 72));
        driver.machine.offer(TX, head);
    }
    driver.machine.kick(TX);
    let mut given = 0;
    let took = until(&mut driver, |driver| {
        given += driver.machine.used(TX).len();
        given == 10
    });
    // Seven beyond the burst, but for what the bucket lends.
    assert!(took >= Duration::from_millis(6 * 20 - 1), "{took:?}");
    for seed in 0..10 {
        let mut came = [0; 100];
        assert_eq!(far.recv(&mut came).unwrap(), 72);
        assert_eq!(came[12], seed, "all of them, in order");
    }
}

#[test]
fn what_comes_too_fast_waits_in_the_backend() {
    let (mut driver, far) = Driver::with(limited(bytes(50_000, 1000), Limits::default()), !F_EVENT_IDX).attach();
    driver.offer_rooms(0..MANY, ROOM);
    (0..6).for_each(|seed| assert_eq!(far.send(&packet(1000, seed)).unwrap(), 1012));
    let mut came = Vec::new();
    let took = until(&mut driver, |driver| {
        came.extend(driver.received(ROOM).into_iter().map(|(_, bytes)| bytes[12]));
        came.len() == 6
    });
    assert_eq!(came, [0, 1, 2, 3, 4, 5]);
    assert!(took >= Duration::from_millis(3 * 20 - 1), "{took:?}");
    // Packets to the host do not pay for those to the guest.
    assert_eq!(driver.machine.exchange(TX, &packet(1400, 9), 0).0, Some(0));
}

#[test]
fn limits_change_while_packets_wait() {
    let (mut driver, far) = Driver::with(limited(packets(1, 1), packets(1, 1)), !F_EVENT_IDX).attach();
    driver.offer_rooms(0..MANY, ROOM);
    // As many as the socket has room for, which is ten or more.
    let sent = (0..20).filter(|seed| far.send(&packet(60, *seed)).is_ok()).count();
    assert!(sent >= 10);
    assert!(driver.received(ROOM).len() < 4);
    let saved = driver.net.lock().unwrap().save();
    assert_eq!(saved.limits.receive, packets(1, 1));
    driver.net.lock().unwrap().set_limits(NetLimits::default());
    let mut came = 0;
    let took = until(&mut driver, |driver| {
        came += driver.received(ROOM).len();
        came >= 10
    });
    assert!(took < Duration::from_secs(10), "{took:?}");
    assert_eq!(driver.net.lock().unwrap().save().limits, NetLimits::default());
}
