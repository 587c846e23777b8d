//! A request on its way: which system calls it takes, one after the other, whoever makes them.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;

use super::backend::{Call, Disk};
use super::bounce::Bounce;
use super::request::{Request, Work};

/// What zeroes are written from, where the host can do no better. Aligned for O_DIRECT.
#[repr(align(4096))]
struct Zeroes([u8; ZEROES_LEN]);
const ZEROES_LEN: usize = 64 * 1024;
static ZEROES: Zeroes = Zeroes([0; ZEROES_LEN]);

/// What the next call is for.
enum Step {
    /// Bytes between guest memory and disk, directly or by a bounce buffer.
    Transfer,
    /// One of the ranges to discard.
    Discard(VecDeque<Range<u64>>),
    /// Zeroes by the file system or device.
    Zero { range: Range<u64>, unmap: bool },
    /// Zeroes written as data.
    WriteZeroes(Range<u64>),
    /// What was done is to be made durable.
    Sync,
}

/// A request that is being carried out.
pub struct Flight {
    request: Request,
    step: Step,
    /// Bytes of its data that are done.
    moved: usize,
    /// What the call that was made last points to.
    vectors: Vec<libc::iovec>,
    bounce: Option<Bounce>,
    outcome: Option<io::Result<()>>,
}

// SAFETY: the vectors point into guest memory, which `request` keeps mapped, into the bounce buffer, which is owned, or
// into a static; none of them belongs to a thread.
unsafe impl Send for Flight {}

impl Flight {
    pub fn new(request: Request) -> Self {
        let step = match request.work() {
            Work::Read { .. } | Work::Write { .. } => Step::Transfer,
            Work::Flush => Step::Sync,
            Work::Discard(ranges) => Step::Discard(ranges.iter().cloned().collect()),
            Work::Zero { range, unmap, .. } => Step::Zero { range: range.clone(), unmap: *unmap },
        };
        Self { request, step, moved: 0, vectors: Vec::new(), bounce: None, outcome: None }
    }

    /// The request, how many bytes of its data were moved, and how it ended.
    pub fn end(self) -> (Request, usize, io::Result<()>) {
        let outcome = self.outcome.unwrap_or_else(|| Err(io::ErrorKind::Interrupted.into()));
        (self.request, self.moved, outcome)
    }

    /// Whether it must not run beside another: it writes parts of blocks, whose rest it reads and writes back.
    pub fn is_exclusive(&self, disk: &Disk) -> bool {
        let unit = disk.unit();
        match self.request.work() {
            Work::Write { offset, .. } => {
                !offset.is_multiple_of(unit) || !(self.request.len() as u64).is_multiple_of(unit)
            }
            _ => false,
        }
    }

    /// The next system call; None when it is finished. Without [`advance`](Self::advance) between, the same one again.
    pub fn next(&mut self, disk: &Disk) -> Option<Call<'_>> {
        if self.outcome.is_some() {
            return None;
        }
        match &self.step {
            Step::Transfer if self.moved == self.request.len() => self.outcome = Some(Ok(())),
            Step::Discard(ranges) if ranges.is_empty() => self.outcome = Some(Ok(())),
            Step::WriteZeroes(range) | Step::Zero { range, .. } if range.is_empty() => {
                self.step = Step::Sync;
                if !self.request.is_durable() {
                    self.outcome = Some(Ok(()));
                }
            }
            _ => {}
        }
        if self.outcome.is_some() {
            return None;
        }
        Some(match &self.step {
            Step::Transfer => return Some(self.transfer(disk)),
            Step::Discard(ranges) => disk.discard(ranges.front().cloned().unwrap_or_default()),
            Step::Zero { range, unmap } => disk.zero(range.clone(), *unmap),
            Step::WriteZeroes(range) => {
                let len = usize::try_from(range.end - range.start).unwrap_or(usize::MAX).min(ZEROES_LEN);
                let offset = range.start;
                let base = ZEROES.0.as_ptr().cast_mut().cast();
                self.vectors.clear();
                self.vectors.push(libc::iovec { iov_base: base, iov_len: len });
                Call::Write { offset, vectors: &self.vectors, durable: false }
            }
            Step::Sync => Call::Sync,
        })
    }

    fn transfer(&mut self, disk: &Disk) -> Call<'_> {
        let (offset, durable) = match self.request.work() {
            Work::Write { offset, durable } => (*offset, Some(*durable)),
            Work::Read { offset } => (*offset, None),
            _ => (0, None),
        };
        let at = offset + self.moved as u64;
        let mut data = self.request.data();
        data.consume(self.moved);
        self.vectors = data.iovecs(data.remaining());
        if self.bounce.is_some() || !disk.takes(at, &self.vectors) {
            let bounce = self.bounce.get_or_insert_with(Bounce::new);
            bounce.aim(at, data.remaining(), disk.unit(), durable.is_some());
            let reads = durable.is_none() || bounce.must_fill();
            if !reads {
                bounce.copy_from(&mut data);
            }
            self.vectors.clear();
            self.vectors.push(bounce.vector());
            let (offset, vectors) = (bounce.start(), &self.vectors);
            return match durable.filter(|_| !reads) {
                Some(durable) => Call::Write { offset, vectors, durable },
                None => Call::Read { offset, vectors },
            };
        }
        match durable {
            Some(durable) => Call::Write { offset: at, vectors: &self.vectors, durable },
            None => Call::Read { offset: at, vectors: &self.vectors },
        }
    }

    /// Takes the result of the call that [`next`](Self::next) returned last.
    pub fn advance(&mut self, result: io::Result<usize>) {
        let done = match result {
            Ok(done) => done,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return,
            Err(error) => return self.fail(error),
        };
        match &mut self.step {
            Step::Transfer => self.moved_on(done),
            Step::Discard(ranges) => drop(ranges.pop_front()),
            Step::Zero { range, .. } => range.start = range.end,
            // The file is full of the disk's own blocks, so this is no end of file; but it must not go on for ever.
            Step::WriteZeroes(_) if done == 0 => self.fail(io::ErrorKind::WriteZero.into()),
            Step::WriteZeroes(range) => range.start = (range.start + done as u64).min(range.end),
            Step::Sync => self.outcome = Some(Ok(())),
        }
    }

    fn moved_on(&mut self, done: usize) {
        let left = self.request.len() - self.moved;
        let writes = matches!(self.request.work(), Work::Write { .. });
        let moved = match &mut self.bounce {
            None => done,
            Some(bounce) if writes && bounce.must_fill() => {
                // Parts of a block are only known once all of it is.
                if !bounce.filled(done) {
                    self.fail(io::ErrorKind::UnexpectedEof.into());
                }
                return;
            }
            Some(bounce) if writes => bounce.useful(done),
            Some(bounce) => {
                let mut data = self.request.data();
                data.consume(self.moved);
                bounce.copy_to(&mut data, done)
            }
        };
        // The file is shorter than it was, or full.
        if moved == 0 {
            return self.fail(io::ErrorKind::UnexpectedEof.into());
        }
        self.moved += moved.min(left);
    }

    fn fail(&mut self, error: io::Error) {
        if let Step::Zero { range, .. } = &self.step
            && error.raw_os_error() == Some(libc::EOPNOTSUPP)
        {
            self.step = Step::WriteZeroes(range.clone());
        } else {
            self.outcome = Some(Err(error));
        }
    }
}
