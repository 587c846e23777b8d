//! Ends of streams: nothing is lost, both sides see them, nothing stays behind.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;

use crate::driver::*;

fn shutdown_packet(socket: &Socket, flags: u32) -> Packet {
    Packet { flags, ..socket.packet(SHUTDOWN) }
}

#[test]
fn the_guest_writes_and_closes_at_once_and_the_host_reads_every_byte() {
    let mut guest = Guest::new();
    let (mut socket, mut stream) = guest.accept(1025, 1 << 16);
    // More than the host end's socket takes, so that some of it is pending in the device.
    let data = Numbers(21).bytes(4 << 20);
    let mut written = 0;
    loop {
        let len = guest.write(&mut socket, &data[written..]);
        written += len;
        guest.deliver(&mut socket);
        if socket.credit() == 0 {
            break;
        }
    }
    let close = shutdown_packet(&socket, 3);
    guest.send(&close);
    assert_eq!(guest.operations(), [0_u16; 0], "the end is not confirmed before the host has all bytes");
    let mut read = Vec::new();
    guest.wait(|_| {
        read.extend(read_some(&mut stream, 100_000));
        (read.len() == written).then_some(())
    });
    assert!(read == data[..written]);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0, "then the end");
    assert_eq!(guest.operations(), [RST]);
}

#[test]
fn a_guest_that_does_not_wait_for_the_confirmation_loses_nothing() {
    let mut guest = Guest::new();
    let (mut socket, mut stream) = guest.accept(1025, 1 << 16);
    let data = Numbers(22).bytes(4 << 20);
    let mut written = 0;
    while socket.credit() > 0 {
        written += guest.write(&mut socket, &data[written..]);
        guest.deliver(&mut socket);
    }
    let close = shutdown_packet(&socket, 3);
    guest.send(&close);
    // Linux gives up after 8 seconds.
    let reset = socket.packet(RST);
    guest.send(&reset);
    // Its ports are free at once, whatever the old stream has still to say.
    let reuse = Packet::new(socket.guest_port, socket.host_port, REQUEST);
    guest.send(&reuse);
    assert_eq!(guest.operations(), [RST], "nobody listens, so it is refused: it is no packet of the old connection");
    let reader = std::thread::spawn(move || read_all(&mut stream));
    guest.wait(|_| reader.is_finished().then_some(()));
    assert!(reader.join().unwrap() == data[..written]);
}

#[test]
fn the_guest_closes_its_sending_half() {
    let mut guest = Guest::new();
    let (mut socket, mut stream) = guest.accept(1025, 1 << 16);
    guest.write(&mut socket, b"last");
    let half = shutdown_packet(&socket, 2);
    guest.send(&half);
    assert_eq!(read_all(&mut stream), b"last");
    stream.write_all(b"answer").unwrap();
    guest.deliver(&mut socket);
    assert_eq!(socket.read(100), b"answer");
    assert!(!socket.reset);
    drop(stream);
    guest.deliver(&mut socket);
    assert_eq!(socket.shutdown, 3);
}

#[test]
fn the_guest_closes_its_receiving_half() {
    let mut guest = Guest::new();
    let (mut socket, mut stream) = guest.accept(1025, 1 << 16);
    let half = shutdown_packet(&socket, 1);
    guest.send(&half);
    assert_eq!(stream.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    guest.write(&mut socket, b"still");
    assert_eq!(read_some(&mut stream, 100), b"still");
    drop(stream);
    guest.deliver(&mut socket);
    assert_eq!(socket.shutdown, 3, "an idle guest hears that the host closed");
}

#[test]
fn the_host_closes_its_sending_half() {
    let mut guest = Guest::new();
    let (mut socket, mut stream) = guest.accept(1025, 1 << 16);
    stream.write_all(b"question").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    guest.deliver(&mut socket);
    assert_eq!((socket.read(100), socket.shutdown), (b"question".to_vec(), 2));
    guest.write(&mut socket, b"answer");
    let close = shutdown_packet(&socket, 3);
    guest.send(&close);
    assert_eq!(read_all(&mut stream), b"answer");
    guest.deliver(&mut socket);
    assert!(socket.reset);
}

#[test]
fn the_host_closes_its_receiving_half() {
    let mut guest = Guest::new();
    let (mut socket, mut stream) = guest.accept(1025, 1 << 16);
    stream.shutdown(Shutdown::Read).unwrap();
    guest.write(&mut socket, b"nobody reads this");
    guest.deliver(&mut socket);
    assert_eq!(socket.shutdown, 1);
    stream.write_all(b"but writes").unwrap();
    guest.deliver(&mut socket);
    assert_eq!(socket.read(100), b"but writes");
}

#[test]
fn the_host_writes_and_closes_at_once() {
    let mut guest = Guest::new();
    let (mut socket, mut stream) = guest.accept(1025, 1 << 20);
    stream.write_all(&[3; 100_000]).unwrap();
    drop(stream);
    guest.deliver(&mut socket);
    assert_eq!((socket.read(1 << 20).len(), socket.shutdown), (100_000, 3));
    let reset = socket.packet(RST);
    guest.send(&reset);
    assert!(guest.packets().is_empty());
    let late = socket.packet(RW).with_payload(b"late");
    guest.send(&late);
    assert_eq!(guest.operations(), [RST], "the connection is forgotten");
}

#[test]
fn the_host_closes_with_bytes_unread() {
    let mut guest = Guest::new();
    let (mut socket, stream) = guest.accept(1025, 1 << 16);
    guest.write(&mut socket, &[1; 50_000]);
    drop(stream);
    guest.deliver(&mut socket);
    assert_eq!(socket.shutdown, 3);
    guest.write(&mut socket, &[1; 50_000]);
    guest.deliver(&mut socket);
    assert!(!socket.reset, "data for a host that is gone is dropped");
}

#[test]
fn the_guest_resets_in_the_middle() {
    let mut guest = Guest::new();
    let (mut socket, mut stream) = guest.accept(1025, 100);
    stream.write_all(&[9; 5000]).unwrap();
    guest.deliver(&mut socket);
    guest.write(&mut socket, b"before");
    let reset = socket.packet(RST);
    guest.send(&reset);
    assert_eq!(read_all(&mut stream), b"before", "and then the end, not an error");
    assert_eq!(stream.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    assert!(guest.packets().is_empty());
}

#[test]
fn both_close_at_the_same_time() {
    let mut guest = Guest::new();
    let (socket, stream) = guest.accept(1025, 100);
    let close = shutdown_packet(&socket, 3);
    drop(stream);
    guest.send(&close);
    let operations = guest.operations();
    assert_eq!(operations.last(), Some(&RST), "{operations:?}");
}

#[test]
fn the_drivers_reset_ends_all_streams() {
    let mut guest = Guest::new();
    let (mut socket, mut stream) = guest.accept(1025, 1 << 16);
    guest.write(&mut socket, b"said before the reset");
    guest.machine.set(crate::common::STATUS, 0);
    assert_eq!(read_all(&mut stream), b"said before the reset");
    guest.start();
    guest.post(8);
    let (mut socket, mut stream) = guest.accept(1025, 1 << 16);
    guest.write(&mut socket, b"again");
    assert_eq!(read_some(&mut stream, 10), b"again");
}

#[test]
fn what_the_guest_sent_last_is_taken_by_settling() {
    let mut guest = Guest::new();
    let (socket, mut stream) = guest.accept(1025, 1 << 16);
    let last = socket.packet(RW).with_payload(b"famous last words");
    guest.queue(&last.bytes());
    guest.device.lock().unwrap().settle();
    assert_eq!(read_some(&mut stream, 100), b"famous last words");
}
