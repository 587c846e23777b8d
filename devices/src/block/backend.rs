//! The host's side of a disk: a raw file or a block device.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt};

use super::layout::{Geometry, SECTOR};
use crate::virtio::queue::Buffers;

// From <linux/fs.h>.
const BLKSSZGET: libc::c_ulong = 0x1268;
const BLKDISCARD: libc::c_ulong = 0x1277;
const BLKPBSZGET: libc::c_ulong = 0x127b;
const BLKZEROOUT: libc::c_ulong = 0x127f;
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;

/// What zeroes are written from, where the host can do no better.
static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];

/// Why a file cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Not a regular file, not a block device.
    #[error("a disk must be a regular file or a block device")]
    Kind,
    /// fstat or an ioctl on the block device failed.
    #[error("cannot find out the size of the disk: {0}")]
    Size(#[from] io::Error),
    /// The block device has blocks that no guest can use.
    #[error("the disk's logical blocks have {0} bytes; between 512 and 4096 are possible")]
    Block(u32),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    File,
    Device,
}

/// An open disk. All offsets are checked against the size that it had when it was opened.
#[derive(Debug)]
pub struct Disk {
    file: File,
    kind: Kind,
    sectors: u64,
    logical: u32,
    physical: u32,
}

impl Disk {
    /// Takes over an open file; a trailing part of a sector is out of the guest's reach.
    pub fn new(file: File) -> Result<Self, DiskError> {
        let metadata = file.metadata()?;
        let (kind, bytes, logical, physical) = if metadata.is_file() {
            (Kind::File, metadata.len(), SECTOR as u32, 4096)
        } else if metadata.file_type().is_block_device() {
            let bytes = query::<u64>(&file, BLKGETSIZE64)?;
            (Kind::Device, bytes, query::<u32>(&file, BLKSSZGET)?, query::<u32>(&file, BLKPBSZGET)?)
        } else {
            return Err(DiskError::Kind);
        };
        if !logical.is_power_of_two() || !(512..=4096).contains(&logical) {
            return Err(DiskError::Block(logical));
        }
        Ok(Self { file, kind, sectors: bytes / SECTOR, logical, physical: physical.max(logical) })
    }

    /// Capacity and block sizes.
    pub fn geometry(&self) -> Geometry {
        Geometry { sectors: self.sectors, logical: self.logical, physical: self.physical }
    }

    /// The bytes from `sector` on, if all `len` of them are on the disk.
    pub fn range(&self, sector: u64, len: u64) -> Option<Range<u64>> {
        let start = sector.checked_mul(SECTOR)?;
        let end = start.checked_add(len)?;
        (end <= self.sectors * SECTOR).then_some(start..end)
    }

    /// Reads from `offset` on until `buffers` are full (preadv).
    pub fn read(&self, offset: u64, buffers: &mut Buffers<'_>) -> io::Result<()> {
        // SAFETY: the vectors are guest memory that stays mapped as long as `buffers` lives. The guest may
        // access it meanwhile, but no Rust reference to it exists.
        transfer(offset, buffers, |vectors, count, offset| unsafe {
            libc::preadv(self.file.as_raw_fd(), vectors, count, offset)
        })
    }

    /// Writes all of `buffers` from `offset` on (pwritev).
    pub fn write(&self, offset: u64, buffers: &mut Buffers<'_>) -> io::Result<()> {
        // SAFETY: as for `read`; the kernel only reads from the vectors here.
        transfer(offset, buffers, |vectors, count, offset| unsafe {
            libc::pwritev(self.file.as_raw_fd(), vectors, count, offset)
        })
    }

    /// Makes all writes durable (fdatasync).
    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Forgets the contents of `range`: a hole in a file, discarded blocks on a device.
    pub fn discard(&self, range: Range<u64>) -> io::Result<()> {
        match self.kind {
            Kind::File => self.fallocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, &range),
            Kind::Device => self.on_range(BLKDISCARD, &range),
        }
    }

    /// Makes `range` read as zeroes; `unmap` allows to deallocate it.
    pub fn zero(&self, range: Range<u64>, unmap: bool) -> io::Result<()> {
        let mode = if unmap { libc::FALLOC_FL_PUNCH_HOLE } else { libc::FALLOC_FL_ZERO_RANGE };
        let done = match self.kind {
            Kind::File => self.fallocate(mode | libc::FALLOC_FL_KEEP_SIZE, &range),
            Kind::Device => self.on_range(BLKZEROOUT, &range),
        };
        match done {
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => self.write_zeroes(range),
            done => done,
        }
    }

    fn write_zeroes(&self, range: Range<u64>) -> io::Result<()> {
        let mut offset = range.start;
        while offset < range.end {
            let len = usize::try_from(range.end - offset).unwrap_or(usize::MAX).min(ZEROES.len());
            self.file.write_all_at(ZEROES.get(..len).unwrap_or_default(), offset)?;
            offset += len as u64;
        }
        Ok(())
    }

    fn fallocate(&self, mode: libc::c_int, range: &Range<u64>) -> io::Result<()> {
        let (Ok(start), Ok(len)) = (range.start.try_into(), (range.end - range.start).try_into()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        retry(|| {
            // SAFETY: no memory is passed.
            unsafe { libc::fallocate(self.file.as_raw_fd(), mode, start, len) }
        })
    }

    /// An ioctl of the kernel's block layer that takes `uint64_t range[2]`.
    fn on_range(&self, request: libc::c_ulong, range: &Range<u64>) -> io::Result<()> {
        let range = [range.start, range.end - range.start];
        retry(|| {
            // SAFETY: both requests this is called with read two 64-bit numbers, which live until the call returns.
            unsafe { libc::ioctl(self.file.as_raw_fd(), request, range.as_ptr()) }
        })
    }
}

/// Moves all bytes of `buffers` by repeated calls, since each one may do less than it was asked for.
fn transfer(
    mut offset: u64,
    buffers: &mut Buffers<'_>,
    call: impl Fn(*const libc::iovec, libc::c_int, libc::off_t) -> isize,
) -> io::Result<()> {
    while buffers.remaining() > 0 {
        let vectors = buffers.iovecs(buffers.remaining());
        let (Ok(count), Ok(at)) = (vectors.len().try_into(), offset.try_into()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        match usize::try_from(call(vectors.as_ptr(), count, at)) {
            // The file is shorter than it was.
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(done) => {
                buffers.consume(done);
                offset += done as u64;
            }
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

fn retry(call: impl Fn() -> libc::c_int) -> io::Result<()> {
    loop {
        if call() == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// A number that the kernel's block layer knows of a device.
fn query<T: Default>(file: &File, request: libc::c_ulong) -> io::Result<T> {
    let fd: RawFd = file.as_raw_fd();
    let mut value = T::default();
    // SAFETY: BLKGETSIZE64 writes 64 bits, BLKSSZGET and BLKPBSZGET write 32: what the callers' `T` has.
    if unsafe { libc::ioctl(fd, request, &raw mut value) } == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(len: u64) -> Disk {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        Disk::new(file).unwrap()
    }

    #[test]
    fn a_range_is_on_the_disk_as_a_whole_or_not_at_all() {
        let disk = disk(8 * 512 + 100);
        assert_eq!(disk.range(0, 8 * 512), Some(0..4096));
        assert_eq!(disk.range(8, 0), Some(4096..4096));
        for (sector, len) in
            [(0, 8 * 512 + 1), (8, 1), (9, 0), (u64::MAX, 512), (u64::MAX / 512, u64::MAX), (1 << 55, 0)]
        {
            assert_eq!(disk.range(sector, len), None, "{sector} + {len}");
        }
    }

    #[test]
    fn zeroes_are_zeroes_by_every_way() {
        let disk = disk(1 << 20);
        for (unmap, by_writes) in [(true, false), (false, false), (false, true)] {
            disk.file.write_all_at(&[7; 1 << 20], 0).unwrap();
            let range = 4096..900_000;
            if by_writes {
                disk.write_zeroes(range).unwrap()
            } else {
                disk.zero(range, unmap).unwrap()
            }
            let mut bytes = vec![1; 1 << 20];
            disk.file.read_exact_at(&mut bytes, 0).unwrap();
            assert!(bytes[4096..900_000].iter().all(|byte| *byte == 0));
            assert!(bytes[..4096].iter().chain(&bytes[900_000..]).all(|byte| *byte == 7));
        }
    }

    #[test]
    fn only_files_and_block_devices_are_disks() {
        assert!(matches!(Disk::new(File::open("/dev/null").unwrap()), Err(DiskError::Kind)));
        assert!(matches!(Disk::new(File::open("/").unwrap()), Err(DiskError::Kind)));
    }
}
