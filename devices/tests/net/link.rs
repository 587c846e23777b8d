//! A backend that comes and goes.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use katavm_devices::net::{Backend, Net, NetConfig, NetError, Offloads};

use crate::common::*;
use crate::driver::*;

const MANY: u16 = 100;
const ROOM: u32 = 1536;

#[test]
fn the_configuration_tells_address_and_mtu() {
    let mut driver = Driver::new();
    let mut bytes = [0; 12];
    driver.machine.transport.read(CONFIG, &mut bytes);
    assert_eq!(bytes, [2, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0, 0, 1, 0, 0xdc, 5]);
    let offered = driver.machine.offered();
    // MAC, STATUS, MRG_RXBUF, MTU, and the control queue with CTRL_GUEST_OFFLOADS; no multiple queues.
    assert_eq!(offered & 0xff_ffff, 1 << 17 | 1 << 16 | 1 << 15 | 1 << 5 | 1 << 3 | 1 << 2 | 0x7f83);
    assert_eq!(offered >> 50 & 0x3fff, 0x70);
    let without = Driver::with(NetConfig { mtu: None, offloads: Offloads::empty(), ..settings() }, !F_EVENT_IDX);
    let Driver { mut machine, .. } = without;
    assert_eq!(machine.offered() & 0xff_ffff, 1 << 17 | 1 << 16 | 1 << 15 | 1 << 5 | 1 << 2);
}

#[test]
fn impossible_settings_are_refused() {
    for mac in [[0; 6], [0xff; 6], [1, 0, 0x5e, 0, 0, 1]] {
        let error = Net::new(NetConfig { mac, ..settings() }).err().unwrap();
        assert!(matches!(error, NetError::Mac(bad) if bad == mac), "{error}");
    }
    assert!(matches!(Net::new(NetConfig { mtu: Some(67), ..settings() }), Err(NetError::Mtu(67))));
}

#[test]
fn the_driver_is_told_when_the_link_changes() {
    let mut driver = Driver::new();
    assert_eq!((driver.link_status(), driver.machine.get(INTERRUPT_STATUS)), (0, 0));
    let (mut driver, _far) = driver.attach();
    assert!(driver.machine.interrupted());
    assert_eq!((driver.link_status(), driver.machine.get(INTERRUPT_STATUS)), (1, 2));
    driver.machine.set(INTERRUPT_ACK, 2);
    driver.net.lock().unwrap().detach();
    assert!(driver.machine.interrupted());
    assert_eq!((driver.link_status(), driver.machine.get(INTERRUPT_STATUS)), (0, 2));
    driver.machine.set(INTERRUPT_ACK, 2);
    driver.net.lock().unwrap().detach();
    assert!(!driver.machine.interrupted(), "nothing changed");
}

#[test]
fn a_link_may_be_there_before_the_driver() {
    let net = Net::new(settings()).unwrap();
    let net = std::sync::Arc::new(std::sync::Mutex::new(net));
    let mut driver = Driver { machine: Machine::new(net.clone()), net };
    let (wire, far) = Wire::pair();
    driver.net.lock().unwrap().attach(wire).unwrap();
    far.send(&packet(60, 1)).unwrap();
    driver.machine.run();
    assert!(!driver.machine.interrupted(), "there is nobody to interrupt");
    driver.machine.start();
    driver.offer_rooms(0..MANY, ROOM);
    assert_eq!(driver.received(ROOM), [(0, in_buffers(packet(60, 1), 1))]);
}

#[test]
fn one_backend_follows_another() {
    let (driver, first) = Driver::attached();
    let (mut driver, second) = driver.attach();
    driver.offer_rooms(0..MANY, ROOM);
    assert!(first.send(&packet(60, 1)).is_err(), "the first was closed");
    second.send(&packet(60, 2)).unwrap();
    assert_eq!(driver.received(ROOM), [(0, in_buffers(packet(60, 2), 1))]);
    for seed in 3..20 {
        driver.net.lock().unwrap().detach();
        let (wire, far) = Wire::pair();
        driver.net.lock().unwrap().attach(wire).unwrap();
        far.send(&packet(60, seed)).unwrap();
        assert_eq!(driver.received(ROOM)[0].1, in_buffers(packet(60, seed), 1));
        assert_eq!(driver.machine.exchange(TX, &packet(60, seed), 0).0, Some(0));
        let mut bytes = [0; 100];
        assert_eq!(far.recv(&mut bytes).unwrap(), 72);
    }
}

#[test]
fn the_backend_finishes_what_the_driver_does_not_take() {
    let (wire, _far) = Wire::pair();
    let offloads = wire.offloads.clone();
    let mut driver = Driver::with(settings(), !F_EVENT_IDX);
    driver.net.lock().unwrap().attach(wire).unwrap();
    let last = || *offloads.lock().unwrap().last().unwrap();
    assert_eq!(last(), Offloads::all());
    driver.machine.set(STATUS, 0);
    assert_eq!(last(), Offloads::empty(), "nobody is there who could");
    // GUEST_TSO4 without GUEST_CSUM is nothing.
    let features = driver.machine.offered() & !(1 << 1) & !F_EVENT_IDX;
    driver.machine.start_with(features);
    assert_eq!(last(), Offloads::empty());
    let features = driver.machine.offered() & (F_VERSION_1 | 1 << 1 | 1 << 7);
    driver.machine.start_with(features);
    assert_eq!(last(), Offloads::CSUM | Offloads::TSO4);
}

/// A socket whose other end can be closed, which a pair of datagram sockets does not tell.
struct Cable(OwnedFd);

impl AsFd for Cable {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Backend for Cable {
    fn set_offloads(&self, _: Offloads) -> std::io::Result<()> {
        Err(std::io::ErrorKind::Unsupported.into())
    }
}

#[test]
fn a_backend_that_is_gone_takes_the_link_down() {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    let mut driver = Driver::new();
    driver.offer_rooms(0..MANY, ROOM);
    let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::NONBLOCK, None).unwrap();
    driver.net.lock().unwrap().attach(Cable(pair.0)).unwrap();
    rustix::io::write(&pair.1, &packet(60, 1)).unwrap();
    assert_eq!(driver.received(ROOM).len(), 1, "offloads that cannot be set are no reason to fail");
    assert_eq!(driver.link_status(), 1);
    drop(pair.1);
    driver.machine.run();
    assert_eq!(driver.link_status(), 0);
    assert!(!driver.net.lock().unwrap().is_up());
    let (mut driver, far) = driver.attach();
    far.send(&packet(60, 2)).unwrap();
    assert_eq!(driver.received(ROOM).len(), 1, "and another one takes it up again");
}
