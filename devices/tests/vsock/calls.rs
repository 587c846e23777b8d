//! Connecting: both ways, refused, too late, too early.

use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use katavm_devices::vsock::Vsock;

use crate::common::CONFIG;
use crate::driver::*;

fn kind<T>(result: std::io::Result<T>) -> ErrorKind {
    result.err().expect("an error").kind()
}

fn is_readable(fd: &impl AsRawFd) -> bool {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid pollfd.
    unsafe { libc::poll(&raw mut poll, 1, 0) == 1 }
}

#[test]
fn the_configuration_is_the_cid_and_streams_are_offered() {
    let mut guest = Guest::down();
    let mut bytes = [0; 8];
    guest.machine.transport.read(CONFIG, &mut bytes[..4]);
    guest.machine.transport.read(CONFIG + 4, &mut bytes[4..]);
    assert_eq!(u64::from_le_bytes(bytes), CID);
    assert_eq!(guest.machine.offered() & 0xff_ffff, 1, "STREAM, and no SEQPACKET");
}

#[test]
fn reserved_context_identifiers_are_refused() {
    for cid in [0, 1, 2, u64::from(u32::MAX), 1 << 32, u64::MAX] {
        assert_eq!(kind(Vsock::new(cid)), ErrorKind::InvalidInput, "{cid}");
    }
}

#[test]
fn the_host_connects() {
    let mut guest = Guest::new();
    let call = guest.dial(1024, SOON);
    let request = guest.next();
    assert_eq!(
        request,
        Packet {
            src_cid: 2,
            dst_cid: CID,
            src_port: 0xc000_0000,
            dst_port: 1024,
            buf_alloc: DEVICE_CREDIT,
            ..Packet::new(0, 0, REQUEST)
        }
    );
    guest.send(&Packet::new(1024, request.src_port, RESPONSE));
    let _first = call.join().unwrap().unwrap();
    let (socket, _stream) = guest.accept(1024, 1 << 16);
    assert_eq!(socket.host_port, 0xc000_0001, "each connection has its own port");
}

#[test]
fn the_guest_refuses() {
    let mut guest = Guest::new();
    let call = guest.dial(1024, SOON);
    let request = guest.next();
    guest.send(&Packet::new(1024, request.src_port, RST));
    assert_eq!(kind(call.join().unwrap()), ErrorKind::ConnectionRefused);
    assert!(guest.packets().is_empty(), "a reset is not answered");
}

#[test]
fn a_call_that_is_not_answered_times_out_and_is_reset() {
    let mut guest = Guest::new();
    let call = guest.dial(1024, Duration::from_millis(30));
    let request = guest.next();
    assert_eq!(kind(call.join().unwrap()), ErrorKind::TimedOut);
    assert_eq!(guest.next().op, RST);
    guest.send(&Packet::new(1024, request.src_port, RESPONSE));
    assert_eq!(guest.operations(), [RST], "an answer that comes too late belongs to nothing");
}

#[test]
fn a_call_waits_for_a_driver_that_comes_late() {
    let mut guest = Guest::down();
    let call = guest.dial(7, SOON);
    std::thread::sleep(Duration::from_millis(20));
    guest.run();
    guest.start();
    guest.post(8);
    let request = guest.next();
    guest.send(&Packet::new(7, request.src_port, RESPONSE));
    assert!(call.join().unwrap().is_ok());
}

#[test]
fn a_call_without_a_driver_times_out_and_leaves_nothing() {
    let mut guest = Guest::down();
    assert_eq!(kind(guest.host.connect(7, Duration::from_millis(10))), ErrorKind::TimedOut);
    guest.start();
    guest.post(8);
    assert!(guest.packets().is_empty());
}

#[test]
fn a_call_in_flight_ends_with_the_guest() {
    let mut guest = Guest::new();
    let call = guest.dial(1024, SOON);
    assert_eq!(guest.next().op, REQUEST);
    guest.machine.set(crate::common::STATUS, 0);
    assert_eq!(kind(call.join().unwrap()), ErrorKind::ConnectionReset);
}

#[test]
fn callers_and_listeners_see_that_the_vm_is_gone() {
    let mut guest = Guest::new();
    let listener = guest.host.listen(9).unwrap();
    let call = guest.dial(1024, SOON);
    assert_eq!(guest.next().op, REQUEST);
    let accepting = std::thread::spawn(move || listener.accept(None).map(drop));
    let host = guest.host.clone();
    drop(guest);
    assert_eq!(kind(call.join().unwrap()), ErrorKind::BrokenPipe);
    assert_eq!(kind(accepting.join().unwrap()), ErrorKind::BrokenPipe);
    assert_eq!(kind(host.connect(1, SOON)), ErrorKind::BrokenPipe);
    assert_eq!(kind(host.listen(9).map(drop)), ErrorKind::BrokenPipe);
}

#[test]
fn the_guest_connects_to_an_open_port() {
    let mut guest = Guest::new();
    let listener = guest.host.listen(1023).unwrap();
    assert_eq!(listener.port(), 1023);
    assert!(!is_readable(&listener));
    assert_eq!(kind(listener.accept(Some(Duration::from_millis(5)))), ErrorKind::TimedOut);
    guest.send(&Packet::new(50, 1023, REQUEST));
    assert!(is_readable(&listener));
    let response = guest.next();
    assert_eq!(
        response,
        Packet { src_cid: 2, dst_cid: CID, buf_alloc: DEVICE_CREDIT, ..Packet::new(1023, 50, RESPONSE) }
    );
    assert!(listener.accept(None).is_ok());
    assert!(!is_readable(&listener));
}

#[test]
fn the_guest_is_refused_where_nobody_listens() {
    let mut guest = Guest::new();
    guest.send(&Packet::new(50, 1023, REQUEST));
    let reset = guest.next();
    assert_eq!((reset.op, reset.src_cid, reset.dst_cid), (RST, 2, CID));
    assert_eq!((reset.src_port, reset.dst_port), (1023, 50));
}

#[test]
fn a_port_is_open_once_and_only_as_long_as_its_listener_lives() {
    let mut guest = Guest::new();
    let listener = guest.host.listen(1023).unwrap();
    assert_eq!(kind(guest.host.listen(1023).map(drop)), ErrorKind::AddrInUse);
    guest.send(&Packet::new(50, 1023, REQUEST));
    assert_eq!(guest.operations(), [RESPONSE]);
    drop(listener);
    let closed = guest.next();
    assert_eq!((closed.op, closed.flags), (SHUTDOWN, 3), "what was not accepted is closed");
    guest.send(&Packet::new(51, 1023, REQUEST));
    assert_eq!(guest.operations(), [RST]);
    assert!(guest.host.listen(1023).is_ok());
}

#[test]
fn a_listener_that_accepts_nothing_fills_up() {
    let mut guest = Guest::new();
    let listener = guest.host.listen(1023).unwrap();
    for port in 0..200 {
        guest.send(&Packet::new(port, 1023, REQUEST));
    }
    let accepted = guest.operations().iter().filter(|op| **op == RESPONSE).count();
    assert_eq!(accepted, 128);
    for _ in 0..128 {
        listener.accept(Some(SOON)).unwrap();
    }
    assert_eq!(kind(listener.accept(Some(Duration::from_millis(1)))), ErrorKind::TimedOut);
}

#[test]
fn a_thousand_connections_each_carry_their_own_bytes() {
    use std::io::{Read, Write};
    let mut guest = Guest::new();
    let started = Instant::now();
    let mut streams: Vec<_> = (0..1000).map(|index| guest.accept(index % 10, 1 << 16)).collect();
    for (index, (socket, stream)) in streams.iter_mut().enumerate() {
        stream.write_all(&(index as u32).to_le_bytes()).unwrap();
        let bytes = (!(index as u32)).to_le_bytes();
        assert_eq!(guest.write(socket, &bytes), 4);
    }
    let packets = guest.packets();
    assert_eq!(packets.iter().filter(|packet| packet.op == RW).count(), 1000);
    for (index, (socket, stream)) in streams.iter_mut().enumerate() {
        let mine =
            packets.iter().filter(|packet| (packet.dst_port, packet.src_port) == (socket.guest_port, socket.host_port));
        let bytes: Vec<u8> = mine.flat_map(|packet| packet.payload.clone()).collect();
        assert_eq!(bytes, (index as u32).to_le_bytes());
        let mut bytes = [0; 4];
        stream.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes, (!(index as u32)).to_le_bytes());
    }
    println!("1000 connections in {:?}", started.elapsed());
}
