//! A file that is written, read, cut, mapped and holed at random, beside what should be in it.

use std::collections::VecDeque;
use std::ffi::c_void;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::ptr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::fs::{FallocateFlags, copy_file_range, fallocate};
use rustix::io::Errno;
use rustix::mm::{MapFlags, MsyncFlags, ProtFlags, mmap, msync, munmap};

/// The file is never longer, in bytes.
const MAX: usize = 256 << 10;
/// One write or read is never longer.
const MAX_PIECE: usize = 80 << 10;
/// How many operations an error tells of.
const TOLD: usize = 30;
/// All of the file is compared each time after so many.
const WHOLE: u64 = 64;

/// A file and what is in it.
pub struct Fsx {
    path: PathBuf,
    file: File,
    model: Vec<u8>,
    random: u64,
    done: u64,
    last: VecDeque<String>,
}

/// FNV-1a.
#[must_use]
pub fn digest(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

impl Fsx {
    /// A new, empty file; `seed` decides all that is done with it.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn new(path: &Path, seed: u64) -> Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
        let random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        Ok(Self { path: path.into(), file, model: Vec::new(), random, done: 0, last: VecDeque::new() })
    }

    /// What should be in the file.
    #[must_use]
    pub fn model(&self) -> &[u8] {
        &self.model
    }

    /// Goes on for a while; how many operations there were in all.
    ///
    /// # Errors
    /// When the file is not what it should be, with what was done last.
    pub fn run(&mut self, time: Duration) -> Result<u64> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.step()?;
        }
        self.compare_all().with_context(|| self.told())?;
        Ok(self.done)
    }

    fn told(&self) -> String {
        let last: Vec<_> = self.last.iter().map(String::as_str).collect();
        format!("after {} operations, the last of them:\n{}", self.done, last.join("\n"))
    }

    fn step(&mut self) -> Result<()> {
        self.done += 1;
        self.act().with_context(|| self.told())?;
        if self.done.is_multiple_of(WHOLE) {
            self.compare_all().with_context(|| self.told())?;
        }
        Ok(())
    }

    fn act(&mut self) -> Result<()> {
        match self.below(22) {
            0..=3 => self.write(),
            4 => self.append(),
            5..=7 => self.read(),
            8 | 9 => self.map_and_write(),
            10 | 11 => self.map_and_read(),
            12..=14 => self.truncate(),
            15 => self.allocate(FallocateFlags::empty()),
            16 => self.allocate(FallocateFlags::KEEP_SIZE),
            17 => self.allocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE),
            18 => self.allocate(FallocateFlags::ZERO_RANGE),
            19 => self.copy(),
            20 => self.open_again(),
            _ => self.sync(),
        }
    }

    /// xorshift64.
    fn next(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() >> 16) as usize % end.max(1)
    }

    /// A place and a length that end at `end` at the latest. Often at the bounds of pages, where mistakes are.
    fn range(&mut self, end: usize) -> (usize, usize) {
        let mut at = self.below(end);
        if self.below(3) == 0 {
            at &= !4095;
        }
        let mut len = 1 + self.below(MAX_PIECE);
        if self.below(3) == 0 {
            len = len.next_multiple_of(4096);
        }
        (at, len.min(end - at))
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let first = self.next();
        (0..len as u64).map(|at| (first.wrapping_add(at.wrapping_mul(31)) >> (at % 23)) as u8).collect()
    }

    fn tell(&mut self, what: &str, at: usize, len: usize) {
        if self.last.len() == TOLD {
            self.last.pop_front();
        }
        self.last.push_back(format!("{} {what} at {at:#x} for {len:#x} of {:#x}", self.done, self.model.len()));
    }

    /// Puts bytes into the model, which grows as a file does.
    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.model.resize(self.model.len().max(at + bytes.len()), 0);
        for (to, from) in self.model.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    }

    fn part(&self, at: usize, len: usize) -> &[u8] {
        let end = (at + len).min(self.model.len());
        self.model.get(at.min(end)..end).unwrap_or_default()
    }

    fn write(&mut self) -> Result<()> {
        let (at, len) = self.range(MAX);
        self.tell("write", at, len);
        let bytes = self.bytes(len);
        self.file.write_all_at(&bytes, at as u64)?;
        self.put(at, &bytes);
        self.compare_size()
    }

    fn append(&mut self) -> Result<()> {
        let len = self.below(5000).min(MAX - self.model.len());
        self.tell("append", self.model.len(), len);
        let bytes = self.bytes(len);
        std::io::Write::write_all(&mut OpenOptions::new().append(true).open(&self.path)?, &bytes)?;
        self.put(self.model.len(), &bytes);
        self.compare_size()
    }

    fn read(&mut self) -> Result<()> {
        let (at, len) = self.range(MAX);
        self.tell("read", at, len);
        let mut bytes = vec![0; len];
        let mut got = 0;
        loop {
            match self.file.read_at(bytes.get_mut(got..).unwrap_or_default(), (at + got) as u64)? {
                0 => break,
                more => got += more,
            }
        }
        same(self.part(at, len), bytes.get(..got).unwrap_or_default(), at)
    }

    fn map_and_write(&mut self) -> Result<()> {
        let (at, len) = self.range(self.model.len());
        self.tell("map and write", at, len);
        if len == 0 {
            return Ok(());
        }
        let bytes = self.bytes(len);
        let is_synced = self.below(2) == 0;
        with_mapping(&self.file, at, len, ProtFlags::READ | ProtFlags::WRITE, |mapped, start, whole| {
            // SAFETY: the mapping has `len` bytes from there, all of them within the file, which only this thread changes.
            unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), mapped, len) };
            if is_synced {
                // SAFETY: `start` and `whole` are those of the mapping.
                unsafe { msync(start, whole, MsyncFlags::SYNC) }?;
            }
            Ok(())
        })?;
        self.put(at, &bytes);
        Ok(())
    }

    fn map_and_read(&mut self) -> Result<()> {
        let (at, len) = self.range(self.model.len());
        self.tell("map and read", at, len);
        if len == 0 {
            return Ok(());
        }
        let mut bytes = vec![0; len];
        with_mapping(&self.file, at, len, ProtFlags::READ, |mapped, _, _| {
            // SAFETY: as in `map_and_write`, the other way.
            unsafe { ptr::copy_nonoverlapping(mapped, bytes.as_mut_ptr(), len) };
            Ok(())
        })?;
        same(self.part(at, len), &bytes, at)
    }

    fn truncate(&mut self) -> Result<()> {
        let len = self.below(MAX);
        self.tell("truncate", len, 0);
        self.file.set_len(len as u64)?;
        self.model.resize(len, 0);
        self.compare_size()
    }

    fn allocate(&mut self, flags: FallocateFlags) -> Result<()> {
        let (at, len) = self.range(MAX);
        self.tell(&format!("fallocate {flags:?}"), at, len);
        match fallocate(&self.file, flags, at as u64, len as u64) {
            // Not every file system of a host has all kinds.
            Err(Errno::OPNOTSUPP) => return Ok(()),
            outcome => outcome?,
        }
        if flags.intersects(FallocateFlags::PUNCH_HOLE | FallocateFlags::ZERO_RANGE) {
            self.model.iter_mut().skip(at).take(len).for_each(|byte| *byte = 0);
        }
        if !flags.contains(FallocateFlags::KEEP_SIZE) {
            self.model.resize(self.model.len().max(at + len), 0);
        }
        self.compare_size()
    }

    fn copy(&mut self) -> Result<()> {
        let (from, len) = self.range(self.model.len());
        let to = self.below(MAX - len + 1);
        self.tell(&format!("copy from {from:#x}"), to, len);
        // Not onto itself: copy_file_range(2) refuses that.
        if len == 0 || from.abs_diff(to) < len {
            return Ok(());
        }
        let bytes = self.part(from, len).to_vec();
        let (mut read, mut written) = (from as u64, to as u64);
        let mut left = len;
        while left > 0 {
            match copy_file_range(&self.file, Some(&mut read), &self.file, Some(&mut written), left)? {
                0 => bail!("{left:#x} bytes were not copied"),
                done => left -= done,
            }
        }
        self.put(to, &bytes);
        self.compare_size()
    }

    fn open_again(&mut self) -> Result<()> {
        self.tell("open again", 0, 0);
        self.file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOATIME).open(&self.path)?;
        self.compare_size()
    }

    fn sync(&mut self) -> Result<()> {
        self.tell("sync", 0, 0);
        Ok(self.file.sync_all()?)
    }

    fn compare_size(&self) -> Result<()> {
        let (by_file, by_path) = (self.file.metadata()?.len(), std::fs::metadata(&self.path)?.len());
        let len = self.model.len() as u64;
        ensure!((by_file, by_path) == (len, len), "it has {by_file:#x} or {by_path:#x} bytes instead of {len:#x}");
        Ok(())
    }

    fn compare_all(&self) -> Result<()> {
        same(&self.model, &std::fs::read(&self.path)?, 0)
    }
}

fn same(expected: &[u8], got: &[u8], at: usize) -> Result<()> {
    ensure!(expected.len() == got.len(), "{:#x} bytes were read instead of {:#x}", got.len(), expected.len());
    if let Some(first) = expected.iter().zip(got).position(|(one, other)| one != other) {
        let last = expected.iter().zip(got).rposition(|(one, other)| one != other).unwrap_or(first);
        bail!("what is from {:#x} to {:#x} is not what was written", at + first, at + last);
    }
    Ok(())
}

/// Maps `len` bytes from `at`; gives where they are, and where the mapping begins and how long it is.
fn with_mapping(
    file: &File,
    at: usize,
    len: usize,
    protection: ProtFlags,
    act: impl FnOnce(*mut u8, *mut c_void, usize) -> Result<()>,
) -> Result<()> {
    let before = at % 4096;
    let whole = before + len;
    // SAFETY: the kernel chooses a place where nothing is.
    let start = unsafe { mmap(ptr::null_mut(), whole, protection, MapFlags::SHARED, file, (at - before) as u64) }?;
    // SAFETY: `before` is within the mapping.
    let done = act(unsafe { start.cast::<u8>().add(before) }, start, whole);
    // SAFETY: nothing refers to the mapping any more.
    unsafe { munmap(start, whole) }?;
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_the_host_is_what_it_should_be() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let mut fsx = Fsx::new(&path, 1).unwrap();
        for _ in 0..2000 {
            fsx.step().unwrap();
        }
        assert_eq!(digest(&std::fs::read(&path).unwrap()), digest(fsx.model()));
        // Somebody else writes to it.
        let len = fsx.model().len() as u64;
        File::options().write(true).open(&path).unwrap().write_all_at(b"!!!!", len).unwrap();
        assert!(fsx.run(Duration::ZERO).unwrap_err().to_string().starts_with("after 2000 operations"));
    }
}
