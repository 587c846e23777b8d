//! The register window and the configuration space, misused.

use crate::Outcome::{self, Alive};
use crate::common::*;
use crate::subject::Subject;

const WIDTHS: [usize; 8] = [0, 1, 2, 3, 4, 5, 8, 16];

fn config_of(machine: &Machine) -> Vec<u8> {
    machine.transport.device().lock().unwrap().config().to_vec()
}

pub fn config_read_out_of_bounds(_: &dyn Subject, machine: &mut Machine) -> Outcome {
    let config = config_of(machine);
    let end = CONFIG + config.len() as u64;
    for start in [end, end + 1, 0xffc, 0xfff, 0x1000, 0x1001, u64::MAX - 3, u64::MAX] {
        for width in WIDTHS {
            let mut bytes = vec![0; width];
            machine.transport.read(start, &mut bytes);
            assert!(bytes.iter().all(|byte| *byte == 0xff), "{width} at {start:#x}");
        }
    }
    // Partly inside is not inside.
    for back in 1..8.min(config.len() as u64 + 1) {
        let mut bytes = vec![0; back as usize + 1];
        machine.transport.read(end - back, &mut bytes);
        assert!(bytes.iter().all(|byte| *byte == 0xff));
        let mut bytes = vec![0; back as usize];
        machine.transport.read(end - back, &mut bytes);
        assert_eq!(bytes, config[config.len() - back as usize..]);
    }
    Alive
}

pub fn config_write_out_of_bounds(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    let config = config_of(machine);
    let end = CONFIG + config.len() as u64;
    for start in [end, end + 1, 0xffc, 0xfff, 0x1000, u64::MAX - 3, u64::MAX] {
        for width in WIDTHS {
            machine.transport.write(start, &vec![0x5a; width]);
        }
    }
    for back in 1..8.min(config.len() as u64 + 1) {
        machine.transport.write(end - back, &vec![0x5a; back as usize + 1]);
    }
    assert_eq!(config_of(machine), config);
    subject.good(machine);
    Alive
}

pub fn config_written_everywhere(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    let len = config_of(machine).len() as u64;
    for at in 0..len {
        for width in WIDTHS {
            machine.transport.write(CONFIG + at, &vec![0xff; width]);
        }
    }
    assert_eq!(config_of(machine).len() as u64, len);
    machine.run();
    subject.good(machine);
    Alive
}

pub fn odd_reads(_: &dyn Subject, machine: &mut Machine) -> Outcome {
    for offset in 0..CONFIG {
        for width in WIDTHS.into_iter().filter(|width| *width != 4 || offset % 4 != 0) {
            let mut bytes = vec![0; width];
            machine.transport.read(offset, &mut bytes);
            assert!(bytes.iter().all(|byte| *byte == 0xff), "{width} at {offset:#x}");
        }
    }
    Alive
}

pub fn odd_writes(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    let before = machine.transport.save();
    for offset in 0..CONFIG {
        for width in WIDTHS.into_iter().filter(|width| *width != 4 || offset % 4 != 0) {
            machine.transport.write(offset, &vec![0; width]);
            machine.transport.write(offset, &vec![0xff; width]);
        }
    }
    assert_eq!(machine.transport.save(), before, "no register heard anything");
    subject.good(machine);
    Alive
}

pub fn unmapped_reads_are_ones(_: &dyn Subject, machine: &mut Machine) -> Outcome {
    const READABLE: [u64; 14] = [0x0, 0x4, 0x8, 0xc, 0x10, 0x34, 0x44, 0x60, 0x70, 0xb0, 0xb4, 0xb8, 0xbc, 0xfc];
    for offset in (0..CONFIG).step_by(4).filter(|offset| !READABLE.contains(offset)) {
        assert_eq!(machine.get(offset), u32::MAX, "{offset:#x}");
    }
    Alive
}

pub fn read_only_registers(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    let fixed = [0x0, 0x4, 0x8, 0xc, 0x34, 0x60, 0xfc];
    let before = fixed.map(|offset| machine.get(offset));
    assert_eq!(&before[..2], [0x7472_6976, 2], "\"virt\", version 2");
    for offset in fixed {
        machine.set(offset, 0);
        machine.set(offset, u32::MAX);
    }
    assert_eq!(fixed.map(|offset| machine.get(offset)), before);
    subject.good(machine);
    Alive
}

pub fn any_value_anywhere(_: &dyn Subject, machine: &mut Machine) -> Outcome {
    for status in [0, 1, 3, 11, 15] {
        for offset in (0..CONFIG + 0x100).step_by(4) {
            for value in [0, 1, 2, 3, 0x7fff_ffff, 0x8000_0000, u32::MAX] {
                if offset != STATUS {
                    machine.set(offset, value);
                    machine.get(offset);
                }
            }
        }
        machine.set(STATUS, status);
        machine.run();
    }
    machine.set(STATUS, 0);
    Outcome::Stopped
}

pub fn interrupt_status(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    assert_eq!(machine.get(INTERRUPT_STATUS), 0);
    subject.good(machine);
    assert_eq!(machine.get(INTERRUPT_STATUS), 1, "a used buffer");
    machine.set(INTERRUPT_ACK, 2 | 0xffff_fff0);
    assert_eq!(machine.get(INTERRUPT_STATUS), 1, "acknowledged was something else");
    machine.set(INTERRUPT_ACK, 1);
    assert_eq!(machine.get(INTERRUPT_STATUS), 0);
    machine.set(INTERRUPT_STATUS, 3);
    assert_eq!(machine.get(INTERRUPT_STATUS), 0, "the register is read-only");
    machine.set(INTERRUPT_ACK, u32::MAX);
    subject.good(machine);
    Alive
}

pub fn no_interrupt_where_unwanted(subject: &dyn Subject, machine: &mut Machine) -> Outcome {
    // VIRTQ_AVAIL_F_NO_INTERRUPT.
    let queue = subject.queue();
    machine.put(machine.rings[queue].avail, &1u16.to_le_bytes());
    machine.interrupted();
    let (request, room) = subject.request();
    let (len, answer) = machine.exchange(queue, &request, room);
    subject.check(len.expect("served"), &answer);
    assert!(!machine.interrupted());
    machine.put(machine.rings[queue].avail, &0u16.to_le_bytes());
    subject.good(machine);
    Alive
}

pub fn shared_memory_that_is_not_there(_: &dyn Subject, machine: &mut Machine) -> Outcome {
    for id in [1, 0xff, 0x100, u32::MAX] {
        machine.set(0xac, id);
        assert_eq!([0xb0, 0xb4, 0xb8, 0xbc].map(|offset| machine.get(offset)), [u32::MAX; 4], "region {id}");
    }
    Alive
}
