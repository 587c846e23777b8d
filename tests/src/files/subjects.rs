//! The files that are tried: what is at `in/t` when an operation begins.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt, chown, lchown, symlink};
use std::path::Path;

use anyhow::Result;
use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, makedev, mknodat, utimensat};

use super::operations::USER;

/// Makes a file at the path.
type Make = fn(&Path) -> Result<()>;
/// A kind of file: its name, the mode of the folder that it is in, and what makes it.
pub type Subject = (&'static str, u32, Make);

/// Kinds of files: name, permissions of the directory, maker.
pub const SUBJECTS: &[Subject] = &[
    ("nothing", 0o777, |_| Ok(())),
    ("a file", 0o777, |at| file(at, 0, 0o644)),
    ("an own file", 0o777, |at| file(at, USER, 0o640)),
    ("an own file with set-id bits", 0o777, |at| file(at, USER, 0o6755)),
    ("a file with set-id bits", 0o777, |at| file(at, 0, 0o6777)),
    ("a file for reading", 0o777, |at| file(at, USER, 0o444)),
    ("a secret file", 0o777, |at| file(at, 0, 0o600)),
    ("a file of nobody's permissions", 0o777, |at| file(at, USER, 0)),
    ("a file with two names", 0o777, |at| {
        file(at, USER, 0o644)?;
        Ok(fs::hard_link(at, at.with_file_name("name"))?)
    }),
    ("a file with a hole", 0o777, |at| {
        file(at, USER, 0o644)?;
        Ok(OpenOptions::new().write(true).open(at)?.write_all_at(b"after the hole", 1 << 20)?)
    }),
    ("a directory", 0o777, |at| directory(at, 0, 0o755)),
    ("an own directory", 0o777, |at| directory(at, USER, 0o700)),
    ("a directory with set-id bits", 0o777, |at| directory(at, 0, 0o2777)),
    ("a full directory", 0o777, |at| {
        directory(at, USER, 0o755)?;
        file(&at.join("sub"), USER, 0o644)
    }),
    ("a secret directory", 0o777, |at| {
        directory(at, 0, 0o700)?;
        file(&at.join("sub"), 0, 0o644)
    }),
    ("a link to a file", 0o777, |at| {
        file(&at.with_file_name("target"), USER, 0o644)?;
        link(at, "target")
    }),
    ("a link to a directory", 0o777, |at| {
        directory(&at.with_file_name("target"), USER, 0o755)?;
        link(at, "target")
    }),
    ("a link to nothing", 0o777, |at| link(at, "nowhere")),
    ("a link to itself", 0o777, |at| link(at, "t")),
    ("a pipe", 0o777, |at| node(at, FileType::Fifo)),
    ("a socket", 0o777, |at| node(at, FileType::Socket)),
    ("a device", 0o777, |at| node(at, FileType::CharacterDevice)),
    ("a file in a directory that may only be read", 0o644, |at| file(at, USER, 0o666)),
    ("a file in a directory that may not be changed", 0o555, |at| file(at, USER, 0o666)),
    ("nothing in a directory that may not be changed", 0o555, |_| Ok(())),
    ("a file in a directory with the sticky bit", 0o1777, |at| file(at, 0, 0o666)),
    ("an own file in a directory with the sticky bit", 0o1777, |at| file(at, USER, 0o666)),
    ("nothing in a directory with set-id bits", 0o2777, |at| Ok(chown(at.with_file_name("."), None, Some(77))?)),
];

/// The time of everything before an operation begins, in seconds.
pub const BEFORE: i64 = 1_000_000;

/// Makes `in` and what is in it, as root.
///
/// # Errors
/// When anything cannot be made.
pub fn prepare((_, permissions, make): &Subject, with_others: bool) -> Result<()> {
    let directory_of = Path::new("in");
    fs::create_dir(directory_of)?;
    make(&directory_of.join("t"))?;
    if with_others {
        file(&directory_of.join("file"), USER, 0o644)?;
        directory(&directory_of.join("empty"), USER, 0o755)?;
        directory(&directory_of.join("full"), USER, 0o755)?;
        file(&directory_of.join("full/entry"), USER, 0o644)?;
    }
    // With set-id bits of its own, if the maker gave it another group.
    fs::set_permissions(directory_of, PermissionsExt::from_mode(*permissions))?;
    for entry in fs::read_dir(directory_of)? {
        age(&entry?.path())?;
    }
    age(directory_of)
}

fn age(path: &Path) -> Result<()> {
    let time = Timespec { tv_sec: BEFORE, tv_nsec: 0 };
    let times = Timestamps { last_access: time, last_modification: time };
    Ok(utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

fn own(at: &Path, owner: u32, mode: u32) -> Result<()> {
    chown(at, Some(owner), Some(owner))?;
    Ok(fs::set_permissions(at, PermissionsExt::from_mode(mode))?)
}

fn file(at: &Path, owner: u32, mode: u32) -> Result<()> {
    File::create_new(at)?.write_all_at(b"0123456789", 0)?;
    own(at, owner, mode)
}

fn directory(at: &Path, owner: u32, mode: u32) -> Result<()> {
    fs::create_dir(at)?;
    own(at, owner, mode)
}

fn link(at: &Path, target: &str) -> Result<()> {
    symlink(target, at)?;
    Ok(lchown(at, Some(USER), Some(USER))?)
}

fn node(at: &Path, kind: FileType) -> Result<()> {
    mknodat(CWD, at, kind, Mode::from_bits_retain(0o666), makedev(1, 3))?;
    own(at, 0, 0o666)
}
