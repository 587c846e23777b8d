//! A real tap in a network namespace that this test has to itself.

use std::io::{self, Write as _};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;

use katavm_devices::net::{NetConfig, Offloads, Tap};

use crate::common::*;
use crate::driver::*;

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const IFF_TAP: i16 = 0x0002;
const IFF_NO_PI: i16 = 0x1000;
const IFF_VNET_HDR: i16 = 0x4000;

/// Runs `test` on a thread in a network namespace of its own, or says why it cannot.
fn in_namespace(name: &str, test: fn()) {
    let run = move || {
        // SAFETY: unshare takes no memory; only this thread, which ends with the test, changes its namespace.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            return Err(format!("no network namespace can be made: {}", io::Error::last_os_error()));
        }
        open_tap("probe0", IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)
            .map_err(|error| format!("no tap can be made: {error}"))?;
        let ip = Command::new("ip").args(["link", "show"]).output().map_err(|error| format!("no ip: {error}"))?;
        assert!(ip.status.success());
        test();
        Ok(())
    };
    if let Err(why) = std::thread::spawn(run).join().unwrap() {
        // Past the harness' capture, so that it is seen.
        let _ = writeln!(io::stderr(), "SKIPPED {name}: {why}");
    }
}

fn open_tap(name: &str, flags: i16) -> io::Result<OwnedFd> {
    let fd: OwnedFd = std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun")?.into();
    // SAFETY: an all-zero ifreq is a valid value of it: plain integers and byte arrays.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name.iter_mut().zip(name.bytes()).for_each(|(to, from)| *to = from.cast_signed());
    request.ifr_ifru.ifru_flags = flags;
    // SAFETY: TUNSETIFF reads and writes one ifreq.
    match unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETIFF, &raw mut request) } {
        0 => Ok(fd),
        _ => Err(io::Error::last_os_error()),
    }
}

fn ip(arguments: &str) {
    let done = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(done.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&done.stderr));
}

/// A packet socket on the interface `name`: the host's side of the tap.
fn packet_socket(name: &str) -> OwnedFd {
    const ETH_P_ALL: u16 = 3;
    let protocol = libc::c_int::from(ETH_P_ALL.to_be());
    // SAFETY: socket takes numbers.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, protocol) };
    assert!(fd >= 0, "{}", io::Error::last_os_error());
    // SAFETY: the descriptor is new and nobody else's.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let name = std::ffi::CString::new(name).unwrap();
    // SAFETY: all zeroes is a valid sockaddr_ll.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = ETH_P_ALL.to_be();
    // SAFETY: the name is a C string.
    address.sll_ifindex = unsafe { libc::if_nametoindex(name.as_ptr()) }.cast_signed();
    let len = size_of::<libc::sockaddr_ll>() as u32;
    // SAFETY: the address lives throughout the call, and `len` is its size.
    let bound = unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), len) };
    assert_eq!(bound, 0, "{}", io::Error::last_os_error());
    fd
}

/// A frame of an EtherType that nobody speaks.
fn frame(seed: u8) -> Vec<u8> {
    let mut frame = packet(200, seed);
    frame[12..24].copy_from_slice(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0xaa, 0xbb, 0xcc, 0xdd, 0xee]);
    frame[24..26].copy_from_slice(&[0x88, 0xb5]);
    frame
}

const MANY: u16 = 200;
const ROOM: u32 = 1536;

fn both_ways() {
    let tap = Tap::new(open_tap("tap0", IFF_TAP | IFF_NO_PI | IFF_VNET_HDR).unwrap()).unwrap();
    let mut driver = Driver::new();
    driver.net.lock().unwrap().attach(tap).unwrap();
    ip("link set tap0 up");
    let host = packet_socket("tap0");
    driver.offer_rooms(0..MANY, ROOM);
    // What the host's kernel says by itself on a new link comes besides.
    rustix::io::write(&host, &frame(1)[12..]).unwrap();
    let all = driver.received(ROOM);
    assert!(all.iter().any(|(_, bytes)| *bytes == in_buffers(frame(1), 1)), "{all:?}");
    assert_eq!(driver.machine.exchange(TX, &frame(2), 0).0, Some(0));
    let mut bytes = [0; 2000];
    loop {
        let len = rustix::io::read(&host, &mut bytes).unwrap();
        if bytes[..len] == frame(2)[12..] {
            break;
        }
    }
    // A header without sense is refused by the kernel, and the packet lost; the next one is fine.
    let mut nonsense = frame(3);
    nonsense[..10].copy_from_slice(&[1, 0x41, 0xff, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    assert_eq!(driver.machine.exchange(TX, &nonsense, 0).0, Some(0));
    assert_eq!(driver.machine.exchange(TX, &frame(4), 0).0, Some(0));
    loop {
        let len = rustix::io::read(&host, &mut bytes).unwrap();
        assert!(bytes[..len] != frame(3)[12..]);
        if bytes[..len] == frame(4)[12..] {
            break;
        }
    }
}

#[test]
fn packets_pass_a_tap_both_ways() {
    in_namespace("packets_pass_a_tap_both_ways", both_ways);
}

fn too_small() {
    let tap = Tap::new(open_tap("tap0", IFF_TAP | IFF_NO_PI | IFF_VNET_HDR).unwrap()).unwrap();
    let mut driver = Driver::with(settings(), !(F_EVENT_IDX | F_MRG_RXBUF));
    driver.net.lock().unwrap().attach(tap).unwrap();
    ip("link set tap0 up");
    let host = packet_socket("tap0");
    driver.offer_rooms(0..64, 150);
    rustix::io::write(&host, &frame(1)[12..]).unwrap();
    rustix::io::write(&host, &frame(2)[12..100]).unwrap();
    let all = driver.received(150);
    assert!(!all.iter().any(|(_, bytes)| bytes[12..] == frame(1)[12..150]), "a piece of a packet is none");
    assert!(all.iter().any(|(_, bytes)| bytes[12..] == frame(2)[12..100]), "{all:?}");
}

#[test]
fn a_packet_that_does_not_fit_is_dropped() {
    in_namespace("a_packet_that_does_not_fit_is_dropped", too_small);
}

fn deleted() {
    let tap = Tap::new(open_tap("tap0", IFF_TAP | IFF_NO_PI | IFF_VNET_HDR).unwrap()).unwrap();
    let mut driver = Driver::new();
    driver.net.lock().unwrap().attach(tap).unwrap();
    driver.offer_rooms(0..MANY, ROOM);
    ip("link set tap0 up");
    driver.machine.run();
    assert_eq!(driver.link_status(), 1);
    ip("link del tap0");
    driver.machine.run();
    assert_eq!(driver.link_status(), 0);
    assert_eq!(driver.machine.exchange(TX, &frame(1), 0).0, Some(0), "the guest goes on");
}

#[test]
fn a_deleted_tap_takes_the_link_down() {
    in_namespace("a_deleted_tap_takes_the_link_down", deleted);
}

fn wrong_flags() {
    let error = Tap::new(open_tap("tap0", IFF_TAP | IFF_NO_PI).unwrap()).unwrap_err().to_string();
    assert!(error.contains("0x1002"), "{error}");
}

#[test]
fn a_tap_without_headers_is_refused() {
    in_namespace("a_tap_without_headers_is_refused", wrong_flags);
}

const IFF_MULTI_QUEUE: i16 = 0x0100;

/// A UDP packet over IPv4 from a port of its own, by which the kernel chooses a queue.
fn datagram(port: u16) -> Vec<u8> {
    let mut frame = frame(port as u8);
    frame[24..26].copy_from_slice(&[8, 0]);
    frame[26..46].copy_from_slice(&[0x45, 0, 0, 100, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame[46..48].copy_from_slice(&port.to_be_bytes());
    frame
}

fn several_queues() {
    let flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE;
    let taps = [(); 2].map(|()| Tap::new(open_tap("tap0", flags).unwrap()).unwrap());
    let mut driver = Driver::with(NetConfig { pairs: 2, offloads: Offloads::CSUM, ..settings() }, !F_EVENT_IDX);
    driver.net.lock().unwrap().attach_queues(taps).unwrap();
    ip("link set tap0 up");
    let host = packet_socket("tap0");
    for queue in [0, 2] {
        for head in 0..MANY {
            let address = (if queue == 0 { 32 << 20 } else { 36 << 20 }) + u64::from(head) * u64::from(ROOM);
            driver.machine.describe(driver.machine.rings[queue].desc, head, writable(address, ROOM));
            driver.machine.offer(queue, head);
        }
        driver.machine.kick(queue);
    }
    let came = |driver: &mut Driver| {
        driver.machine.used(0);
        driver.machine.used(2);
        for port in 5000..5032 {
            rustix::io::write(&host, &datagram(port)[12..]).unwrap();
        }
        driver.machine.run();
        [0, 2].map(|queue| driver.machine.used(queue).iter().filter(|(_, len)| *len == 212).count())
    };
    // One pair is in use: the kernel knows of no other queue.
    assert_eq!(came(&mut driver), [32, 0]);
    assert_eq!(driver.machine.exchange(4, &[4, 0, 2, 0], 1).1, [0]);
    let [first, second] = came(&mut driver);
    assert!(first + second == 32 && first > 0 && second > 0, "{first} and {second}");
    assert_eq!(driver.machine.exchange(4, &[4, 0, 1, 0], 1).1, [0]);
    assert_eq!(came(&mut driver), [32, 0]);
    assert_eq!(driver.link_status(), 1, "a queue that is switched off is no loss");
    assert_eq!(driver.machine.exchange(3, &frame(1), 0).0, None, "a pair that is not in use does nothing");
    ip("link del tap0");
    driver.machine.run();
    assert_eq!(driver.link_status(), 0);
}

#[test]
fn a_tap_may_have_several_queues() {
    in_namespace("a_tap_may_have_several_queues", several_queues);
}
