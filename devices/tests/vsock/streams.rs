//! Bytes: all of them, in order, within credit, however slow either side is.

use std::io::{Read, Write};

use crate::common::INTERRUPT_STATUS;
use crate::driver::*;

/// Moves `total` bytes both ways at once in random pieces.
fn transfer(seed: u64, total: usize, buf_alloc: u32, event_index: bool) {
    let mut guest = Guest::down();
    if event_index {
        guest.start_with_event_index()
    } else {
        guest.start()
    }
    guest.post(32);
    let (mut socket, mut stream) = guest.accept(1025, buf_alloc);
    let mut numbers = Numbers(seed);
    let (to_host, to_guest) = (numbers.bytes(total), numbers.bytes(total));
    let (mut written, mut at_host) = (0, Vec::new());
    let (mut given, mut at_guest) = (0, Vec::new());
    let mut idle = 0;
    while at_host.len() < total || at_guest.len() < total {
        let before = (written, at_host.len(), given, at_guest.len());
        match numbers.below(5) {
            0 => {
                let end = (written + 1 + numbers.below(100_000)).min(total);
                written += guest.write(&mut socket, &to_host[written..end]);
            }
            1 => at_host.extend(read_some(&mut stream, 1 + numbers.below(100_000))),
            2 => {
                let end = (given + 1 + numbers.below(100_000)).min(total);
                given += write_some(&mut stream, &to_guest[given..end]);
            }
            3 => {
                at_guest.extend(socket.read(1 + numbers.below(buf_alloc as usize)));
                let update = socket.packet(CREDIT_UPDATE);
                guest.send(&update);
            }
            _ => {
                guest.deliver(&mut socket);
            }
        }
        let moved = before != (written, at_host.len(), given, at_guest.len());
        idle = if moved { 0 } else { idle + 1 };
        assert!(idle < 1000, "stuck at {before:?}");
    }
    assert!(at_host == to_host, "what the guest sent is what the host reads");
    assert!(at_guest == to_guest, "what the host sent is what the guest reads");
    assert!(!socket.reset);
}

#[test]
fn megabytes_both_ways_in_random_pieces() {
    for seed in 1..=3 {
        transfer(seed, 4 << 20, 256 * 1024, false);
    }
}

#[test]
fn megabytes_both_ways_with_event_indexes() {
    transfer(11, 4 << 20, 256 * 1024, true);
}

#[test]
fn bytes_both_ways_with_little_credit() {
    transfer(4, 200_000, 700, false);
    transfer(5, 20_000, 1, true);
}

#[test]
fn a_packet_may_be_cut_anywhere() {
    let mut guest = Guest::new();
    let (socket, mut stream) = guest.accept(1025, 1 << 16);
    let payload = Numbers(9).bytes(3000);
    let packet = socket.packet(RW).with_payload(&payload);
    for (at, cuts) in [&[44][..], &[10, 20, 14], &[1, 100], &[44, 1, 1, 1, 500, 0, 7], &[0, 43]].into_iter().enumerate()
    {
        guest.send_in_pieces(&packet, cuts);
        let mut data = vec![0; 3000];
        stream.read_exact(&mut data).unwrap();
        assert!(data == payload, "cut {at}");
    }
}

#[test]
fn a_payload_ends_where_its_header_says() {
    let mut guest = Guest::new();
    let (socket, mut stream) = guest.accept(1025, 1 << 16);
    let packet = Packet { len: 3, ..socket.packet(RW).with_payload(b"abcdef") };
    guest.send(&packet);
    assert_eq!(read_some(&mut stream, 100), b"abc");
}

#[test]
fn a_host_that_does_not_read_stops_the_guest_by_credit_alone() {
    let mut guest = Guest::new();
    let (mut socket, mut stream) = guest.accept(1025, 1 << 16);
    let data = Numbers(77).bytes(4 << 20);
    let mut written = 0;
    while written < data.len() {
        let len = guest.write(&mut socket, &data[written..]);
        guest.deliver(&mut socket);
        if len == 0 && socket.credit() == 0 {
            break;
        }
        written += len;
    }
    assert!(written < 2 << 20, "{written} bytes went to a host that reads nothing");
    assert!(!socket.reset);
    // Every byte comes, and credit comes back as the host reads.
    let mut read = Vec::new();
    guest.wait(|guest| {
        read.extend(read_some(&mut stream, 1 << 20));
        guest.deliver(&mut socket);
        written += guest.write(&mut socket, &data[written..]);
        (read.len() == data.len()).then_some(())
    });
    assert!(read == data);
}

#[test]
fn data_without_credit_waits_without_spinning() {
    let mut guest = Guest::new();
    let (mut socket, mut stream) = guest.accept(1025, 10);
    stream.write_all(&[7; 1000]).unwrap();
    assert_eq!(guest.deliver(&mut socket), [RW, CREDIT_REQUEST]);
    assert_eq!(socket.read(100).len(), 10);
    assert_eq!(guest.machine.turn(), 0, "nothing to do until credit comes");
    drop(stream);
    guest.run();
    assert_eq!(guest.machine.turn(), 0, "a closed stream is nothing to do either");
    let mut received = 10;
    while received < 1000 {
        let update = socket.packet(CREDIT_UPDATE);
        guest.send(&update);
        guest.deliver(&mut socket);
        received += socket.read(100).len();
    }
    let update = socket.packet(CREDIT_UPDATE);
    guest.send(&update);
    guest.deliver(&mut socket);
    assert_eq!((received, socket.shutdown), (1000, 3), "all bytes, then the end");
}

#[test]
fn a_request_for_credit_is_answered() {
    let mut guest = Guest::new();
    let (mut socket, mut stream) = guest.accept(1025, 1 << 16);
    guest.write(&mut socket, &[1; 100]);
    assert_eq!(read_some(&mut stream, 1000).len(), 100);
    let ask = socket.packet(CREDIT_REQUEST);
    guest.send(&ask);
    let answer = guest.next();
    assert_eq!((answer.op, answer.fwd_cnt, answer.buf_alloc), (CREDIT_UPDATE, 100, DEVICE_CREDIT));
}

#[test]
fn without_buffers_everything_waits_and_then_comes() {
    let mut guest = Guest::down();
    guest.start();
    let listener = guest.host.listen(9).unwrap();
    let data = Numbers(3).bytes(9000);
    for port in 0..20 {
        guest.send(&Packet::new(port, 9, REQUEST));
        guest.send(&Packet::new(port, 10, REQUEST));
        listener.accept(Some(SOON)).unwrap().write_all(&data).unwrap();
    }
    guest.run();
    assert_eq!(guest.machine.turn(), 0);
    guest.post(5);
    let packets = guest.packets();
    let of = |op: u16| packets.iter().filter(move |packet| packet.op == op);
    assert_eq!((of(RESPONSE).count(), of(RST).count()), (20, 20));
    for port in 0..20 {
        let bytes: Vec<u8> =
            of(RW).filter(|packet| packet.dst_port == port).flat_map(|packet| packet.payload.clone()).collect();
        assert!(bytes == data, "port {port}");
        let first = packets.iter().find(|packet| (packet.src_port, packet.dst_port) == (9, port)).unwrap();
        assert_eq!(first.op, RESPONSE, "the answer comes before the data");
    }
}

#[test]
fn connections_take_turns() {
    let mut guest = Guest::down();
    guest.start();
    guest.post(0);
    let listener = guest.host.listen(9).unwrap();
    let mut streams = Vec::new();
    for port in 0..8 {
        guest.send(&Packet::new(port, 9, REQUEST));
        streams.push(listener.accept(Some(SOON)).unwrap());
    }
    for stream in &mut streams {
        stream.write_all(&[1; 80_000]).unwrap();
    }
    guest.post(48);
    let order: Vec<_> = guest.packets().iter().filter(|packet| packet.op == RW).map(|packet| packet.dst_port).collect();
    assert!(order.len() >= 160);
    // Those in line share 64 packets: nobody is ever ahead by more than one's part.
    let mut packets = [0_u32; 8];
    for port in &order {
        packets[*port as usize] += 1;
        let (least, most) = (packets.iter().min().unwrap(), packets.iter().max().unwrap());
        assert!(most - least <= 8, "{packets:?} of {order:?}");
    }
}

#[test]
fn one_read_fills_many_packets_of_a_connection_that_is_alone() {
    let mut guest = Guest::new();
    let (mut socket, mut stream) = guest.accept(1025, 1 << 17);
    let data = Numbers(5).bytes(100_000);
    stream.write_all(&data).unwrap();
    guest.run();
    guest.deliver(&mut socket);
    assert!(socket.read(1 << 20) == data);
}

#[test]
fn a_batch_interrupts_once() {
    let mut guest = Guest::new();
    let (mut socket, mut stream) = guest.accept(1025, 1 << 16);
    guest.packets();
    guest.machine.set(crate::common::INTERRUPT_ACK, 3);
    while guest.machine.interrupted() {}
    stream.write_all(&[5; 40_000]).unwrap();
    guest.run();
    assert_eq!(guest.machine.line.read().ok(), Some(1), "ten packets, one interrupt");
    assert_eq!(guest.machine.get(INTERRUPT_STATUS), 1);
    guest.deliver(&mut socket);
    assert_eq!(socket.read(1 << 20).len(), 40_000);
}

#[test]
fn a_buffer_of_a_header_only_takes_control_packets() {
    let mut guest = Guest::down();
    guest.start();
    guest.buffer = 44;
    guest.post(4);
    let (mut socket, mut stream) = guest.accept(1025, 1 << 16);
    stream.write_all(b"x").unwrap();
    // Buffers without room for payload are used up one by one, without a loop inside the device.
    guest.machine.turn();
    guest.machine.turn();
    let len = guest.machine.used(RX).len();
    assert!((1..=4).contains(&len), "{len}");
    socket.read(0);
}

/// Host threads that read and write at full speed while the device works: no edge of the sockets gets lost.
#[test]
fn threads_of_the_host_and_the_guest_run_at_once() {
    const TOTAL: usize = 8 << 20;
    let mut guest = Guest::new();
    let mut connections: Vec<_> = (0..4).map(|port| guest.accept(port, 100_000)).collect();
    let data = std::sync::Arc::new(Numbers(8).bytes(TOTAL));
    let mut threads = Vec::new();
    for (_, stream) in &connections {
        let (mut writer, mut reader) = (stream.try_clone().unwrap(), stream.try_clone().unwrap());
        let sent = std::sync::Arc::clone(&data);
        threads.push(std::thread::spawn(move || {
            writer.write_all(&sent).unwrap();
            writer.shutdown(std::net::Shutdown::Write).unwrap();
            Vec::new()
        }));
        threads.push(std::thread::spawn(move || read_all(&mut reader)));
    }
    let mut progress = [(0, 0, false); 4];
    guest.wait(|guest| {
        for _ in 0..200 {
            for packet in guest.packets() {
                connections[packet.dst_port as usize].0.take(&packet);
            }
            for ((socket, _), (written, read, closed)) in connections.iter_mut().zip(&mut progress) {
                if !*closed {
                    *written += guest.write(socket, &data[*written..]);
                }
                if *written == TOTAL && !*closed {
                    *closed = true;
                    let end = Packet { flags: 2, ..socket.packet(SHUTDOWN) };
                    guest.send(&end);
                }
                let bytes = socket.read(1 << 20);
                assert!(bytes == data[*read..*read + bytes.len()]);
                *read += bytes.len();
                if !bytes.is_empty() {
                    let update = socket.packet(CREDIT_UPDATE);
                    guest.send(&update);
                }
            }
        }
        progress.iter().all(|(written, read, _)| written + read == 2 * TOTAL).then_some(())
    });
    guest.wait(|_| threads.iter().all(|thread| thread.is_finished()).then_some(()));
    for thread in threads {
        let read = thread.join().unwrap();
        assert!(read.is_empty() || read == *data);
    }
    for packet in guest.packets() {
        connections[packet.dst_port as usize].0.take(&packet);
    }
    // Both halves of it are closed by now, so the host end may count as closed altogether.
    assert!(connections.iter().all(|(socket, _)| socket.shutdown & 2 == 2), "the end came after the bytes");
}
