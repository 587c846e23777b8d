//! What is tried on them. Each operation says what it got, or the error.

use std::ffi::CString;

use rustix::fs::{
    Access, AtFlags, CWD, FallocateFlags, FileType, Gid, Mode, OFlags, RawDir, RenameFlags, SeekFrom, Timespec,
    Timestamps, UTIME_NOW, UTIME_OMIT, Uid, XattrFlags, accessat, chmodat, chownat, fallocate, flock, ftruncate,
    linkat, mkdirat, mknodat, openat, readlinkat, renameat, renameat_with, statx, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;

/// An ordinary user and its group.
pub const USER: u32 = 1000;
/// Another group of that user.
pub const GROUP: u32 = 2000;

/// What came of it.
pub type Outcome = Result<String, Errno>;
/// An operation by its name.
type Named = (&'static str, fn() -> Outcome);

/// One operation.
pub struct Operation {
    /// Its name.
    pub name: String,
    /// It needs other files beside the one that is tried.
    pub with_others: bool,
    /// Does it, with the folder that has `in` as the working directory.
    pub act: Box<dyn Fn() -> Outcome>,
}

const T: &str = "in/t";

/// All of them.
#[must_use]
pub fn all() -> Vec<Operation> {
    let mut all = Vec::new();
    let mut add = |name: &str, with_others: bool, act: Box<dyn Fn() -> Outcome>| {
        all.push(Operation { name: name.to_owned(), with_others, act });
    };
    for (name, flags) in OPENS {
        add(&format!("open {name}"), false, Box::new(move || open(*flags)));
    }
    for (name, act) in PLAIN {
        add(name, false, Box::new(act));
    }
    for (name, act) in WITH_OTHERS {
        add(name, true, Box::new(act));
    }
    all
}

const OPENS: &[(&str, OFlags)] = &[
    ("for reading", OFlags::RDONLY),
    ("for writing", OFlags::WRONLY),
    ("for both", OFlags::RDWR),
    ("to append", OFlags::WRONLY.union(OFlags::APPEND)),
    ("to truncate", OFlags::WRONLY.union(OFlags::TRUNC)),
    ("to create", OFlags::RDWR.union(OFlags::CREATE)),
    ("to create a new one", OFlags::WRONLY.union(OFlags::CREATE).union(OFlags::EXCL)),
    ("to create or truncate", OFlags::WRONLY.union(OFlags::CREATE).union(OFlags::TRUNC)),
    ("a directory", OFlags::RDONLY.union(OFlags::DIRECTORY)),
    ("a directory for writing", OFlags::RDWR.union(OFlags::DIRECTORY)),
    ("no link", OFlags::RDONLY.union(OFlags::NOFOLLOW)),
    ("only to find it", OFlags::PATH.union(OFlags::NOFOLLOW)),
    ("an unnamed file", OFlags::TMPFILE.union(OFlags::RDWR)),
    ("without access times", OFlags::RDONLY.union(OFlags::NOATIME)),
];

/// Opens, reads or writes a little, and tells what is open.
fn open(flags: OFlags) -> Outcome {
    let file = openat(CWD, T, flags | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::from_bits_retain(0o6666))?;
    let stat = rustix::fs::fstat(&file)?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    let mut said = format!("{kind:?} {:o}", stat.st_mode & 0o7777);
    if kind == FileType::RegularFile && !flags.contains(OFlags::PATH) {
        let mut bytes = [0; 4];
        said += &format!(" read {:?}", rustix::io::read(&file, &mut bytes).map_err(Errno::raw_os_error));
        said += &format!(" write {:?}", rustix::io::write(&file, b"w").map_err(Errno::raw_os_error));
        said += &format!(" at 2 {:?}", rustix::io::pwrite(&file, b"p", 2).map_err(Errno::raw_os_error));
        said += &format!(" size {}", rustix::fs::fstat(&file)?.st_size);
    }
    Ok(said)
}

fn to_write() -> Result<std::os::fd::OwnedFd, Errno> {
    openat(CWD, T, OFlags::RDWR | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

fn ok((): ()) -> String {
    "done".to_owned()
}

fn new(mode: u32) -> Mode {
    Mode::from_bits_retain(mode)
}

fn time(tv_sec: i64, tv_nsec: i64) -> Timespec {
    Timespec { tv_sec, tv_nsec: tv_nsec as _ }
}

fn set_times(last_access: Timespec, last_modification: Timespec, flags: AtFlags) -> Outcome {
    utimensat(CWD, T, &Timestamps { last_access, last_modification }, flags).map(ok)
}

fn change_owner(path: &str, uid: Option<u32>, gid: Option<u32>, flags: AtFlags) -> Outcome {
    chownat(CWD, path, uid.map(Uid::from_raw), gid.map(Gid::from_raw), flags).map(ok)
}

fn truncate(len: i64) -> Outcome {
    let path = CString::new(T).map_err(|_| Errno::INVAL)?;
    // SAFETY: the path is a C string that outlives the call.
    if unsafe { libc::truncate(path.as_ptr(), len) } == 0 {
        return Ok("done".to_owned());
    }
    Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
}

fn describe(flags: AtFlags) -> Outcome {
    let stat = statx(CWD, T, flags, rustix::fs::StatxFlags::BASIC_STATS)?;
    let kind = FileType::from_raw_mode(stat.stx_mode.into());
    let size = if kind == FileType::Directory { 0 } else { stat.stx_size };
    Ok(format!("{kind:?} {:o} {} {}:{} {size}", stat.stx_mode & 0o7777, stat.stx_nlink, stat.stx_uid, stat.stx_gid))
}

fn list() -> Outcome {
    let directory = openat(CWD, T, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NONBLOCK, Mode::empty())?;
    let mut buffer = Vec::with_capacity(4096);
    let mut entries = RawDir::new(directory, buffer.spare_capacity_mut());
    let mut names = Vec::new();
    while let Some(entry) = entries.next() {
        let entry = entry?;
        names.push(format!("{} {:?}", entry.file_name().to_string_lossy(), entry.file_type()));
    }
    names.sort_unstable();
    Ok(names.join(", "))
}

fn renamed(new: &str) -> Outcome {
    renameat(CWD, T, CWD, new).map(ok)
}

fn renamed_with(new: &str, flags: RenameFlags) -> Outcome {
    renameat_with(CWD, T, CWD, new, flags).map(ok)
}

fn allocate(flags: FallocateFlags, offset: u64, len: u64) -> Outcome {
    fallocate(to_write()?, flags, offset, len).map(ok)
}

fn number(value: u64) -> String {
    value.to_string()
}

const NAME: &str = "user.note";

const PLAIN: &[Named] = &[
    ("stat", || describe(AtFlags::empty())),
    ("stat of a link", || describe(AtFlags::SYMLINK_NOFOLLOW)),
    ("stat with a slash", || {
        statx(CWD, "in/t/", AtFlags::empty(), rustix::fs::StatxFlags::BASIC_STATS).map(|_| String::new())
    }),
    ("stat beneath", || {
        statx(CWD, "in/t/sub", AtFlags::empty(), rustix::fs::StatxFlags::BASIC_STATS).map(|_| String::new())
    }),
    ("stat of above", || {
        statx(CWD, "in/t/..", AtFlags::empty(), rustix::fs::StatxFlags::BASIC_STATS)
            .map(|stat| format!("{:o}", stat.stx_mode))
    }),
    ("access", || accessat(CWD, T, Access::EXISTS, AtFlags::empty()).map(ok)),
    ("access for reading", || accessat(CWD, T, Access::READ_OK, AtFlags::empty()).map(ok)),
    ("access for writing", || accessat(CWD, T, Access::WRITE_OK, AtFlags::empty()).map(ok)),
    ("access to run", || accessat(CWD, T, Access::EXEC_OK, AtFlags::EACCESS).map(ok)),
    ("chmod 600", || chmodat(CWD, T, new(0o600), AtFlags::empty()).map(ok)),
    ("chmod 7777", || chmodat(CWD, T, new(0o7777), AtFlags::empty()).map(ok)),
    ("chmod 2710", || chmodat(CWD, T, new(0o2710), AtFlags::empty()).map(ok)),
    ("chown to the user", || change_owner(T, Some(USER), Some(USER), AtFlags::empty())),
    ("chown to root", || change_owner(T, Some(0), Some(0), AtFlags::SYMLINK_NOFOLLOW)),
    ("chown to another group", || change_owner(T, None, Some(GROUP), AtFlags::empty())),
    ("chown to a foreign group", || change_owner(T, None, Some(77), AtFlags::empty())),
    ("chown to nobody else", || change_owner(T, None, None, AtFlags::empty())),
    ("truncate to nothing", || truncate(0)),
    ("truncate to more", || truncate(5000)),
    ("truncate to less than nothing", || truncate(-1)),
    ("unlink", || unlinkat(CWD, T, AtFlags::empty()).map(ok)),
    ("unlink with a slash", || unlinkat(CWD, "in/t/", AtFlags::empty()).map(ok)),
    ("rmdir", || unlinkat(CWD, T, AtFlags::REMOVEDIR).map(ok)),
    ("rmdir of itself", || unlinkat(CWD, "in/t/.", AtFlags::REMOVEDIR).map(ok)),
    ("rmdir of above", || unlinkat(CWD, "in/t/..", AtFlags::REMOVEDIR).map(ok)),
    ("unlink while it is open", || {
        let file = to_write()?;
        unlinkat(CWD, T, AtFlags::empty())?;
        rustix::io::pwrite(&file, b"x", 0)?;
        let stat = rustix::fs::fstat(&file)?;
        Ok(format!("{} {}", stat.st_nlink, stat.st_size))
    }),
    ("mkdir", || mkdirat(CWD, T, new(0o7777)).map(ok)),
    ("mkdir beneath", || mkdirat(CWD, "in/t/new", new(0o755)).map(ok)),
    ("mkdir with a slash", || mkdirat(CWD, "in/t/", new(0o755)).map(ok)),
    ("mknod of a file", || mknodat(CWD, T, FileType::RegularFile, new(0o6666), 0).map(ok)),
    ("mknod of a pipe", || mknodat(CWD, T, FileType::Fifo, new(0o666), 0).map(ok)),
    ("mknod of a socket", || mknodat(CWD, T, FileType::Socket, new(0o666), 0).map(ok)),
    ("mknod of a device", || mknodat(CWD, T, FileType::CharacterDevice, new(0o666), 0x103).map(ok)),
    ("symlink", || symlinkat("anywhere", CWD, T).map(ok)),
    ("symlink to nothing", || symlinkat("", CWD, T).map(ok)),
    ("readlink", || readlinkat(CWD, T, Vec::new()).map(|text| text.to_string_lossy().into_owned())),
    ("create beneath", || {
        openat(CWD, "in/t/new", OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC, new(0o666)).map(|_| String::new())
    }),
    ("list", list),
    ("times", || set_times(time(1234, 5), time(5678, 9), AtFlags::empty())),
    ("times of a link", || set_times(time(1234, 5), time(-5678, 0), AtFlags::SYMLINK_NOFOLLOW)),
    ("times now", || set_times(time(0, UTIME_NOW), time(0, UTIME_NOW), AtFlags::empty())),
    ("one of the times", || set_times(time(0, UTIME_OMIT), time(42, 0), AtFlags::empty())),
    ("none of the times", || set_times(time(0, UTIME_OMIT), time(0, UTIME_OMIT), AtFlags::empty())),
    ("times that are none", || set_times(time(0, 1_000_000_000), time(0, 0), AtFlags::empty())),
    ("setxattr", || rustix::fs::setxattr(T, NAME, b"value", XattrFlags::empty()).map(ok)),
    ("setxattr of what must be there", || rustix::fs::setxattr(T, NAME, b"value", XattrFlags::REPLACE).map(ok)),
    ("setxattr twice, getxattr, listxattr", || {
        rustix::fs::setxattr(T, NAME, b"value", XattrFlags::CREATE)?;
        let again = rustix::fs::setxattr(T, NAME, b"value", XattrFlags::CREATE);
        let (mut value, mut names) = ([0; 64], [0; 1024]);
        let len = rustix::fs::getxattr(T, NAME, &mut value[..])?;
        let short = rustix::fs::getxattr(T, NAME, &mut [0; 2][..]);
        let listed = rustix::fs::listxattr(T, &mut names[..])?;
        let is_listed = names.get(..listed).is_some_and(|names| names.windows(10).any(|name| name == b"user.note\0"));
        Ok(format!("{again:?} {:?} {short:?} {is_listed}", value.get(..len)))
    }),
    ("getxattr", || rustix::fs::getxattr(T, NAME, &mut [0; 64][..]).map(|len| number(len as u64))),
    ("removexattr", || rustix::fs::removexattr(T, NAME).map(ok)),
    ("setxattr of no such name space", || rustix::fs::setxattr(T, "none.x", b"x", XattrFlags::empty()).map(ok)),
    ("setxattr of a trusted one", || rustix::fs::setxattr(T, "trusted.x", b"x", XattrFlags::empty()).map(ok)),
    ("getxattr of a trusted one", || {
        rustix::fs::getxattr(T, "trusted.x", &mut [0; 64][..]).map(|len| number(len as u64))
    }),
    ("write", || rustix::io::pwrite(to_write()?, b"written", 5).map(|len| number(len as u64))),
    ("write nothing", || rustix::io::pwrite(to_write()?, b"", 100).map(|len| number(len as u64))),
    ("read from beyond its end", || {
        rustix::io::pread(to_write()?, &mut [0; 4][..], 1 << 40).map(|len| number(len as u64))
    }),
    ("ftruncate", || ftruncate(to_write()?, 3).map(ok)),
    ("ftruncate without leave", || {
        let file = openat(CWD, T, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?;
        ftruncate(file, 3).map(ok)
    }),
    ("seek", || {
        let file = to_write()?;
        let to = |whence| rustix::fs::seek(&file, whence).map_err(Errno::raw_os_error);
        let (end, before) = (to(SeekFrom::End(3)), to(SeekFrom::Current(-100)));
        Ok(format!("{end:?} {before:?} {:?} {:?}", to(SeekFrom::Data(0)), to(SeekFrom::Data(1 << 30))))
    }),
    ("seek to a hole", || rustix::fs::seek(to_write()?, SeekFrom::Hole(0)).map(number)),
    ("fallocate", || allocate(FallocateFlags::empty(), 0, 5000)),
    ("fallocate beyond its end", || allocate(FallocateFlags::KEEP_SIZE, 100, 5000)),
    ("fallocate a hole", || allocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 2, 4)),
    ("fallocate nothing", || allocate(FallocateFlags::empty(), 0, 0)),
    ("sync", || rustix::fs::fsync(to_write()?).map(ok)),
    ("lock", || {
        let (one, other) = (to_write()?, to_write()?);
        flock(&one, rustix::fs::FlockOperation::NonBlockingLockExclusive)?;
        let refused = flock(&other, rustix::fs::FlockOperation::NonBlockingLockShared);
        Ok(format!("{refused:?}"))
    }),
    ("link beneath", || linkat(CWD, T, CWD, "in/t/new", AtFlags::empty()).map(ok)),
    ("rename beneath itself", || renamed("in/t/new")),
    ("rename to itself", || renamed(T)),
    ("rename to a long name", || renamed(&format!("in/{}", "n".repeat(255)))),
    ("rename to too long a name", || renamed(&format!("in/{}", "n".repeat(256)))),
    ("rename to too long a path", || renamed(&format!("in{}/n", "/.".repeat(2048)))),
    ("rename to above", || renamed("in/..")),
    ("rename with no such flag", || renamed_with("in/new", RenameFlags::from_bits_retain(1 << 10))),
];

const WITH_OTHERS: &[Named] = &[
    ("rename", || renamed("in/new")),
    ("rename over a file", || renamed("in/file")),
    ("rename over an empty directory", || renamed("in/empty")),
    ("rename over a full directory", || renamed("in/full")),
    ("rename into a directory", || renamed("in/empty/new")),
    ("rename another over it", || renameat(CWD, "in/file", CWD, T).map(ok)),
    ("rename a directory over it", || renameat(CWD, "in/full", CWD, T).map(ok)),
    ("rename to a new name only", || renamed_with("in/new", RenameFlags::NOREPLACE)),
    ("rename over no file", || renamed_with("in/file", RenameFlags::NOREPLACE)),
    ("exchange with a file", || renamed_with("in/file", RenameFlags::EXCHANGE)),
    ("exchange with a directory", || renamed_with("in/full", RenameFlags::EXCHANGE)),
    ("exchange with nothing", || renamed_with("in/new", RenameFlags::EXCHANGE)),
    ("link", || linkat(CWD, T, CWD, "in/new", AtFlags::empty()).map(ok)),
    ("link to what a link names", || linkat(CWD, T, CWD, "in/new", AtFlags::SYMLINK_FOLLOW).map(ok)),
    ("link over a file", || linkat(CWD, T, CWD, "in/file", AtFlags::empty()).map(ok)),
    ("link into a directory", || linkat(CWD, T, CWD, "in/empty/new", AtFlags::empty()).map(ok)),
    ("copy into it", || {
        let from = openat(CWD, "in/file", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let copied = rustix::fs::copy_file_range(from, Some(&mut 2), to_write()?, Some(&mut 1), 5)?;
        Ok(number(copied as u64))
    }),
];
