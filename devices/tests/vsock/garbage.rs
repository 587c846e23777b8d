//! Random packets and random doings of the host: nothing panics, hangs, or keeps a transmit buffer for good.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::common::{RUNNING, STATUS};
use crate::driver::*;

const ROUNDS: usize = 20_000;

fn any_packet(numbers: &mut Numbers, known: &[(u32, u32)]) -> Vec<u8> {
    let odd = |numbers: &mut Numbers, usual: u64| if numbers.below(20) == 0 { numbers.next() } else { usual };
    let (guest_port, host_port) = match numbers.below(4) {
        0 if !known.is_empty() => known[numbers.below(known.len())],
        1 => (numbers.below(8) as u32, 0xc000_0000 + numbers.below(64) as u32),
        _ => (numbers.below(8) as u32, 9),
    };
    let op = numbers.below(9) as u16;
    let len = match numbers.below(4) {
        _ if op != RW => 0,
        0 => 70_000,
        1 => 0,
        _ => numbers.below(20_000),
    };
    let payload = numbers.bytes(len);
    let mut packet = Packet::new(guest_port, host_port, op).with_payload(&payload);
    packet.src_cid = odd(numbers, CID);
    packet.dst_cid = odd(numbers, 2);
    packet.kind = odd(numbers, 1) as u16;
    packet.len = odd(numbers, u64::from(packet.len)) as u32;
    packet.flags = numbers.below(5) as u32;
    packet.buf_alloc = odd(numbers, 1 << 16) as u32;
    packet.fwd_cnt = if numbers.below(2) == 0 { 0 } else { numbers.next() as u32 };
    let mut bytes = packet.bytes();
    if numbers.below(30) == 0 {
        bytes.truncate(1 + numbers.below(44));
    }
    bytes
}

fn play(seed: u64) {
    let mut numbers = Numbers(seed);
    let mut guest = Guest::new();
    let listener = guest.host.listen(9).unwrap();
    let mut streams: Vec<UnixStream> = Vec::new();
    let mut known = Vec::new();
    for _ in 0..ROUNDS {
        match numbers.below(12) {
            0 => {
                for packet in guest.packets() {
                    known.push((packet.dst_port, packet.src_port));
                }
                let excess = known.len().saturating_sub(64);
                known.drain(..excess);
            }
            1 => streams.extend(listener.accept(Some(Duration::ZERO)).ok()),
            2 if !streams.is_empty() => drop(streams.swap_remove(numbers.below(streams.len()))),
            3 if !streams.is_empty() => {
                let index = numbers.below(streams.len());
                let how = [std::net::Shutdown::Read, std::net::Shutdown::Write][numbers.below(2)];
                let _ = streams[index].shutdown(how);
            }
            4 | 5 if !streams.is_empty() => {
                let index = numbers.below(streams.len());
                let len = numbers.below(100_000);
                write_some(&mut streams[index], &vec![1; len]);
            }
            6 if !streams.is_empty() => {
                let index = numbers.below(streams.len());
                let len = 1 + numbers.below(100_000);
                read_some(&mut streams[index], len);
            }
            _ => {
                if guest.unused() < 50 {
                    let bytes = any_packet(&mut numbers, &known);
                    guest.send_bytes(&bytes);
                }
            }
        }
    }
    guest.packets();
    assert_eq!(guest.machine.get(STATUS), RUNNING);
    assert_eq!(guest.unused(), 0);
    // And now something sensible.
    guest.packets();
    let (mut socket, mut stream) = guest.accept(4242, 1 << 16);
    guest.write(&mut socket, b"sense");
    assert_eq!(read_some(&mut stream, 10), b"sense");
    stream.write_all(b"too").unwrap();
    guest.deliver(&mut socket);
    assert_eq!(socket.read(10), b"too");
}

#[test]
fn nothing_breaks_it_1() {
    play(0x1234_5678_9abc_def1);
}

#[test]
fn nothing_breaks_it_2() {
    play(0xfeed_f00d_dead_beef);
}
