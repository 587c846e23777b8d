//! A device that goes on from a snapshot.

use std::sync::{Arc, Mutex};

use katavm_devices::net::{Net, NetState};

use crate::common::*;
use crate::driver::*;

const MANY: u16 = 48;
const ROOM: u32 = 1536;

/// The device as it was saved, on `wire` if there is one, in the same memory.
fn restored(driver: Driver, wire: Option<Wire>) -> Driver {
    let state = driver.net.lock().unwrap().save();
    let state: NetState = postcard::from_bytes(&postcard::to_stdvec(&state).unwrap()).unwrap();
    let mut net = Net::restore(&state).unwrap();
    if let Some(wire) = wire {
        net.attach(wire).unwrap();
    }
    let net = Arc::new(Mutex::new(net));
    let transport = driver.machine.transport.save();
    let (machine, result) = Machine::restored(net.clone(), driver.memory(), &transport, &driver.machine.rings);
    result.unwrap();
    Driver { machine, net }
}

#[test]
fn buffers_that_were_taken_ahead_are_not_lost() {
    let (mut driver, far) = Driver::attached();
    driver.offer_rooms(0..MANY, ROOM);
    far.send(&packet(60, 1)).unwrap();
    assert_eq!(driver.received(ROOM).len(), 1);
    let in_flight = driver.machine.transport.save().queues[RX].in_flight.clone();
    assert!(in_flight.len() > 40, "buffers for a long packet are with the device: {in_flight:?}");
    for seed in 2..6 {
        let (wire, far) = Wire::pair();
        driver = restored(driver, Some(wire));
        far.send(&packet(60, seed)).unwrap();
        // Room for the longest packet again, which the device waits for.
        let again = u16::from(seed) - 2;
        driver.offer_rooms(again..again + 1, ROOM);
        let head = u16::from(seed) - 1;
        assert_eq!(driver.received(ROOM), [(head, in_buffers(packet(60, seed), 1))]);
        assert_eq!(driver.machine.exchange(TX, &packet(60, seed), 0).0, Some(0));
        assert!(far.recv(&mut [0; 100]).is_ok());
    }
}

#[test]
fn the_driver_hears_of_a_link_that_did_not_come_along() {
    let (mut driver, _far) = Driver::attached();
    driver.machine.set(INTERRUPT_ACK, 3);
    let mut driver = restored(driver, None);
    assert_eq!((driver.link_status(), driver.machine.get(INTERRUPT_STATUS)), (0, 2));
    let (mut driver, far) = driver.attach();
    driver.machine.set(INTERRUPT_ACK, 3);
    let (wire, _other) = Wire::pair();
    let mut driver = restored(driver, Some(wire));
    assert_eq!((driver.link_status(), driver.machine.get(INTERRUPT_STATUS)), (1, 0), "it is as it was");
    drop(far);
}

#[test]
fn states_that_no_device_has_are_refused() {
    let state = Net::new(settings()).unwrap().save();
    assert!(Net::restore(&NetState { mac: [0xff; 6], ..state.clone() }).is_err());
    assert!(Net::restore(&NetState { mtu: Some(0), ..state.clone() }).is_err());
    let much = Net::restore(&NetState { offloads: u32::MAX, ..state.clone() }).unwrap();
    assert_eq!(much.save(), state);
}
