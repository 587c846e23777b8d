//! Snapshots: rebuilt around live streams, started from a template, and fed with nonsense.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use katavm_devices::virtio::VirtioDevice;
use katavm_devices::vsock::{ConnectionId, RestoreError, Vsock, VsockHost, VsockState};

use crate::common::{Machine, STATUS, WRITABLE, writable};
use crate::driver::*;

/// What a new device is made of.
struct Saved {
    bytes: Vec<u8>,
    streams: Vec<(ConnectionId, OwnedFd)>,
}

fn save(guest: &Guest) -> Saved {
    let mut device = guest.device.lock().unwrap();
    let bytes = postcard::to_stdvec(&device.save()).unwrap();
    Saved { bytes, streams: device.detach() }
}

fn rebuild(guest: Guest, host: VsockHost, cid: u64, saved: Saved) -> Guest {
    let state: VsockState = postcard::from_bytes(&saved.bytes).unwrap();
    let transport = guest.machine.transport.save();
    let (memory, rings, buffer) = (guest.machine.memory.clone(), guest.machine.rings.clone(), guest.buffer);
    drop(guest);
    let device = Vsock::restore(&host, cid, &state, saved.streams).unwrap();
    let device = Arc::new(Mutex::new(device));
    let shared = Arc::clone(&device) as Arc<Mutex<dyn VirtioDevice>>;
    let (machine, result) = Machine::restored(shared, memory, &transport, &rings);
    result.unwrap();
    let mut guest = Guest::of(machine, device, host);
    guest.buffer = buffer;
    guest
}

#[test]
fn streams_go_on_in_a_device_built_anew() {
    let mut guest = Guest::new();
    let listener = guest.host.listen(9).unwrap();
    let (mut socket, mut stream) = guest.accept(1025, 1 << 16);
    let mut numbers = Numbers(31);
    let (to_host, to_guest) = (numbers.bytes(3 << 20), numbers.bytes(3 << 20));
    let (mut written, mut given) = (0, 0);
    let (mut at_host, mut at_guest) = (Vec::new(), Vec::new());
    for round in 0_usize.. {
        if at_host.len() == to_host.len() && at_guest.len() == to_guest.len() {
            break;
        }
        // The guest writes more than the host reads, so that bytes are pending whenever the device is saved.
        written += guest.write(&mut socket, &to_host[written..]);
        given += write_some(&mut stream, &to_guest[given..(given + 50_000).min(to_guest.len())]);
        at_host.extend(read_some(&mut stream, 30_000));
        if round % 10 == 5 {
            // Packets that the guest has not looked at, bytes in the sockets, and a transmit queue not yet seen.
            let len = (to_host.len() - written).min(1000).min(socket.credit() as usize);
            let packet = socket.packet(RW).with_payload(&to_host[written..written + len]);
            guest.queue(&packet.bytes());
            socket.sent += len as u32;
            written += len;
            let saved = save(&guest);
            let host = guest.host.clone();
            guest = rebuild(guest, host, CID, saved);
        }
        guest.deliver(&mut socket);
        at_guest.extend(socket.read(40_000));
        let update = socket.packet(CREDIT_UPDATE);
        guest.send(&update);
        assert!(round < 10_000, "stuck at {} and {} bytes", at_host.len(), at_guest.len());
    }
    assert!(at_host == to_host && at_guest == to_guest);
    guest.send(&Packet::new(50, 9, REQUEST));
    assert!(listener.accept(Some(SOON)).is_ok(), "the listener lives on");
}

#[test]
fn a_call_in_flight_survives_the_rebuilding() {
    let mut guest = Guest::new();
    let call = guest.dial(1025, SOON);
    let request = guest.next();
    let (host, saved) = (guest.host.clone(), save(&guest));
    let mut guest = rebuild(guest, host, CID, saved);
    guest.send(&Packet::new(1025, request.src_port, RESPONSE));
    let mut stream = call.join().unwrap().unwrap();
    stream.write_all(b"hello").unwrap();
    assert_eq!(guest.next().payload, b"hello");
}

#[test]
fn a_call_made_between_two_devices_is_answered() {
    let guest = Guest::new();
    let (host, saved) = (guest.host.clone(), save(&guest));
    let call = guest.dial(1025, SOON);
    std::thread::sleep(std::time::Duration::from_millis(10));
    let mut guest = rebuild(guest, host, CID, saved);
    let request = guest.next();
    guest.send(&Packet::new(1025, request.src_port, RESPONSE));
    assert!(call.join().unwrap().is_ok());
}

#[test]
fn a_half_closed_and_a_lingering_stream_keep_their_state() {
    let mut guest = Guest::new();
    let (mut half, mut half_stream) = guest.accept(1025, 1 << 16);
    let (mut gone, mut gone_stream) = guest.accept(1026, 1 << 16);
    let end = Packet { flags: 2, ..half.packet(SHUTDOWN) };
    guest.send(&end);
    let data = Numbers(5).bytes(2 << 20);
    let mut written = 0;
    while gone.credit() > 0 {
        written += guest.write(&mut gone, &data[written..]);
        guest.deliver(&mut gone);
    }
    let reset = gone.packet(RST);
    guest.send(&reset);
    let (host, saved) = (guest.host.clone(), save(&guest));
    let mut guest = rebuild(guest, host, CID, saved);
    assert_eq!(read_all(&mut half_stream), b"");
    half_stream.write_all(b"still").unwrap();
    guest.deliver(&mut half);
    assert_eq!(half.read(10), b"still");
    let reader = std::thread::spawn(move || read_all(&mut gone_stream));
    guest.wait(|_| reader.is_finished().then_some(()));
    assert!(reader.join().unwrap() == data[..written]);
}

#[test]
fn a_template_without_streams_resets_the_transport() {
    let mut guest = Guest::new();
    let (mut socket, stream) = guest.accept(1025, 1 << 16);
    guest.machine.describe(guest.machine.rings[EVENT].desc, 0, writable(WRITABLE + 0x30_0000, 8));
    guest.machine.put(WRITABLE + 0x30_0000, &[0xaa; 8]);
    guest.machine.offer(EVENT, 0);
    let mut saved = save(&guest);
    saved.streams.clear();
    drop(stream);
    let mut guest = rebuild(guest, VsockHost::new().unwrap(), CID, saved);
    guest.run();
    assert_eq!(guest.machine.used(EVENT), [(0, 4)]);
    assert_eq!(guest.machine.take(WRITABLE + 0x30_0000, 5), [0, 0, 0, 0, 0xaa], "TRANSPORT_RESET");
    assert!(guest.machine.interrupted());
    guest.write(&mut socket, b"who is there");
    assert_eq!(guest.operations(), [RST]);
    let (mut socket, mut stream) = guest.accept(1025, 1 << 16);
    guest.write(&mut socket, b"the host");
    assert_eq!(read_some(&mut stream, 20), b"the host");
}

#[test]
fn the_transport_reset_waits_for_a_buffer() {
    let mut guest = Guest::new();
    let (_socket, _stream) = guest.accept(1025, 1 << 16);
    let mut saved = save(&guest);
    saved.streams.clear();
    let mut guest = rebuild(guest, VsockHost::new().unwrap(), CID, saved);
    guest.run();
    guest.machine.describe(guest.machine.rings[EVENT].desc, 0, writable(WRITABLE + 0x30_0000, 8));
    guest.machine.offer(EVENT, 0);
    guest.machine.kick(EVENT);
    guest.run();
    assert_eq!(guest.machine.used(EVENT), [(0, 4)]);
}

#[test]
fn a_clone_with_another_cid_keeps_no_stream() {
    let mut guest = Guest::new();
    let (_socket, mut stream) = guest.accept(1025, 1 << 16);
    guest.machine.describe(guest.machine.rings[EVENT].desc, 0, writable(WRITABLE + 0x30_0000, 8));
    guest.machine.offer(EVENT, 0);
    let saved = save(&guest);
    let mut guest = rebuild(guest, VsockHost::new().unwrap(), 77, saved);
    guest.run();
    assert_eq!(guest.machine.used(EVENT).len(), 1);
    assert_eq!(read_all(&mut stream), b"");
    let mut cid = [0; 4];
    guest.machine.transport.read(crate::common::CONFIG, &mut cid);
    assert_eq!(u32::from_le_bytes(cid), 77);
}

#[test]
fn a_stream_that_is_missing_is_reset_alone() {
    let mut guest = Guest::new();
    let (mut first, first_stream) = guest.accept(1025, 1 << 16);
    let (mut second, mut second_stream) = guest.accept(1026, 1 << 16);
    let (host, mut saved) = (guest.host.clone(), save(&guest));
    let state: VsockState = postcard::from_bytes(&saved.bytes).unwrap();
    let lost = state.streams().find(|(_, key)| key.guest_port == 1025).unwrap().0;
    saved.streams.retain(|(id, _)| *id != lost);
    drop(first_stream);
    let mut guest = rebuild(guest, host, CID, saved);
    guest.deliver(&mut first);
    assert!(first.reset);
    guest.write(&mut second, b"on");
    assert_eq!(read_some(&mut second_stream, 10), b"on");
}

#[test]
fn a_handle_has_one_device_at_a_time() {
    let guest = Guest::new();
    let state = guest.device.lock().unwrap().save();
    let second = Vsock::restore(&guest.host, CID, &state, Vec::new());
    assert!(matches!(second, Err(RestoreError::Host(error)) if error.kind() == std::io::ErrorKind::AlreadyExists));
}

#[test]
fn the_same_device_has_the_same_bytes() {
    let mut guest = Guest::new();
    let _streams: Vec<_> = (0..20).map(|port| guest.accept(port, 100)).collect();
    let device = guest.device.lock().unwrap();
    assert_eq!(postcard::to_stdvec(&device.save()).unwrap(), postcard::to_stdvec(&device.save()).unwrap());
}

#[test]
fn states_with_flipped_bits_are_refused_or_harmless() {
    let mut guest = Guest::new();
    let (mut socket, _stream) = guest.accept(1025, 1 << 16);
    let (_other, _other_stream) = guest.accept(1026, 1 << 16);
    while socket.credit() > 0 {
        guest.write(&mut socket, &[1; 1 << 16]);
        guest.deliver(&mut socket);
    }
    let bytes = {
        let device = guest.device.lock().unwrap();
        postcard::to_stdvec(&device.save()).unwrap()
    };
    let mut numbers = Numbers(1);
    let (mut refused, mut built) = (0, 0);
    for _ in 0..500 {
        let mut bytes = bytes.clone();
        // Most bytes are payload; the interesting ones are in front and behind.
        let at = if numbers.below(2) == 0 { numbers.below(80) } else { bytes.len() - 1 - numbers.below(80) };
        bytes[at] ^= 1 << numbers.below(8);
        let Ok(state) = postcard::from_bytes::<VsockState>(&bytes) else {
            refused += 1;
            continue;
        };
        let host = VsockHost::new().unwrap();
        // A stream for whatever the state calls the first connection.
        let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let streams = state.streams().take(1).map(|(id, _)| (id, OwnedFd::from(ours.try_clone().unwrap())));
        match Vsock::restore(&host, CID, &state, streams.collect()) {
            Ok(device) => {
                built += 1;
                let mut guest = Guest::of(Machine::new(Arc::new(Mutex::new(device))), Arc::clone(&guest.device), host);
                guest.start();
                guest.machine.rings[RX].next = 0;
                guest.post(8);
                guest.packets();
                assert_eq!(guest.machine.get(STATUS) & 15, 15);
            }
            Err(_) => refused += 1,
        }
    }
    println!("{refused} states refused, {built} built");
    assert!(refused > 50 && built > 50);
}
