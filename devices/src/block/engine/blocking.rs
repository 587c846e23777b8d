//! One system call after the other, each waited for.

use std::collections::VecDeque;

use super::Engine;
use crate::block::backend::Disk;
use crate::block::flight::Flight;

/// See the module.
#[derive(Default)]
pub struct Blocking {
    finished: VecDeque<Flight>,
}

/// Does all of `flight`.
pub fn complete(disk: &Disk, flight: &mut Flight) {
    while let Some(call) = flight.next(disk) {
        let result = disk.perform(&call);
        flight.advance(result);
    }
}

impl Engine for Blocking {
    fn name(&self) -> &'static str {
        "blocking"
    }

    fn room(&self) -> usize {
        super::DEPTH.saturating_sub(self.finished.len())
    }

    fn start(&mut self, disk: &Disk, mut flight: Flight) {
        complete(disk, &mut flight);
        self.finished.push_back(flight);
    }

    fn look(&mut self, _: &Disk) {}

    fn finished(&mut self) -> Option<Flight> {
        self.finished.pop_front()
    }

    fn settle(&mut self, _: &Disk) {}
}
