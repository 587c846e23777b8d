//! What no driver would send.

use std::fs;

use katavm_devices::fs::ExportOptions;

use crate::driver::{Guest, HIPRIO, Msg, REQUESTS, scratch, u32_at};

/// xorshift64*, the same in each run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
}

#[test]
fn malformed_requests() {
    let (_dir, path) = scratch();
    let mut guest = Guest::mount(&path, ExportOptions::default());
    let root = guest.root();
    let lookup = guest.request(1, root, &Msg::new().name("none"));
    let with_len = |len: u32| [&len.to_le_bytes(), &lookup[4..]].concat();
    let errno = |error: i32| (16, -error);
    let with_ext = |units: u16| [&lookup[..36], &units.to_le_bytes(), &lookup[38..]].concat();
    let rows = [
        ("empty", Vec::new(), 4096, (0, 0)),
        ("a header of 39 bytes", lookup[..39].to_vec(), 4096, (0, 0)),
        ("length of 0", with_len(0), 4096, errno(libc::EINVAL)),
        ("length of 39", with_len(39), 4096, errno(libc::EINVAL)),
        ("length beyond the buffers", with_len(1000), 4096, errno(libc::EINVAL)),
        ("length of 4 GiB - 1", with_len(u32::MAX), 4096, errno(libc::EINVAL)),
        ("extensions longer than the body", with_ext(1000), 4096, errno(libc::EINVAL)),
        ("no room for any reply", lookup.clone(), 0, (0, 0)),
        ("room for half a header", lookup.clone(), 8, (0, 0)),
        ("room for a header only", lookup.clone(), 16, errno(libc::EINVAL)),
        ("a well-formed one", lookup.clone(), 4096, errno(libc::ENOENT)),
    ];
    for (row, request, room, (len, error)) in rows {
        if request.is_empty() && room == 0 {
            continue;
        }
        let reply = guest.send(REQUESTS, &request, room);
        println!("malformed: {row}: {} bytes", reply.len());
        assert_eq!(reply.len(), len, "{row}");
        if len >= 16 {
            assert_eq!(u32_at(&reply, 4).cast_signed(), error, "{row}");
        }
    }
    for opcode in [0, 7, 19, 31, 34, 37, 40, 41, 48, 49, 53, 4096, 1_048_576, u32::MAX] {
        assert_eq!(guest.call(opcode, root, Msg::new().bytes(&[0; 100])).unwrap_err(), libc::ENOSYS, "opcode {opcode}");
    }
    assert_eq!(guest.call(39, root, Msg::new().bytes(&[0; 32])).unwrap_err(), libc::ENOTTY);
    // Nothing comes back for an INTERRUPT.
    let interrupt = guest.request(36, 0, &Msg::new().u64(2));
    assert!(guest.send(HIPRIO, &interrupt, 64).is_empty());
}

#[test]
fn short_bodies() {
    let (_dir, path) = scratch();
    fs::write(path.join("f"), "").unwrap();
    let mut guest = Guest::mount(&path, ExportOptions::default());
    let root = guest.root();
    for opcode in 0..60 {
        for len in 0..120 {
            if opcode == 38 {
                continue;
            }
            let request = guest.request(opcode, root, &Msg::new().bytes(&vec![0; len]));
            guest.send(REQUESTS, &request, 4096);
            assert_eq!(guest.status(), 15);
        }
    }
    assert!(guest.getattr(root).is_ok() || guest.lookup(1, "x").is_ok());
}

#[test]
fn random_requests() {
    let (_dir, path) = scratch();
    let export = path.join("export");
    fs::create_dir_all(export.join("d")).unwrap();
    fs::write(export.join("f"), "text").unwrap();
    fs::write(path.join("outside"), "secret").unwrap();
    let mut guest = Guest::mount(&export, ExportOptions::default());
    let mut random = Random(0x6b61_7461_766d_0001);
    let mut answered = 0;
    for round in 0..60_000 {
        if round % 500 == 0 {
            // The session may have been destroyed, nodes forgotten.
            let _already = guest.init(crate::driver::ALL_FLAGS);
            let root = guest.root();
            for name in ["f", "d"] {
                if let Ok(entry) = guest.lookup(root, name) {
                    let _either = guest.open(entry.node, libc::O_RDWR);
                    let _or = guest.opendir(entry.node);
                }
            }
        }
        let opcode = if random.below(20) == 0 { random.next() as u32 } else { random.below(54) as u32 };
        if opcode == 38 && random.below(50) != 0 {
            continue;
        }
        let node = if random.below(10) == 0 { random.next() } else { random.below(40) };
        let mut body = match random.below(4) {
            0 => {
                let len = random.below(200) as usize;
                random.bytes(len)
            }
            1 => vec![0; random.below(200) as usize],
            // Small numbers, where handles and nodes are.
            _ => (0..random.below(20)).flat_map(|_| random.below(12).to_le_bytes()).collect(),
        };
        if random.below(2) == 0 {
            let names: [&[u8]; 6] = [b"f\0", b"d\0", b"new\0", b"..\0", b"../outside\0", b"user.a\0"];
            body.extend(names[random.below(6) as usize]);
            if random.below(2) == 0 {
                body.extend(names[random.below(6) as usize]);
            }
        }
        let mut request = guest.request(opcode, node, &Msg(body));
        if random.below(10) == 0 {
            let at = random.below(40) as usize;
            request[at] = random.next() as u8;
        }
        let room = [0, 8, 16, 20, 200, 4096][random.below(6) as usize];
        let queue = random.below(8).min(1) as usize;
        answered += usize::from(!guest.send(queue, &request, room).is_empty());
        assert_eq!(guest.status(), 15, "round {round}");
    }
    assert!(answered > 20_000, "{answered}");
    assert_eq!(fs::read_to_string(path.join("outside")).unwrap(), "secret");
    assert_eq!(fs::read_dir(&path).unwrap().count(), 2, "nothing got out");
    let _already = guest.init(crate::driver::ALL_FLAGS);
    assert!(guest.lookup(1, "x").is_ok(), "still serving");
}
