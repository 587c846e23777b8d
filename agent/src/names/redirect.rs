//! Puts another port in the place of a name server's: BPF programs of the control group of those who ask, which change
//! the address in connect(2) and sendto(2), and change it back in recvfrom(2) and getpeername(2).
//!
//! Only in the guest's own network namespace: containers inside the guest's containers have one with a loopback of
//! their own.

use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::Path;

use katavm_protocol::names::PORT;

use crate::bpf::{
    self, CALL, EXIT, Instruction, JUMP_NOT_EQUAL, JUMP_NOT_EQUAL_REGISTER, JUMP_NOT_EQUAL_WORD, LOAD_WORD, MOVE,
    MOVE_REGISTER, STORE_WORD_REGISTER, instruction,
};

/// As long as these are open, a process of the group that speaks to port 53 of `address` speaks to `port` of it.
///
/// # Errors
/// That the kernel lacks what it takes.
pub fn redirect(cgroup: &Path, address: Ipv4Addr, port: u16) -> io::Result<Vec<OwnedFd>> {
    let cgroup = File::open(cgroup)?;
    let there = [bpf::AT_CONNECT4, bpf::AT_SENDMSG4].map(|at| (at, PORT, port));
    let back = [bpf::AT_RECVMSG4, bpf::AT_GETPEERNAME4].map(|at| (at, port, PORT));
    let all = there.into_iter().chain(back);
    all.map(|(at, from, to)| {
        let program = bpf::load(bpf::sock_addr(at), &compile(address, from, to))?;
        bpf::link(&program, &cgroup, at)
    })
    .collect()
}

/// The program (linux/bpf.h: struct bpf_sock_addr). Addresses and ports are in it as in packets.
fn compile(address: Ipv4Addr, from: u16, to: u16) -> Vec<Instruction> {
    const ADDRESS: i16 = 4;
    const PORT: i16 = 24;
    const GET_NETNS_COOKIE: u32 = 122;
    let port = |port: u16| u32::from(port.to_be());
    vec![
        instruction(MOVE_REGISTER, 6, 1, 0, 0),
        instruction(LOAD_WORD, 2, 6, ADDRESS, 0),
        instruction(JUMP_NOT_EQUAL_WORD, 2, 0, 10, u32::from_ne_bytes(address.octets())),
        instruction(LOAD_WORD, 2, 6, PORT, 0),
        instruction(JUMP_NOT_EQUAL, 2, 0, 8, port(from)),
        // The socket's namespace, and the first one.
        instruction(MOVE_REGISTER, 1, 6, 0, 0),
        instruction(CALL, 0, 0, 0, GET_NETNS_COOKIE),
        instruction(MOVE_REGISTER, 7, 0, 0, 0),
        instruction(MOVE, 1, 0, 0, 0),
        instruction(CALL, 0, 0, 0, GET_NETNS_COOKIE),
        instruction(JUMP_NOT_EQUAL_REGISTER, 0, 7, 2, 0),
        instruction(MOVE, 2, 0, 0, port(to)),
        instruction(STORE_WORD_REGISTER, 6, 2, PORT, 0),
        instruction(MOVE, 0, 0, 0, 1),
        instruction(EXIT, 0, 0, 0, 0),
    ]
}
