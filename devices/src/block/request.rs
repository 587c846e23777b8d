//! One request: header, data, status byte, however the driver cut them into descriptors (virtio 1.3, 5.2.6).

use std::io;

use log::debug;

use super::backend::Disk;
use super::layout::*;
use crate::memory::GuestMemory;
use crate::virtio::queue::{Buffers, Chain};

/// What all requests of a running device share.
pub struct Context<'d> {
    pub disk: &'d Disk,
    /// Features that the driver accepted.
    pub features: u64,
    pub read_only: bool,
    pub serial: &'d [u8; ID_BYTES],
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

impl Context<'_> {
    /// Serves the request in `chain`; returns how many bytes from the start of its writable buffers were written.
    pub fn serve(&self, chain: &Chain, memory: &GuestMemory) -> usize {
        let mut readable = chain.reader(memory);
        let mut writable = chain.writer(memory);
        // Without a byte for the status, nobody can learn of the result, so nothing is done.
        let Some(status_at) = writable.remaining().checked_sub(1) else { return 0 };
        let mut status = writable.split_off(status_at);
        let code = self.execute(&mut readable, &mut writable).map_or_else(
            |error| {
                debug!("block request: {error}");
                error.status()
            },
            |()| 0,
        );
        let last = status.write(&[code]);
        // The length counts from the first byte on without a gap (2.7.8.2).
        writable.consumed() + if writable.remaining() == 0 { last } else { 0 }
    }

    fn execute(&self, readable: &mut Buffers<'_>, writable: &mut Buffers<'_>) -> Result<(), RequestError> {
        let header: Header = readable.read_obj().map_err(|_| RequestError::Header)?;
        match header.kind() {
            T_IN => {
                let start = self.data(header.sector(), writable.remaining())?;
                Ok(self.disk.read(start, writable)?)
            }
            T_OUT if self.read_only => Err(RequestError::ReadOnly),
            T_OUT => {
                let start = self.data(header.sector(), readable.remaining())?;
                self.disk.write(start, readable)?;
                // A driver that cannot ask for a flush relies on each write being durable (5.2.6.2).
                if self.features & F_FLUSH == 0 { Ok(self.disk.flush()?) } else { Ok(()) }
            }
            T_FLUSH => Ok(self.disk.flush()?),
            T_GET_ID => {
                writable.write(self.serial);
                Ok(())
            }
            T_DISCARD if self.features & F_DISCARD != 0 && !self.read_only => self.discard(readable),
            T_WRITE_ZEROES if self.features & F_WRITE_ZEROES != 0 && !self.read_only => self.write_zeroes(readable),
            kind => Err(RequestError::Type(kind)),
        }
    }

    /// The offset of `len` bytes of data at `sector`, if they are whole sectors on the disk.
    fn data(&self, sector: u64, len: usize) -> Result<u64, RequestError> {
        if len > REQUEST_MAX || !(len as u64).is_multiple_of(SECTOR) {
            return Err(RequestError::Length(len));
        }
        self.disk.range(sector, len as u64).map(|range| range.start).ok_or(RequestError::Range(sector))
    }

    fn discard(&self, data: &mut Buffers<'_>) -> Result<(), RequestError> {
        for segment in segments(data, DISCARD_SEGMENTS)? {
            // No flag has a meaning for discard (5.2.6.2).
            if segment.flags() != 0 {
                return Err(RequestError::Flags(segment.flags()));
            }
            let range = self.segment(&segment, DISCARD_SECTORS)?;
            if !range.is_empty() {
                self.disk.discard(range)?;
            }
        }
        Ok(())
    }

    fn write_zeroes(&self, data: &mut Buffers<'_>) -> Result<(), RequestError> {
        for segment in segments(data, ZEROES_SEGMENTS)? {
            if segment.flags() & !UNMAP != 0 {
                return Err(RequestError::Flags(segment.flags()));
            }
            let range = self.segment(&segment, ZEROES_SECTORS)?;
            if !range.is_empty() {
                self.disk.zero(range, segment.flags() & UNMAP != 0)?;
            }
        }
        if self.features & F_FLUSH == 0 { Ok(self.disk.flush()?) } else { Ok(()) }
    }

    fn segment(&self, segment: &Segment, most: u32) -> Result<std::ops::Range<u64>, RequestError> {
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
