//! System calls on shared files, none of which the guest knows yet.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MsFlags, mount};
use nix::sys::stat::stat;

/// The tag of the share.
pub const TAG: &str = "bench";
/// The folder of it that everything is in.
pub const FOLDER: &str = "files";
const MOUNT_POINT: &str = "/share";
/// Where the folder is worked on, mounted once more: so paths begin in it, as those of a container begin in its root.
const WORK: &str = "/work";
/// Bytes of a small file.
const SMALL: usize = 4 << 10;
/// Bytes of one read(2) or write(2) of a large one.
const CHUNK: usize = 1 << 20;
/// Files of a folder.
const IN_A_FOLDER: usize = 64;

/// What is done to how many files, or MiB.
#[derive(Clone, Copy, Debug)]
pub enum Files {
    /// stat(2).
    Look,
    /// statx(2) with the time of birth, which coreutils and Rust's programs ask for.
    LookAtBirth,
    /// open(2), read(2) of all of it, close(2).
    Read,
    /// open(2) and close(2) of the same one.
    OpenAgain,
    /// Folders are listed, with stat(2) of each entry.
    List,
    /// open(2), write(2), close(2).
    Create,
    /// unlink(2).
    Remove,
    /// read(2) of a large file.
    ReadLarge,
    /// write(2) of a large file, and fsync(2).
    WriteLarge,
}

/// What the host has in the share's [`FOLDER`] before.
///
/// # Errors
/// Those of the file system.
pub fn fill(root: &Path) -> Result<()> {
    for work in [Files::Look, Files::LookAtBirth, Files::Read, Files::List] {
        for index in 0..512 {
            let path = small(root, work, index);
            fs::create_dir_all(path.parent().unwrap_or(root))?;
            fs::write(path, [b'x'; SMALL])?;
        }
    }
    fs::create_dir(root.join("new"))?;
    fs::write(root.join("again"), [b'x'; SMALL])?;
    fs::write(root.join("large"), vec![b'x'; 32 * CHUNK])?;
    Ok(())
}

/// Each kind of work has files of its own: they are all new to the guest.
fn small(root: &Path, work: Files, index: usize) -> PathBuf {
    root.join(format!("{work:?}-{}", index / IN_A_FOLDER)).join(format!("file-{index}"))
}

/// Mounts the share and its folder.
///
/// # Errors
/// Those of mount(2).
pub fn set_up() -> Result<()> {
    fs::create_dir(MOUNT_POINT)?;
    mount(Some(TAG), MOUNT_POINT, Some("virtiofs"), MsFlags::empty(), None::<&str>)?;
    fs::create_dir(WORK)?;
    mount(Some(&Path::new(MOUNT_POINT).join(FOLDER)), WORK, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    Ok(())
}

/// Does it, `count` times.
///
/// # Errors
/// When a system call fails, or is not what the host has put there.
pub fn run(work: Files, count: usize) -> Result<()> {
    let root = Path::new(WORK);
    let made = |index: usize| root.join("new").join(format!("file-{index}"));
    match work {
        Files::Look => each(count, |index| {
            ensure!(stat(&small(root, work, index))?.st_size == SMALL as i64, "another length");
            Ok(())
        }),
        Files::LookAtBirth => each(count, |index| {
            ensure!(fs::metadata(small(root, work, index))?.len() == SMALL as u64, "another length");
            Ok(())
        }),
        Files::Read => each(count, |index| {
            ensure!(fs::read(small(root, work, index))?.len() == SMALL, "another length");
            Ok(())
        }),
        Files::OpenAgain => each(count, |_| {
            File::open(root.join("again"))?;
            Ok(())
        }),
        Files::List => {
            let mut seen = 0;
            for folder in 0..count / IN_A_FOLDER {
                let path = small(root, work, folder * IN_A_FOLDER);
                for entry in fs::read_dir(path.parent().context("a file without a folder")?)? {
                    seen += usize::from(stat(&entry?.path())?.st_size == SMALL as i64);
                }
            }
            ensure!(seen == count, "{seen} files");
            Ok(())
        }
        Files::Create => each(count, |index| Ok(fs::write(made(index), [b'y'; SMALL])?)),
        Files::Remove => each(count, |index| Ok(fs::remove_file(made(index))?)),
        Files::ReadLarge => {
            let (mut file, mut chunk) = (File::open(root.join("large"))?, vec![0; CHUNK]);
            each(count, |_| Ok(file.read_exact(&mut chunk)?))
        }
        Files::WriteLarge => {
            let (mut file, chunk) = (File::create(root.join("written"))?, vec![b'z'; CHUNK]);
            each(count, |_| Ok(file.write_all(&chunk)?))?;
            Ok(file.sync_all()?)
        }
    }
}

fn each(count: usize, once: impl FnMut(usize) -> Result<()>) -> Result<()> {
    (0..count).try_for_each(once)
}
