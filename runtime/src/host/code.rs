//! This process' own program in memory.

use std::fs;
use std::io;

/// Lets go of all pages of programs and libraries that this process has executed so far: what it needs again comes back
/// by page faults from the page cache.
///
/// A sandbox is made by code that never runs again, which is most of what its processes have in memory. Nothing is
/// lost: only executable mappings of files are let go of, which nobody can write to.
///
/// # Errors
/// When /proc/self/maps cannot be read, and those of madvise(2).
pub fn let_go_of_code() -> io::Result<()> {
    for (start, length) in code(&fs::read_to_string("/proc/self/maps")?) {
        // SAFETY: the range is a private mapping of a file that is executable and not writable, so its pages are those of
        // the file: after MADV_DONTNEED the next access, by whatever thread, finds the same bytes (madvise(2)).
        if unsafe { libc::madvise(start as *mut libc::c_void, length, libc::MADV_DONTNEED) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Address and length of the executable mappings of files: `START-END r-xp OFFSET DEVICE INODE PATH`.
fn code(maps: &str) -> Vec<(usize, usize)> {
    let range = |line: &str| {
        let mut fields = line.split_ascii_whitespace();
        let (range, mode) = (fields.next()?, fields.next()?);
        let path = fields.nth(3)?;
        let (start, end) = range.split_once('-')?;
        let (start, end) = (usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
        (mode == "r-xp" && path.starts_with('/')).then(|| (start, end.saturating_sub(start)))
    };
    maps.lines().filter_map(range).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_executable_files_count() {
        let maps = "1000-3000 r--p 00000000 08:01 7 /bin/p\n3000-9000 r-xp 00002000 08:01 7 /bin/p\n\
                    a000-b000 rw-p 00000000 00:00 0\nb000-c000 r-xp 00000000 00:00 0 [vdso]\n\
                    c000-d000 rwxp 00000000 08:01 7 /bin/q\ne000-f000 r-xp 00000000 00:00 0\n";
        assert_eq!(code(maps), [(0x3000, 0x6000)]);
    }

    #[test]
    fn the_program_goes_on() {
        let_go_of_code().unwrap();
        assert_eq!("still here".len(), 10);
    }
}
