//! One request: header, data, status byte, however the driver cut them into descriptors (virtio 1.3, 5.2.6).

use std::io;
use std::ops::Range;
use std::sync::Arc;

use log::debug;

use super::backend::Disk;
use super::layout::*;
use crate::memory::GuestMemory;
use crate::virtio::queue::{Buffers, Chain};

/// Bytes of a request's header.
const HEADER: usize = size_of::<Header>();

/// What all requests of a running device share.
pub struct Context<'d> {
    pub disk: &'d Disk,
    /// Features that the driver accepted.
    pub features: u64,
    pub read_only: bool,
    /// Each write is to be durable before the driver hears of it: it cannot, or will not, ask for a flush (5.2.6.2).
    pub writethrough: bool,
    pub serial: &'d [u8; ID_BYTES],
}

/// What a request asks of the disk, all of it checked.
#[derive(Debug)]
pub enum Work {
    /// To guest memory.
    Read { offset: u64 },
    /// From guest memory.
    Write { offset: u64, durable: bool },
    /// What was written and reported as done before is to be durable.
    Flush,
    /// Contents that nobody needs.
    Discard(Vec<Range<u64>>),
    /// Contents that are to be zeroes.
    Zero { range: Range<u64>, unmap: bool, durable: bool },
}

/// A request that was taken from its queue and has to be given back.
pub struct Request {
    queue: usize,
    chain: Chain,
    memory: Arc<GuestMemory>,
    work: Work,
    /// Bytes of data.
    len: usize,
}

/// What becomes of a chain.
pub enum Taken {
    /// The disk has work to do.
    Started(Box<Request>),
    /// It is answered: so many bytes from the start of its writable buffers were written.
    Answered(usize),
}

/// Why a request was not served.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The header is incomplete.
    #[error("the header is shorter than 16 bytes")]
    Header,
    /// No multiple of the unit, or longer than any driver may ask for.
    #[error("{0} bytes of data are not possible")]
    Length(usize),
    /// Sectors beyond the end.
    #[error("sectors from {0} on are not all on the disk")]
    Range(u64),
    /// A write to a read-only disk.
    #[error("the disk is read-only")]
    ReadOnly,
    /// A type that the driver has no right to use.
    #[error("request type {0} is unknown or was not negotiated")]
    Type(u32),
    /// A flag that the request does not have.
    #[error("the segment's flags {0:#x} are not supported")]
    Flags(u32),
    /// The disk was taken away.
    #[error("there is no disk any more")]
    Gone,
    /// The host failed.
    #[error("the host's file failed: {0}")]
    Host(#[from] io::Error),
}

impl RequestError {
    /// VIRTIO_BLK_S_IOERR or VIRTIO_BLK_S_UNSUPP.
    fn status(&self) -> u8 {
        match self {
            Self::Type(_) | Self::Flags(_) => 2,
            Self::Host(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => 2,
            _ => 1,
        }
    }
}

/// Writes the status byte of `chain`, `moved` bytes of whose writable buffers were written before; how many are then.
fn answer(chain: &Chain, memory: &GuestMemory, moved: usize, result: &Result<(), RequestError>) -> usize {
    let mut writable = chain.writer(memory);
    // Without a byte for the status, nobody can learn of the result.
    let Some(status_at) = writable.remaining().checked_sub(1) else { return 0 };
    let mut status = writable.split_off(status_at);
    let last = status.write(&[result.as_ref().map_or_else(RequestError::status, |()| 0)]);
    // The length counts from the first byte on without a gap (2.7.8.2).
    moved + if moved == status_at { last } else { 0 }
}

/// Answers a chain whose disk is gone.
pub fn refuse(chain: &Chain, memory: &GuestMemory) -> usize {
    answer(chain, memory, 0, &Err(RequestError::Gone))
}

impl Request {
    pub fn queue(&self) -> usize {
        self.queue
    }

    pub fn head(&self) -> u16 {
        self.chain.head()
    }

    pub fn work(&self) -> &Work {
        &self.work
    }

    /// Bytes of data that it moves between guest and disk.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether what it does must be durable before it is answered.
    pub fn is_durable(&self) -> bool {
        matches!(self.work, Work::Write { durable: true, .. } | Work::Zero { durable: true, .. })
    }

    /// Its data in guest memory.
    pub fn data(&self) -> Buffers<'_> {
        let mut data = match self.work {
            Work::Read { .. } => self.chain.writer(&self.memory),
            _ => {
                let mut data = self.chain.reader(&self.memory);
                data.consume(HEADER);
                data
            }
        };
        drop(data.split_off(self.len));
        data
    }

    /// Writes the answer after `moved` bytes of data; how many bytes of the chain's writable buffers are written then.
    pub fn answer(&self, moved: usize, result: io::Result<()>) -> usize {
        let moved = if matches!(self.work, Work::Read { .. }) { moved } else { 0 };
        answer(&self.chain, &self.memory, moved, &result.map_err(Into::into))
    }
}

impl Context<'_> {
    /// Checks the request in `chain`, and answers it if the disk has no part in it.
    pub fn take(&self, queue: usize, chain: Chain, memory: &Arc<GuestMemory>) -> Taken {
        // Without a byte for the status nothing is done.
        let Some(room) = chain.writable_len().checked_sub(1) else { return Taken::Answered(0) };
        let mut readable = chain.reader(memory);
        match self.check(&mut readable, room) {
            Ok(Some((work, len))) => {
                let memory = Arc::clone(memory);
                Taken::Started(Box::new(Request { queue, chain, memory, work, len }))
            }
            Ok(None) => {
                let mut writable = chain.writer(memory);
                drop(writable.split_off(room));
                Taken::Answered(answer(&chain, memory, writable.write(self.serial), &Ok(())))
            }
            Err(error) => {
                debug!("block request: {error}");
                Taken::Answered(answer(&chain, memory, 0, &Err(error)))
            }
        }
    }

    /// What is to be done, and with how many bytes of data; None for GET_ID.
    fn check(&self, readable: &mut Buffers<'_>, room: usize) -> Result<Option<(Work, usize)>, RequestError> {
        let header: Header = readable.read_obj().map_err(|_| RequestError::Header)?;
        let (sector, durable) = (header.sector(), self.writethrough);
        Ok(Some(match header.kind() {
            T_IN => (Work::Read { offset: self.data(sector, room)? }, room),
            T_OUT if self.read_only => return Err(RequestError::ReadOnly),
            T_OUT => {
                let len = readable.remaining();
                (Work::Write { offset: self.data(sector, len)?, durable }, len)
            }
            T_FLUSH => (Work::Flush, 0),
            T_GET_ID => return Ok(None),
            T_DISCARD if self.features & F_DISCARD != 0 && !self.read_only => (self.discard(readable)?, 0),
            T_WRITE_ZEROES if self.features & F_WRITE_ZEROES != 0 && !self.read_only => {
                (self.write_zeroes(readable)?, 0)
            }
            kind => return Err(RequestError::Type(kind)),
        }))
    }

    /// The offset of `len` bytes of data at `sector`, if they are whole sectors on the disk.
    fn data(&self, sector: u64, len: usize) -> Result<u64, RequestError> {
        if len > REQUEST_MAX || !(len as u64).is_multiple_of(SECTOR) {
            return Err(RequestError::Length(len));
        }
        self.disk.range(sector, len as u64).map(|range| range.start).ok_or(RequestError::Range(sector))
    }

    fn discard(&self, data: &mut Buffers<'_>) -> Result<Work, RequestError> {
        let mut ranges = Vec::new();
        for segment in segments(data, DISCARD_SEGMENTS)? {
            // No flag has a meaning for discard (5.2.6.2).
            if segment.flags() != 0 {
                return Err(RequestError::Flags(segment.flags()));
            }
            ranges.push(self.segment(&segment, DISCARD_SECTORS)?);
        }
        ranges.retain(|range| !range.is_empty());
        Ok(Work::Discard(ranges))
    }

    fn write_zeroes(&self, data: &mut Buffers<'_>) -> Result<Work, RequestError> {
        let segments = segments(data, ZEROES_SEGMENTS)?;
        let [segment] = &*segments else { return Err(RequestError::Length(segments.len())) };
        if segment.flags() & !UNMAP != 0 {
            return Err(RequestError::Flags(segment.flags()));
        }
        let range = self.segment(segment, ZEROES_SECTORS)?;
        Ok(Work::Zero { range, unmap: segment.flags() & UNMAP != 0, durable: self.writethrough })
    }

    fn segment(&self, segment: &Segment, most: u32) -> Result<Range<u64>, RequestError> {
        let len = u64::from(segment.sectors()) * SECTOR;
        let range = self.disk.range(segment.sector(), len).filter(|_| segment.sectors() <= most);
        range.ok_or(RequestError::Range(segment.sector()))
    }
}

/// Copies the segments of a discard or write-zeroes request out: at least one, at most `most`.
fn segments(data: &mut Buffers<'_>, most: u32) -> Result<Vec<Segment>, RequestError> {
    let len = data.remaining();
    let count = len / size_of::<Segment>();
    if count == 0 || count > most as usize || !len.is_multiple_of(size_of::<Segment>()) {
        return Err(RequestError::Length(len));
    }
    Ok((0..count).map(|_| data.read_obj()).collect::<io::Result<_>>()?)
}
