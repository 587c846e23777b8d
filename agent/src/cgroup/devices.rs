//! Device rules on cgroup v2: there is no file for them, a BPF program of the group decides
//! (Documentation/admin-guide/cgroup-v2.rst, "Device controller").
//!
//! Rules apply in order and the last that matches decides, for each of read, write and mknod on its own. What no rule
//! matches is denied. As with runc, the devices that every container has are allowed last.

use std::fs::File;
use std::io;

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use super::Cgroup;
use crate::bpf::{
    self, AND, EXIT, Instruction, JUMP_EQUAL, JUMP_NOT_EQUAL, LOAD_WORD, MOVE, MOVE_REGISTER, SHIFT_RIGHT, instruction,
};

// linux/bpf.h: BPF_DEVCG_*
const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const ALL: u32 = MKNOD | READ | WRITE;
const BLOCK: u32 = 1;
const CHARACTER: u32 = 2;

/// One rule; `None` is every kind or number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<u32>,
    major: Option<u32>,
    minor: Option<u32>,
    access: u32,
}

/// null, zero, full, random, urandom, tty, console, ptmx, the pseudo terminals, and to make (not to use) any device.
const DEFAULTS: [(Option<u32>, Option<u32>, u32); 9] = [
    (Some(1), Some(3), ALL),
    (Some(1), Some(5), ALL),
    (Some(1), Some(7), ALL),
    (Some(1), Some(8), ALL),
    (Some(1), Some(9), ALL),
    (Some(5), Some(0), ALL),
    (Some(5), Some(1), ALL),
    (Some(5), Some(2), ALL),
    (Some(136), None, ALL),
];

/// Makes the rules of a specification, and the default ones, those of `cgroup` and of all groups below it.
///
/// # Errors
/// `Unsupported` when the kernel lacks CONFIG_CGROUP_BPF; those of bpf(2).
pub fn apply(cgroup: &Cgroup, rules: &[LinuxDeviceCgroup]) -> io::Result<()> {
    let program = bpf::load(bpf::CGROUP_DEVICE, &compile(&with_defaults(rules)))?;
    bpf::attach(&program, &File::open(cgroup.path())?, bpf::AT_DEVICE)
}

fn with_defaults(rules: &[LinuxDeviceCgroup]) -> Vec<Rule> {
    let mut all: Vec<Rule> = rules.iter().map(Rule::of).collect();
    let allow = |kind, major, minor, access| Rule { allow: true, kind: Some(kind), major, minor, access };
    all.extend([BLOCK, CHARACTER].map(|kind| allow(kind, None, None, MKNOD)));
    all.extend(DEFAULTS.map(|(major, minor, access)| allow(CHARACTER, major, minor, access)));
    all
}

impl Rule {
    fn of(rule: &LinuxDeviceCgroup) -> Self {
        // A negative number is a wildcard, as is an absent one.
        let number = |number: Option<i64>| number.and_then(|number| u32::try_from(number).ok());
        let kind = match rule.typ().unwrap_or_default() {
            LinuxDeviceType::B => Some(BLOCK),
            LinuxDeviceType::C | LinuxDeviceType::U => Some(CHARACTER),
            LinuxDeviceType::A | LinuxDeviceType::P => None,
        };
        let bit = |letter| match letter {
            'm' => MKNOD,
            'r' => READ,
            'w' => WRITE,
            _ => 0,
        };
        let access =
            rule.access().as_deref().map_or(ALL, |access| access.chars().map(bit).fold(0, |all, bit| all | bit));
        // A rule for all devices is for all of them, whatever numbers it names (devices.allow: "a").
        let numbered = |value| if kind.is_some() { number(value) } else { None };
        Self { allow: rule.allow(), kind, major: numbered(rule.major()), minor: numbered(rule.minor()), access }
    }
}

// Registers: 0 is the verdict, 1 the context.
const PENDING: u8 = 2;
const KIND: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 6;

/// The program. It keeps the kinds of access that no rule has decided yet, and asks the rules from the last to the first.
fn compile(rules: &[Rule]) -> Vec<Instruction> {
    // struct bpf_cgroup_dev_ctx: access << 16 | kind, major, minor.
    let mut program = vec![
        instruction(LOAD_WORD, PENDING, 1, 0, 0),
        instruction(MOVE_REGISTER, KIND, PENDING, 0, 0),
        instruction(AND, KIND, 0, 0, 0xffff),
        instruction(SHIFT_RIGHT, PENDING, 0, 0, 16),
        instruction(LOAD_WORD, MAJOR, 1, 4, 0),
        instruction(LOAD_WORD, MINOR, 1, 8, 0),
    ];
    for rule in rules.iter().rev() {
        let decide = if rule.allow {
            vec![
                instruction(AND, PENDING, 0, 0, !rule.access & ALL),
                instruction(JUMP_NOT_EQUAL, PENDING, 0, 2, 0),
                instruction(MOVE, 0, 0, 0, 1),
                instruction(EXIT, 0, 0, 0, 0),
            ]
        } else {
            vec![
                instruction(MOVE_REGISTER, SCRATCH, PENDING, 0, 0),
                instruction(AND, SCRATCH, 0, 0, rule.access),
                instruction(JUMP_EQUAL, SCRATCH, 0, 2, 0),
                instruction(MOVE, 0, 0, 0, 0),
                instruction(EXIT, 0, 0, 0, 0),
            ]
        };
        let wanted = [(KIND, rule.kind), (MAJOR, rule.major), (MINOR, rule.minor)];
        let wanted: Vec<_> = wanted.into_iter().filter_map(|(register, value)| Some((register, value?))).collect();
        for (index, (register, value)) in wanted.iter().enumerate() {
            // Past the tests that follow, and past the decision: at most two and five.
            let skip = wanted.len() - index - 1 + decide.len();
            program.push(instruction(JUMP_NOT_EQUAL, *register, 0, skip as i16, *value));
        }
        program.extend(decide);
    }
    program.extend([instruction(MOVE, 0, 0, 0, 0), instruction(EXIT, 0, 0, 0, 0)]);
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the program: the same few instructions that the compiler above uses, and no other.
    fn verdict(program: &[Instruction], access: u32, kind: u32, major: u32, minor: u32) -> bool {
        let context = [(access << 16) | kind, major, minor];
        let mut registers = [0u32; 7];
        let mut at = 0;
        loop {
            let word = program[at];
            let (operation, registers_byte) = (word as u8, (word >> 8) as u8);
            let (to, from) = (usize::from(registers_byte & 15), usize::from(registers_byte >> 4));
            let (offset, immediate) = ((word >> 16) as i16, (word >> 32) as u32);
            at += 1;
            match operation {
                LOAD_WORD => registers[to] = context[offset as usize / 4],
                AND => registers[to] &= immediate,
                SHIFT_RIGHT => registers[to] >>= immediate,
                MOVE => registers[to] = immediate,
                MOVE_REGISTER => registers[to] = registers[from],
                JUMP_EQUAL if registers[to] == immediate => at += offset as usize,
                JUMP_NOT_EQUAL if registers[to] != immediate => at += offset as usize,
                JUMP_EQUAL | JUMP_NOT_EQUAL => {}
                EXIT => return registers[0] == 1,
                other => panic!("operation {other:#x}"),
            }
        }
    }

    fn program(json: serde_json::Value) -> Vec<Instruction> {
        compile(&with_defaults(&serde_json::from_value::<Vec<LinuxDeviceCgroup>>(json).unwrap()))
    }

    #[test]
    fn what_no_rule_allows_is_denied() {
        for rules in [serde_json::json!([]), serde_json::json!([{"allow": false, "access": "rwm"}])] {
            let program = program(rules);
            assert!(verdict(&program, READ | WRITE, CHARACTER, 1, 3));
            assert!(verdict(&program, READ | WRITE, CHARACTER, 136, 7));
            assert!(verdict(&program, MKNOD, BLOCK, 8, 0));
            assert!(!verdict(&program, MKNOD | READ, BLOCK, 8, 0));
            assert!(!verdict(&program, READ, CHARACTER, 1, 1));
            assert!(!verdict(&program, READ, BLOCK, 1, 3));
        }
    }

    #[test]
    fn the_last_rule_that_matches_decides_for_each_access() {
        let program = program(serde_json::json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "b", "major": 8, "access": "rw"},
            {"allow": false, "type": "b", "major": 8, "minor": 1, "access": "w"},
            {"allow": true, "type": "c", "major": -1, "minor": 9, "access": "r"},
        ]));
        assert!(verdict(&program, READ | WRITE, BLOCK, 8, 0));
        assert!(verdict(&program, READ, BLOCK, 8, 1));
        assert!(!verdict(&program, READ | WRITE, BLOCK, 8, 1));
        assert!(!verdict(&program, READ, BLOCK, 9, 0));
        assert!(verdict(&program, READ, CHARACTER, 77, 9));
        assert!(!verdict(&program, WRITE, CHARACTER, 77, 9));
    }

    #[test]
    fn a_rule_for_all_devices_ignores_numbers() {
        let program = program(serde_json::json!([{"allow": true, "type": "a", "major": 3, "access": "rwm"}]));
        assert!(verdict(&program, ALL, BLOCK, 8, 0));
    }
}
