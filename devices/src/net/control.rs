//! The control queue (virtio 1.3, 5.1.6.5).

use std::io;

use log::debug;

use super::device::Net;
use super::layout::{F_CTRL_GUEST_OFFLOADS, F_MQ};
use super::offloads::Offloads;
use crate::virtio::queue::Buffers;

/// Commands before other devices of the event loop get their turn.
const TURN: usize = 16;

const CLASS_MQ: u8 = 4;
const MQ_VQ_PAIRS_SET: u8 = 0;
const CLASS_GUEST_OFFLOADS: u8 = 5;
const GUEST_OFFLOADS_SET: u8 = 0;

const OK: u8 = 0;
const ERR: u8 = 1;

/// A command that the driver may give, depending on what was negotiated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Command {
    /// So many pairs of queues are in use from now on.
    Pairs(u16),
    /// The driver takes these from now on, by feature bits.
    Offloads(u64),
}

impl Command {
    /// None for what is no command of a class that the device has: filters (5.1.6.5.1) for one, as the tap brings every
    /// frame and the driver sorts them out.
    fn read(request: &mut Buffers<'_>) -> io::Result<Option<Self>> {
        let [class, command] = request.read_obj::<[u8; 2]>()?;
        let read = match (class, command) {
            (CLASS_MQ, MQ_VQ_PAIRS_SET) => Self::Pairs(u16::from_le(request.read_obj()?)),
            (CLASS_GUEST_OFFLOADS, GUEST_OFFLOADS_SET) => Self::Offloads(u64::from_le(request.read_obj()?)),
            _ => return Ok(None),
        };
        Ok((request.remaining() == 0).then_some(read))
    }
}

impl Net {
    /// Does what the driver commands.
    pub(super) fn obey(&mut self) {
        let Some(memory) = self.control.memory() else { return };
        self.control.disable_kicks(0);
        for _ in 0..TURN {
            let Some(chain) = self.control.pop(0) else {
                if self.control.enable_kicks(0) {
                    continue;
                }
                return self.control.notify(0);
            };
            let answer = match Command::read(&mut chain.reader(&memory)) {
                Ok(Some(command)) => self.follow(command),
                Ok(None) | Err(_) => {
                    debug!("a command that a network device does not have");
                    ERR
                }
            };
            // A driver that left no room wants no answer.
            let written = chain.writer(&memory).write(&[answer]);
            self.control.add_used(0, chain.head(), written);
        }
        self.control.notify(0);
        self.control.kick(0);
    }

    fn follow(&mut self, command: Command) -> u8 {
        match command {
            Command::Pairs(count) if self.features & F_MQ != 0 && (1..=self.pair_count()).contains(&count) => {
                self.use_pairs(count);
                OK
            }
            Command::Offloads(bits) if self.features & F_CTRL_GUEST_OFFLOADS != 0 => {
                match Offloads::asked(bits, self.features) {
                    Some(offloads) => {
                        self.give(offloads);
                        OK
                    }
                    None => ERR,
                }
            }
            _ => {
                debug!("the driver cannot have {command:?}");
                ERR
            }
        }
    }
}
