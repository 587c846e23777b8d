//! The host's side of a disk: a raw file or a block device.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileTypeExt;

use rustix::fs::{AtFlags, OFlags, StatxFlags, fcntl_getfl, statx};

use super::layout::{Geometry, SECTOR};

// From <linux/fs.h>.
const BLKSSZGET: libc::c_ulong = 0x1268;
const BLKDISCARD: libc::c_ulong = 0x1277;
const BLKPBSZGET: libc::c_ulong = 0x127b;
const BLKZEROOUT: libc::c_ulong = 0x127f;
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;

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

/// What O_DIRECT asks for, in bytes: powers of two.
#[derive(Clone, Copy, Debug)]
struct Direct {
    /// Of addresses of memory.
    memory: u64,
    /// Of offsets and lengths.
    unit: u64,
}

/// One system call on a disk. Memory that it names stays valid as long as it is borrowed.
#[derive(Debug)]
pub enum Call<'c> {
    /// preadv(2).
    Read {
        /// In bytes.
        offset: u64,
        /// Memory to be filled.
        vectors: &'c [libc::iovec],
    },
    /// pwritev2(2).
    Write {
        /// In bytes.
        offset: u64,
        /// Memory to be written.
        vectors: &'c [libc::iovec],
        /// RWF_DSYNC.
        durable: bool,
    },
    /// fdatasync(2).
    Sync,
    /// fallocate(2).
    Allocate {
        /// Its flags.
        mode: libc::c_int,
        /// In bytes.
        range: Range<u64>,
    },
    /// An ioctl of the kernel's block layer that takes `uint64_t range[2]`.
    Control {
        /// Its number.
        request: libc::c_ulong,
        /// In bytes.
        range: Range<u64>,
    },
}

/// An open disk. All offsets are checked against the size that it had when it was last measured.
#[derive(Debug)]
pub struct Disk {
    file: File,
    kind: Kind,
    direct: Option<Direct>,
    sectors: u64,
    logical: u32,
    physical: u32,
}

impl Disk {
    /// Takes over an open file, with O_DIRECT or without; a trailing part of a block is out of the guest's reach.
    pub fn new(file: File) -> Result<Self, DiskError> {
        let file_type = file.metadata()?.file_type();
        let direct = direct(&file)?;
        let unit = direct.map_or(SECTOR, |direct| direct.unit.max(SECTOR)) as u32;
        let (kind, logical, physical) = if file_type.is_file() {
            (Kind::File, unit, 4096)
        } else if file_type.is_block_device() {
            (Kind::Device, query::<u32>(&file, BLKSSZGET)?.max(unit), query::<u32>(&file, BLKPBSZGET)?)
        } else {
            return Err(DiskError::Kind);
        };
        if !logical.is_power_of_two() || !(512..=4096).contains(&logical) {
            return Err(DiskError::Block(logical));
        }
        let mut disk = Self { file, kind, direct, sectors: 0, logical, physical: physical.max(logical) };
        disk.measure()?;
        Ok(disk)
    }

    /// Looks how large it is now; whether that has changed.
    pub fn measure(&mut self) -> io::Result<bool> {
        let bytes = match self.kind {
            Kind::File => self.file.metadata()?.len(),
            Kind::Device => query::<u64>(&self.file, BLKGETSIZE64)?,
        };
        let sectors = bytes / u64::from(self.logical) * (u64::from(self.logical) / SECTOR);
        Ok(std::mem::replace(&mut self.sectors, sectors) != sectors)
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

    /// What offsets and lengths of reads and writes must be multiples of: 1, but for O_DIRECT.
    pub fn unit(&self) -> u64 {
        self.direct.map_or(1, |direct| direct.unit)
    }

    /// Whether it can move bytes between `offset` and these buffers without a bounce buffer.
    pub fn takes(&self, offset: u64, vectors: &[libc::iovec]) -> bool {
        let Some(Direct { memory, unit }) = self.direct else { return true };
        let fits = |vector: &libc::iovec| {
            (vector.iov_base.addr() as u64).is_multiple_of(memory) && (vector.iov_len as u64).is_multiple_of(unit)
        };
        offset.is_multiple_of(unit) && vectors.iter().all(fits)
    }

    /// Forgets the contents of `range`: a hole in a file, discarded blocks on a device.
    pub fn discard(&self, range: Range<u64>) -> Call<'static> {
        match self.kind {
            Kind::File => Call::Allocate { mode: libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, range },
            Kind::Device => Call::Control { request: BLKDISCARD, range },
        }
    }

    /// Makes `range` read as zeroes; `unmap` allows to deallocate it.
    pub fn zero(&self, range: Range<u64>, unmap: bool) -> Call<'static> {
        let mode = if unmap { libc::FALLOC_FL_PUNCH_HOLE } else { libc::FALLOC_FL_ZERO_RANGE };
        match self.kind {
            Kind::File => Call::Allocate { mode: mode | libc::FALLOC_FL_KEEP_SIZE, range },
            Kind::Device => Call::Control { request: BLKZEROOUT, range },
        }
    }

    /// Makes all writes durable (fdatasync).
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Makes one system call; how many bytes it moved.
    pub fn perform(&self, call: &Call<'_>) -> io::Result<usize> {
        let fd = self.file.as_raw_fd();
        let signed = |value: u64| libc::off_t::try_from(value).map_err(|_| io::ErrorKind::InvalidInput);
        let result = match call {
            Call::Read { offset, vectors } => {
                let (offset, count) = (signed(*offset)?, vectors.len() as libc::c_int);
                // SAFETY: the vectors are memory that stays valid as long as the call is borrowed. The guest may
                // access it meanwhile, but no Rust reference to it exists.
                unsafe { libc::preadv(fd, vectors.as_ptr(), count, offset) }
            }
            Call::Write { offset, vectors, durable } => {
                let (offset, count) = (signed(*offset)?, vectors.len() as libc::c_int);
                let flags = if *durable { libc::RWF_DSYNC } else { 0 };
                // SAFETY: as above; the kernel only reads from the vectors here.
                unsafe { libc::pwritev2(fd, vectors.as_ptr(), count, offset, flags) }
            }
            Call::Sync => return self.sync().map(|()| 0),
            Call::Allocate { mode, range } => {
                let (start, len) = (signed(range.start)?, signed(range.end - range.start)?);
                // SAFETY: no memory is passed.
                unsafe { libc::fallocate(fd, *mode, start, len) as isize }
            }
            Call::Control { request, range } => {
                let range = [range.start, range.end - range.start];
                // SAFETY: both requests that this is made with read two 64-bit numbers, which live until the call
                // returns.
                unsafe { libc::ioctl(fd, *request, range.as_ptr()) as isize }
            }
        };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }
}

impl AsRawFd for Disk {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// What the file asks for, if it was opened with O_DIRECT.
fn direct(file: &File) -> io::Result<Option<Direct>> {
    /// Of kernels before 6.1, which do not tell: what every device and file system takes.
    const COARSE: u64 = 4096;
    if !fcntl_getfl(file)?.contains(OFlags::DIRECT) {
        return Ok(None);
    }
    // STATX_DIOALIGN.
    let flags = StatxFlags::from_bits_retain(0x2000);
    let found = statx(file, "", AtFlags::EMPTY_PATH, flags).ok().filter(|found| found.stx_mask & flags.bits() != 0);
    let found = found.map(|found| (found.stx_dio_mem_align.into(), found.stx_dio_offset_align.into()));
    let (memory, unit): (u64, u64) = found.unwrap_or((COARSE, COARSE));
    let sane = |value: u64| if value.is_power_of_two() { value } else { COARSE };
    Ok(Some(Direct { memory: sane(memory), unit: sane(unit) }))
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
    fn only_files_and_block_devices_are_disks() {
        assert!(matches!(Disk::new(File::open("/dev/null").unwrap()), Err(DiskError::Kind)));
        assert!(matches!(Disk::new(File::open("/").unwrap()), Err(DiskError::Kind)));
    }
}
