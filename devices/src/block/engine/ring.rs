//! Many requests at once, by io_uring(7).

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::{IoUring, Probe, opcode, squeue, types};
use log::error;

use super::blocking::complete;
use super::{DEPTH, Engine};
use crate::block::backend::{Call, Disk};
use crate::block::flight::Flight;

/// See the module.
pub struct Ring {
    ring: IoUring,
    /// Requests under way by their number in the kernel's queue entries.
    flights: Vec<Option<Flight>>,
    /// Numbers that no request has.
    free: Vec<u16>,
    /// Numbers whose entries the kernel has not taken yet, in the order of the ring.
    pushed: VecDeque<u16>,
    finished: VecDeque<Flight>,
    /// The kernel takes no more entries: what is not under way is done one after the other.
    broken: bool,
}

impl Ring {
    /// A ring that announces completions by the eventfd `completions`.
    ///
    /// # Errors
    /// When the kernel, its settings or a seccomp filter do not allow it, or it lacks an operation.
    pub fn new(completions: RawFd) -> io::Result<Self> {
        let mut ring = IoUring::builder().dontfork().build(DEPTH as u32)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [opcode::Readv::CODE, opcode::Writev::CODE, opcode::Fsync::CODE, opcode::Fallocate::CODE];
        if !ring.params().is_feature_nodrop() || !needed.iter().all(|code| probe.is_supported(*code)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        ring.submitter().register_eventfd(completions)?;
        // A filter may allow to make a ring and not to use it.
        // SAFETY: the operation names no memory.
        unsafe { ring.submission().push(&opcode::Nop::new().build()) }.map_err(io::Error::other)?;
        ring.submit_and_wait(1)?;
        ring.completion().for_each(drop);
        Ok(Self {
            ring,
            flights: (0..DEPTH).map(|_| None).collect(),
            free: (0..DEPTH as u16).rev().collect(),
            pushed: VecDeque::new(),
            finished: VecDeque::new(),
            broken: false,
        })
    }

    fn in_flight(&self) -> usize {
        DEPTH - self.free.len()
    }

    /// Gives the next system call of `flight` to the kernel, or finishes it.
    fn go_on(&mut self, disk: &Disk, mut flight: Flight) {
        if self.broken || flight.is_exclusive(disk) {
            complete(disk, &mut flight);
            return self.finished.push_back(flight);
        }
        loop {
            let Some(call) = flight.next(disk) else { return self.finished.push_back(flight) };
            match entry(disk, &call) {
                Some(entry) => {
                    return match self.push(entry) {
                        Some(number) => self.keep(number, flight),
                        None => {
                            complete(disk, &mut flight);
                            self.finished.push_back(flight);
                        }
                    };
                }
                None => {
                    let result = disk.perform(&call);
                    flight.advance(result);
                }
            }
        }
    }

    /// Puts an entry into the ring; its number, unless there is no place, which `room` rules out.
    fn push(&mut self, entry: squeue::Entry) -> Option<u16> {
        let number = self.free.pop()?;
        // SAFETY: what the entry points to is owned by its flight, or by memory that the flight keeps mapped. The
        // caller puts the flight into `flights`, and it stays there until the kernel has finished the operation.
        let pushed = unsafe { self.ring.submission().push(&entry.user_data(number.into())) };
        if pushed.is_err() {
            self.free.push(number);
            return None;
        }
        self.pushed.push_back(number);
        Some(number)
    }

    fn keep(&mut self, number: u16, flight: Flight) {
        if let Some(place) = self.flights.get_mut(usize::from(number)) {
            *place = Some(flight);
        }
    }

    fn take(&mut self, number: u16) -> Option<Flight> {
        let flight = self.flights.get_mut(usize::from(number))?.take()?;
        self.free.push(number);
        Some(flight)
    }

    fn submit(&mut self, disk: &Disk) {
        while !self.pushed.is_empty() && !self.broken {
            match self.ring.submit() {
                Ok(taken) if taken > 0 => drop(self.pushed.drain(..taken.min(self.pushed.len()))),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Nothing is taken although its own queue of completions has room for all: never seen.
                result => {
                    error!("io_uring takes no more requests of a disk, which goes on without: {result:?}");
                    self.broken = true;
                }
            }
        }
        if self.broken {
            // The kernel reads entries in io_uring_enter(2) only, which is not called again.
            for number in std::mem::take(&mut self.pushed) {
                if let Some(mut flight) = self.take(number) {
                    // The call that was pushed is made anew.
                    complete(disk, &mut flight);
                    self.finished.push_back(flight);
                }
            }
        }
    }

    /// Takes results; how many.
    fn reap(&mut self, disk: &Disk) -> usize {
        let results: Vec<(u64, i32)> =
            self.ring.completion().map(|entry| (entry.user_data(), entry.result())).collect();
        for (number, result) in &results {
            let Some(mut flight) = u16::try_from(*number).ok().and_then(|number| self.take(number)) else { continue };
            let result = usize::try_from(*result).map_err(|_| io::Error::from_raw_os_error(-result));
            flight.advance(result);
            self.go_on(disk, flight);
        }
        results.len()
    }

    fn wait(&self) {
        let mut poll = libc::pollfd { fd: self.ring.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // An error other than EINTR cannot be (one valid descriptor), and EINTR is as good as an event.
        // SAFETY: one pollfd, which lives until the call returns.
        unsafe { libc::poll(&raw mut poll, 1, -1) };
    }
}

/// The queue entry of a call; None for one that io_uring does not have.
fn entry(disk: &Disk, call: &Call<'_>) -> Option<squeue::Entry> {
    let fd = types::Fd(disk.as_raw_fd());
    Some(match call {
        Call::Read { offset, vectors } => {
            opcode::Readv::new(fd, vectors.as_ptr(), vectors.len() as u32).offset(*offset).build()
        }
        Call::Write { offset, vectors, durable } => {
            let flags = if *durable { libc::RWF_DSYNC } else { 0 };
            let write = opcode::Writev::new(fd, vectors.as_ptr(), vectors.len() as u32);
            write.offset(*offset).rw_flags(flags).build()
        }
        Call::Sync => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
        Call::Allocate { mode, range } => {
            opcode::Fallocate::new(fd, range.end - range.start).offset(range.start).mode(*mode).build()
        }
        Call::Control { .. } => return None,
    })
}

impl Engine for Ring {
    fn name(&self) -> &'static str {
        "io_uring"
    }

    fn room(&self) -> usize {
        self.free.len().saturating_sub(self.finished.len())
    }

    fn start(&mut self, disk: &Disk, flight: Flight) {
        if flight.is_exclusive(disk) {
            self.settle(disk);
        }
        self.go_on(disk, flight);
    }

    fn look(&mut self, disk: &Disk) {
        // What is finished within the system call itself needs no wake-up.
        self.ring.completion().disable_eventfd();
        loop {
            self.submit(disk);
            if self.reap(disk) == 0 && self.pushed.is_empty() {
                break;
            }
        }
        self.ring.completion().enable_eventfd();
        // And what was finished between the last look and this would be missed.
        self.reap(disk);
        self.submit(disk);
    }

    fn finished(&mut self) -> Option<Flight> {
        self.finished.pop_front()
    }

    fn settle(&mut self, disk: &Disk) {
        self.look(disk);
        while self.in_flight() > 0 {
            self.wait();
            self.look(disk);
        }
    }
}

impl Drop for Ring {
    /// The kernel still writes to the memory of requests that are under way, so they are waited for.
    fn drop(&mut self) {
        while self.flights.iter().any(Option::is_some) {
            let results: Vec<u64> = self.ring.completion().map(|entry| entry.user_data()).collect();
            for number in results {
                drop(u16::try_from(number).ok().and_then(|number| self.take(number)));
            }
            for number in std::mem::take(&mut self.pushed) {
                drop(self.take(number));
            }
            if self.flights.iter().any(Option::is_some) {
                self.wait();
            }
        }
    }
}
