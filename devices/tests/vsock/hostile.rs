//! The hostile table: one row, one test. After each, another connection still works.

use std::os::unix::net::UnixStream;

use crate::common::{RUNNING, STATUS, WRITABLE, readable, writable};
use crate::driver::*;

/// How a row starts: a connection that the host started, and one that bystands.
struct Scene {
    guest: Guest,
    socket: Socket,
    stream: UnixStream,
    bystander: (Socket, UnixStream),
}

/// Plays a row and checks that the device and the bystander are well.
fn play(row: impl FnOnce(&mut Scene)) {
    let mut guest = Guest::new();
    let (socket, stream) = guest.accept(1025, 1 << 16);
    let bystander = guest.accept(1026, 1 << 16);
    let mut scene = Scene { guest, socket, stream, bystander };
    row(&mut scene);
    let Scene { mut guest, bystander: (mut socket, mut stream), .. } = scene;
    assert_eq!(guest.machine.get(STATUS), RUNNING, "the device goes on");
    guest.packets();
    assert_eq!(guest.write(&mut socket, b"well?"), 5);
    assert_eq!(read_some(&mut stream, 10), b"well?", "the bystander's bytes come through");
    std::io::Write::write_all(&mut stream, b"well").unwrap();
    guest.deliver(&mut socket);
    assert_eq!(socket.read(10), b"well");
    assert_eq!(guest.unused(), 0, "every transmit buffer comes back");
}

impl Scene {
    /// Sends `packet` and expects the connection to be reset, once, and closed for the host.
    fn is_reset_by(&mut self, packet: &Packet) {
        self.guest.send(packet);
        let resets = self.guest.packets();
        assert_eq!(resets.len(), 1, "{resets:?}");
        self.socket.take(&resets[0]);
        assert!(self.socket.reset);
        read_all(&mut self.stream);
    }

    /// Sends `packet` and expects no answer.
    fn is_silent_on(&mut self, packet: &Packet) {
        self.guest.send(packet);
        assert_eq!(self.guest.operations(), [0_u16; 0]);
    }
}

#[test]
fn packets_from_other_source_cids_are_dropped() {
    play(|scene| {
        for src_cid in [0, 1, 2, CID + 1, u64::from(u32::MAX), CID | 1 << 32, u64::MAX] {
            for op in 0..10 {
                let packet = Packet { src_cid, ..scene.socket.packet(op) };
                scene.is_silent_on(&packet);
            }
        }
        scene.guest.write(&mut scene.socket, b"alive");
        assert_eq!(read_some(&mut scene.stream, 10), b"alive");
    });
}

#[test]
fn packets_to_other_destination_cids_are_refused() {
    play(|scene| {
        for dst_cid in [0, 1, 3, CID, u64::from(u32::MAX), 2 | 1 << 32, u64::MAX] {
            let packet = Packet { dst_cid, ..scene.socket.packet(REQUEST) };
            scene.guest.send(&packet);
            let reset = scene.guest.next();
            assert_eq!((reset.op, reset.src_cid, reset.dst_cid), (RST, dst_cid, CID));
            scene.is_silent_on(&Packet { op: RST, ..packet });
        }
        scene.guest.write(&mut scene.socket, b"alive");
        assert_eq!(read_some(&mut scene.stream, 10), b"alive");
    });
}

#[test]
fn packets_of_other_socket_types_are_refused() {
    play(|scene| {
        for kind in [0, 2, 3, u16::MAX] {
            let packet = Packet { kind, ..scene.socket.packet(RW).with_payload(b"x") };
            scene.guest.send(&packet);
            let reset = scene.guest.next();
            assert_eq!((reset.op, reset.kind), (RST, kind));
        }
    });
}

#[test]
fn a_payload_longer_than_its_buffers_resets() {
    play(|scene| scene.is_reset_by(&Packet { len: 101, ..scene.socket.packet(RW).with_payload(&[1; 100]) }));
}

#[test]
fn a_payload_of_four_gigabytes_resets() {
    play(|scene| scene.is_reset_by(&Packet { len: u32::MAX, ..scene.socket.packet(RW).with_payload(&[1; 100]) }));
}

#[test]
fn a_payload_above_64_kib_resets() {
    play(|scene| scene.is_reset_by(&scene.socket.packet(RW).with_payload(&vec![1; 64 * 1024 + 1])));
}

#[test]
fn a_payload_of_64_kib_is_taken() {
    play(|scene| {
        let packet = scene.socket.packet(RW).with_payload(&vec![1; 64 * 1024]);
        scene.guest.send(&packet);
        assert_eq!(read_some(&mut scene.stream, 1 << 20).len(), 64 * 1024);
    });
}

#[test]
fn a_payload_of_nothing_is_nothing() {
    play(|scene| {
        let packet = scene.socket.packet(RW);
        scene.is_silent_on(&packet);
        assert!(read_some(&mut scene.stream, 10).is_empty());
    });
}

#[test]
fn a_length_on_a_packet_without_payload_is_ignored() {
    play(|scene| {
        let packet = Packet { len: u32::MAX, ..scene.socket.packet(CREDIT_UPDATE) };
        scene.is_silent_on(&packet);
    });
}

#[test]
fn a_packet_shorter_than_a_header_is_dropped() {
    play(|scene| {
        let bytes = scene.socket.packet(RST).bytes();
        for len in [1, 20, 43] {
            scene.guest.send_bytes(&bytes[..len]);
        }
        scene.guest.reclaim();
        scene.guest.machine.submit(TX, &[readable(crate::common::READABLE, 0)]);
        scene.guest.machine.used(TX);
        assert!(scene.guest.packets().is_empty());
        scene.guest.write(&mut scene.socket, b"alive");
        assert_eq!(read_some(&mut scene.stream, 10), b"alive");
    });
}

#[test]
fn a_second_request_on_a_connection_resets() {
    play(|scene| scene.is_reset_by(&scene.socket.packet(REQUEST)));
}

#[test]
fn a_second_response_on_a_connection_resets() {
    play(|scene| scene.is_reset_by(&scene.socket.packet(RESPONSE)));
}

#[test]
fn an_unknown_operation_on_a_connection_resets() {
    play(|scene| scene.is_reset_by(&scene.socket.packet(8)));
    play(|scene| scene.is_reset_by(&scene.socket.packet(0)));
    play(|scene| scene.is_reset_by(&scene.socket.packet(u16::MAX)));
}

#[test]
fn any_operation_on_no_connection_is_refused_and_a_reset_is_not() {
    play(|scene| {
        for op in [0, RESPONSE, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST, 8, u16::MAX] {
            scene.guest.send(&Packet::new(99, 0xc000_0000, op));
            assert_eq!(scene.guest.operations(), [RST], "operation {op}");
        }
        scene.is_silent_on(&Packet::new(99, 0xc000_0000, RST));
    });
}

#[test]
fn an_answer_to_a_request_that_was_not_sent_yet_resets() {
    play(|scene| {
        // Without receive buffers the device cannot send its request; the guest guesses its ports.
        let mut guest = Guest::down();
        guest.start();
        let call = guest.dial(7, SOON);
        guest.wait(|guest| {
            guest.send(&Packet::new(7, 0xc000_0000, RESPONSE));
            call.is_finished().then_some(())
        });
        assert_eq!(call.join().unwrap().unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
        drop(guest);
        assert!(scene.guest.packets().is_empty());
    });
}

#[test]
fn data_before_the_answer_resets() {
    play(|scene| {
        let call = scene.guest.dial(7, SOON);
        let request = scene.guest.next();
        scene.guest.send(&Packet::new(7, request.src_port, RW).with_payload(b"early"));
        assert_eq!(scene.guest.operations(), [RST]);
        assert_eq!(call.join().unwrap().unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
    });
}

#[test]
fn one_byte_more_than_the_credit_resets_and_memory_stays_bounded() {
    play(|scene| {
        // Fills the host end's socket and the device's buffer to the last byte.
        loop {
            scene.guest.deliver(&mut scene.socket);
            if scene.guest.write(&mut scene.socket, &[1; 60_000]) == 0 {
                break;
            }
        }
        assert_eq!(scene.socket.credit(), 0);
        let packet = scene.socket.packet(RW).with_payload(b"!");
        scene.guest.send(&packet);
        scene.guest.deliver(&mut scene.socket);
        assert!(scene.socket.reset);
        let (mut read, sent) = (0, scene.socket.sent as usize);
        let stream = &mut scene.stream;
        scene.guest.wait(|_| {
            read += read_some(stream, 1 << 20).len();
            (read == sent).then_some(())
        });
        assert_eq!(read_all(&mut scene.stream), b"", "what was in credit came, the rest did not");
    });
}

#[test]
fn credit_that_was_not_announced_is_not_credit() {
    play(|scene| {
        // The host reads all the time, but the guest takes no packets: it cannot know.
        let packet = scene.socket.packet(RW).with_payload(&[1; 32 * 1024]);
        for _ in 0..8 {
            scene.guest.send(&packet);
            assert_eq!(read_some(&mut scene.stream, 1 << 20).len(), 32 * 1024);
        }
        scene.guest.deliver(&mut scene.socket);
        scene.socket.sent = 8 * 32 * 1024;
        assert!(scene.socket.credit() > 0, "it was told");
        assert!(!scene.socket.reset);
    });
}

#[test]
fn lies_about_consumed_bytes_give_no_credit() {
    play(|scene| {
        let Scene { guest, socket, stream, .. } = scene;
        std::io::Write::write_all(stream, &[1; 100_000]).unwrap();
        guest.deliver(socket);
        assert_eq!(socket.received, 1 << 16);
        for fwd_cnt in [(1 << 16) + 1, u32::MAX, 1 << 31, 0] {
            let lie = Packet { fwd_cnt, ..socket.packet(CREDIT_UPDATE) };
            guest.send(&lie);
            assert!(guest.packets().iter().all(|packet| packet.op != RW), "fwd_cnt {fwd_cnt}");
        }
        // The truth still works.
        socket.read(1 << 20);
        let update = socket.packet(CREDIT_UPDATE);
        guest.send(&update);
        guest.deliver(socket);
        assert_eq!(socket.received, 100_000);
    });
}

#[test]
fn counts_that_go_backwards_are_old_news() {
    play(|scene| {
        let Scene { guest, socket, stream, .. } = scene;
        std::io::Write::write_all(stream, &[1; 50_000]).unwrap();
        guest.deliver(socket);
        socket.read(50_000);
        let update = socket.packet(CREDIT_UPDATE);
        guest.send(&update);
        let stale = Packet { fwd_cnt: 10_000, ..socket.packet(CREDIT_UPDATE) };
        guest.send(&stale);
        std::io::Write::write_all(stream, &[1; 1 << 16]).unwrap();
        guest.deliver(socket);
        assert_eq!(socket.received, 50_000 + (1 << 16), "the whole window is there");
    });
}

#[test]
fn a_shrinking_buffer_stops_the_device() {
    play(|scene| {
        let Scene { guest, socket, stream, .. } = scene;
        let nothing = Packet { buf_alloc: 0, ..socket.packet(CREDIT_UPDATE) };
        guest.send(&nothing);
        std::io::Write::write_all(stream, &[1; 1000]).unwrap();
        assert_eq!(guest.operations(), [CREDIT_REQUEST]);
    });
}

#[test]
fn credit_of_four_gigabytes_sends_no_more_than_there_is() {
    play(|scene| {
        let Scene { guest, socket, stream, .. } = scene;
        socket.buf_alloc = u32::MAX;
        let update = socket.packet(CREDIT_UPDATE);
        guest.send(&update);
        std::io::Write::write_all(stream, &[1; 100_000]).unwrap();
        guest.deliver(socket);
        assert_eq!(socket.received, 100_000);
    });
}

#[test]
fn shutdown_flags_without_meaning_mean_nothing() {
    play(|scene| {
        for flags in [0, 4, 0xffff_fffc] {
            let packet = Packet { flags, ..scene.socket.packet(SHUTDOWN) };
            scene.is_silent_on(&packet);
        }
        scene.guest.write(&mut scene.socket, b"alive");
        assert_eq!(read_some(&mut scene.stream, 10), b"alive");
    });
}

#[test]
fn a_shutdown_is_not_taken_back() {
    play(|scene| {
        for flags in [1, 0] {
            let packet = Packet { flags, ..scene.socket.packet(SHUTDOWN) };
            scene.is_silent_on(&packet);
        }
        scene.is_reset_by(&Packet { flags: 0xffff_fffe, ..scene.socket.packet(SHUTDOWN) });
    });
}

#[test]
fn data_after_the_end_of_data_resets() {
    play(|scene| {
        let packet = Packet { flags: 2, ..scene.socket.packet(SHUTDOWN) };
        scene.is_silent_on(&packet);
        scene.is_reset_by(&scene.socket.packet(RW).with_payload(b"x"));
    });
}

#[test]
fn a_storm_of_resets_is_silent() {
    play(|scene| {
        for round in 0..5000 {
            scene.guest.send(&Packet::new(round, round.wrapping_mul(0x9e37_79b9), RST));
        }
        assert!(scene.guest.packets().is_empty());
        scene.guest.write(&mut scene.socket, b"alive");
        assert_eq!(read_some(&mut scene.stream, 10), b"alive");
    });
}

#[test]
fn a_buffer_for_nothing_but_a_header_costs_no_bytes() {
    let mut guest = Guest::down();
    guest.start();
    guest.post(3);
    let (_socket, mut stream) = guest.accept(1025, 1 << 20);
    let data = Numbers(7).bytes(100_000);
    std::io::Write::write_all(&mut stream, &data).unwrap();
    guest.run();
    let mut got = Vec::new();
    let mut take = |guest: &mut Guest| {
        let used = guest.machine.used(RX);
        let lens = used.iter().map(|(head, len)| {
            let packet = Packet::parse(&guest.machine.take(WRITABLE + u64::from(*head) * 4096, *len as usize));
            got.extend(packet.payload);
            packet.len
        });
        lens.collect::<Vec<_>>()
    };
    assert_eq!(take(&mut guest), [4052; 3], "the host has more to say than there is room for");
    for index in 0..30 {
        let desc = guest.machine.rings[RX].desc;
        let len = if index % 10 == 0 { 44 } else { 4096 };
        guest.machine.describe(desc, index, writable(WRITABLE + u64::from(index) * 4096, len));
        guest.machine.offer(RX, index);
    }
    guest.machine.kick(RX);
    guest.run();
    let lens = take(&mut guest);
    assert_eq!((lens[0], lens[10], lens[20]), (0, 0, 0));
    assert!(got == data, "{} bytes of {}", got.len(), data.len());
    assert_eq!(guest.machine.get(STATUS), RUNNING);
}

#[test]
fn a_flood_of_requests_without_receive_buffers_stalls_and_loses_nothing() {
    let mut guest = Guest::down();
    guest.start();
    // All the slots, again and again: 256 replies wait, then the device takes no more.
    let mut sent = 0;
    while guest.unused() == 0 {
        for _ in 0..40 {
            guest.queue(&Packet::new(sent, 3, REQUEST).bytes());
            sent += 1;
        }
        guest.machine.kick(TX);
        guest.run();
        assert!(sent < 1000, "the device takes requests without end");
    }
    assert_eq!(sent as usize - guest.unused(), 256);
    assert_eq!(guest.machine.turn(), 0, "and waits without spinning");
    guest.post(8);
    let packets = guest.packets();
    let refused: Vec<u32> = packets.iter().map(|packet| packet.dst_port).collect();
    assert_eq!(refused, (0..sent).collect::<Vec<_>>(), "each is refused, in order");
    assert_eq!(guest.unused(), 0);
}

#[test]
fn a_flood_of_requests_to_an_open_port_stops_at_the_backlog() {
    play(|scene| {
        let listener = scene.guest.host.listen(9).unwrap();
        let mut accepted = 0;
        for port in 0..3000 {
            scene.guest.send(&Packet::new(port, 9, REQUEST));
            accepted += scene.guest.operations().iter().filter(|op| **op == RESPONSE).count();
            scene.guest.send(&Packet::new(port, 9, RST));
        }
        assert_eq!(accepted, 128);
        // What it left behind are streams at their end.
        let mut stream = listener.accept(Some(SOON)).unwrap();
        assert_eq!(read_all(&mut stream), b"");
    });
}

#[test]
fn connections_beyond_the_limit_are_refused_and_room_comes_back() {
    let mut guest = Guest::new();
    let listener = guest.host.listen(9).unwrap();
    let mut streams = Vec::new();
    // Each connection has two descriptors of this process, and other tests run beside this one.
    let limit = raise_descriptor_limit().saturating_sub(5000) / 2;
    let connections = limit.min(4096) as u32;
    for port in 0..connections {
        guest.send(&Packet::new(port, 9, REQUEST));
        assert_eq!(guest.operations(), [RESPONSE], "connection {port}");
        streams.push(listener.accept(Some(SOON)).unwrap());
    }
    if connections < 4096 {
        return println!("SKIPPED: only {connections} connections fit into this process' descriptors");
    }
    guest.send(&Packet::new(5000, 9, REQUEST));
    assert_eq!(guest.operations(), [RST]);
    let call = guest.dial(1, SOON);
    guest.wait(|_| call.is_finished().then_some(()));
    assert_eq!(call.join().unwrap().unwrap_err().kind(), std::io::ErrorKind::ResourceBusy);
    guest.send(&Packet::new(0, 9, RST));
    guest.send(&Packet::new(5000, 9, REQUEST));
    assert_eq!(guest.operations(), [RESPONSE]);
}

fn raise_descriptor_limit() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a valid rlimit that outlives the calls.
    unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit);
        limit.rlim_cur = limit.rlim_max.min(20_000);
        libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
    }
    limit.rlim_cur
}

#[test]
fn a_connection_that_breaks_rules_without_end_costs_one_entry_at_most() {
    let mut guest = Guest::down();
    guest.start();
    let listener = guest.host.listen(9).unwrap();
    // No receive buffers: the RST that is owed cannot go out.
    for _ in 0..1000 {
        guest.send(&Packet::new(1, 9, REQUEST));
        guest.send(&Packet::new(1, 9, 77));
    }
    assert!(listener.accept(Some(SOON)).is_ok());
    guest.post(8);
    assert_eq!(guest.operations(), [RST], "one connection, one reset");
}
