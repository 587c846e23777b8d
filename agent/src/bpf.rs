//! Small BPF programs of control groups: instructions, loading, attaching (bpf(2), Documentation/bpf/).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

/// An instruction (linux/bpf.h: struct bpf_insn), in its 64 bits.
pub type Instruction = u64;

// Operations: class | source | code.
/// destination = the 32 bits at source + offset.
pub const LOAD_WORD: u8 = 0x61;
/// The 64 bits at destination + offset = immediate.
pub const STORE_LONG: u8 = 0x7a;
/// The 32 bits at destination + offset = source.
pub const STORE_WORD_REGISTER: u8 = 0x63;
/// Of 32 bits.
pub const AND: u8 = 0x54;
/// Of 32 bits.
pub const SHIFT_RIGHT: u8 = 0x74;
/// destination += immediate.
pub const ADD: u8 = 0x07;
/// destination = immediate.
pub const MOVE: u8 = 0xb7;
/// destination = source.
pub const MOVE_REGISTER: u8 = 0xbf;
/// If destination is the immediate.
pub const JUMP_EQUAL: u8 = 0x15;
/// If it is not.
pub const JUMP_NOT_EQUAL: u8 = 0x55;
/// If the lower 32 bits of it are not.
pub const JUMP_NOT_EQUAL_WORD: u8 = 0x56;
/// If destination is not source.
pub const JUMP_NOT_EQUAL_REGISTER: u8 = 0x5d;
/// Always.
pub const JUMP: u8 = 0x05;
/// A helper of the kernel, by its number in the immediate: arguments in registers 1 to 5, the result in 0.
pub const CALL: u8 = 0x85;
/// The verdict is in register 0.
pub const EXIT: u8 = 0x95;

/// The register that points to the end of the stack.
pub const STACK: u8 = 10;

// Kinds of programs (BPF_PROG_TYPE_*).
/// BPF_PROG_TYPE_CGROUP_DEVICE.
pub const CGROUP_DEVICE: Kind = Kind { program: 15, attach: 0 };
/// BPF_PROG_TYPE_SOCK_OPS.
pub const SOCK_OPS: Kind = Kind { program: 13, attach: 0 };

// Where programs are attached (BPF_CGROUP_*).
/// BPF_CGROUP_DEVICE.
pub const AT_DEVICE: u32 = 6;
/// BPF_CGROUP_SOCK_OPS.
pub const AT_SOCK_OPS: u32 = 3;

/// BPF_CGROUP_INET4_CONNECT.
pub const AT_CONNECT4: u32 = 10;
/// BPF_CGROUP_UDP4_SENDMSG.
pub const AT_SENDMSG4: u32 = 14;
/// BPF_CGROUP_UDP4_RECVMSG.
pub const AT_RECVMSG4: u32 = 19;
/// BPF_CGROUP_INET4_GETPEERNAME.
pub const AT_GETPEERNAME4: u32 = 29;

/// BPF_PROG_TYPE_CGROUP_SOCK_ADDR, for one of the places.
pub const fn sock_addr(at: u32) -> Kind {
    Kind { program: 18, attach: at }
}

/// What a program is for.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    program: u32,
    /// Where it is going to be attached, for kinds that the verifier has to know it of.
    attach: u32,
}

/// One instruction.
pub fn instruction(operation: u8, destination: u8, source: u8, offset: i16, immediate: u32) -> Instruction {
    let registers = destination | (source << 4);
    u64::from(operation) | (u64::from(registers) << 8) | (u64::from(offset as u16) << 16) | (u64::from(immediate) << 32)
}

/// The two instructions that load a map into a register (BPF_PSEUDO_MAP_FD).
pub fn load_map(register: u8, map: &OwnedFd) -> [Instruction; 2] {
    [instruction(0x18, register, 1, 0, map.as_raw_fd().cast_unsigned()), 0]
}

/// The head of bpf(2)'s argument for BPF_PROG_LOAD.
#[repr(C)]
#[derive(Default)]
struct Load {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach: u32,
}

/// bpf(2)'s argument for BPF_PROG_ATTACH.
#[repr(C)]
struct Attach {
    target: i32,
    program: i32,
    kind: u32,
    flags: u32,
}

/// The head of bpf(2)'s argument for BPF_LINK_CREATE.
#[repr(C)]
struct Link {
    program: i32,
    target: i32,
    kind: u32,
    flags: u32,
}

/// The head of bpf(2)'s argument for BPF_MAP_CREATE.
#[repr(C)]
struct Map {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

const BPF_MAP_CREATE: i32 = 0;
const BPF_PROG_LOAD: i32 = 5;
const BPF_PROG_ATTACH: i32 = 8;
const BPF_LINK_CREATE: i32 = 28;
const BPF_MAP_TYPE_RINGBUF: u32 = 27;

/// Loads a program.
///
/// # Errors
/// `Unsupported` when the kernel lacks CONFIG_CGROUP_BPF; those of bpf(2).
pub fn load(kind: Kind, program: &[Instruction]) -> io::Result<OwnedFd> {
    let argument = Load {
        kind: kind.program,
        instruction_count: u32::try_from(program.len()).map_err(io::Error::other)?,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        attach: kind.attach,
        ..Default::default()
    };
    // SAFETY: what `argument` points to lives throughout the call.
    unsafe { bpf(BPF_PROG_LOAD, &argument) }.map(owned)
}

/// Attaches a program to a control group for as long as that is there.
///
/// # Errors
/// As [`load`].
pub fn attach(program: &OwnedFd, cgroup: &File, at: u32) -> io::Result<()> {
    let argument = Attach { target: cgroup.as_raw_fd(), program: program.as_raw_fd(), kind: at, flags: 0 };
    // SAFETY: `argument` points to nothing.
    unsafe { bpf(BPF_PROG_ATTACH, &argument) }.map(drop)
}

/// Attaches a program to a control group, beside others, for as long as the descriptor is open.
///
/// # Errors
/// As [`load`].
pub fn link(program: &OwnedFd, cgroup: &File, at: u32) -> io::Result<OwnedFd> {
    let argument = Link { program: program.as_raw_fd(), target: cgroup.as_raw_fd(), kind: at, flags: 0 };
    // SAFETY: `argument` points to nothing.
    unsafe { bpf(BPF_LINK_CREATE, &argument) }.map(owned)
}

/// Makes a ring buffer of so many bytes, a power of two of whole pages.
///
/// # Errors
/// As [`load`].
pub fn ring(size: u32) -> io::Result<OwnedFd> {
    let argument = Map { kind: BPF_MAP_TYPE_RINGBUF, key_size: 0, value_size: 0, max_entries: size };
    // SAFETY: `argument` points to nothing.
    unsafe { bpf(BPF_MAP_CREATE, &argument) }.map(owned)
}

/// # Safety
/// What `argument`, which is that of `command`, points to must be what that command makes of it.
unsafe fn bpf<T>(command: i32, argument: &T) -> io::Result<i32> {
    // SAFETY: `argument` lives throughout the call, and its length is passed; the rest is the caller's promise.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw const *argument, size_of::<T>()) };
    Ok(Errno::result(result).map_err(unsupported)? as i32)
}

fn owned(fd: i32) -> OwnedFd {
    // SAFETY: it was just made by the command, and nothing else owns it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn unsupported(error: Errno) -> io::Error {
    match error {
        Errno::ENOSYS | Errno::EINVAL => {
            let text = format!("the kernel lacks CONFIG_CGROUP_BPF or CONFIG_BPF_SYSCALL ({error})");
            io::Error::new(io::ErrorKind::Unsupported, text)
        }
        error => error.into(),
    }
}
