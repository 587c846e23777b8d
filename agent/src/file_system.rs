//! File systems that the agent mounts by itself, for containers to have.

use std::fs;
use std::io;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::error::Error;

/// Options of mount(8) that are flags of mount(2), and whether they set or clear them.
const FLAGS: [(&str, MsFlags, bool); 20] = [
    ("ro", MsFlags::MS_RDONLY, true),
    ("rw", MsFlags::MS_RDONLY, false),
    ("nosuid", MsFlags::MS_NOSUID, true),
    ("suid", MsFlags::MS_NOSUID, false),
    ("nodev", MsFlags::MS_NODEV, true),
    ("dev", MsFlags::MS_NODEV, false),
    ("noexec", MsFlags::MS_NOEXEC, true),
    ("exec", MsFlags::MS_NOEXEC, false),
    ("noatime", MsFlags::MS_NOATIME, true),
    ("atime", MsFlags::MS_NOATIME, false),
    ("nodiratime", MsFlags::MS_NODIRATIME, true),
    ("diratime", MsFlags::MS_NODIRATIME, false),
    ("relatime", MsFlags::MS_RELATIME, true),
    ("norelatime", MsFlags::MS_RELATIME, false),
    ("strictatime", MsFlags::MS_STRICTATIME, true),
    ("nostrictatime", MsFlags::MS_STRICTATIME, false),
    ("sync", MsFlags::MS_SYNCHRONOUS, true),
    ("async", MsFlags::MS_SYNCHRONOUS, false),
    ("dirsync", MsFlags::MS_DIRSYNC, true),
    ("lazytime", MsFlags::MS_LAZYTIME, true),
];
/// Options that say nothing here: where propagation goes the container's mount says, and a disk is there already.
const WITHOUT_EFFECT: [&str; 10] =
    ["defaults", "loop", "private", "rprivate", "slave", "rslave", "shared", "rshared", "unbindable", "runbindable"];

/// Mounts `source` at `path`, which is made for it, with options of mount(8).
///
/// # Errors
/// Those of mkdir(2) and mount(2).
pub fn mount_at(path: &str, source: &str, kind: &str, options: &[String]) -> Result<(), Error> {
    fs::create_dir_all(path).map_err(|error| Error::io(format_args!("cannot make {path}"), error))?;
    let (flags, text) = flags_and_text(options);
    let mounted = mount(Some(source), path, Some(kind), flags, Some(text.as_str()));
    mounted.inspect_err(|_| drop(fs::remove_dir(path))).map_err(|error| match error {
        Errno::ENODEV => Error::Invalid(format!("the guest's kernel has no file system {kind}")),
        Errno::EINVAL => Error::Invalid(format!("it is no {kind}, or an option of {options:?} is none of it")),
        error => Error::io(format_args!("cannot mount {kind}, with {options:?}"), io::Error::from(error)),
    })
}

/// What mount(2) takes for options of mount(8).
fn flags_and_text(options: &[String]) -> (MsFlags, String) {
    let (mut flags, mut text) = (MsFlags::empty(), Vec::new());
    for option in options {
        match FLAGS.iter().find(|(name, ..)| name == option) {
            Some((_, flag, set)) => flags.set(*flag, *set),
            None if WITHOUT_EFFECT.contains(&option.as_str()) => {}
            None => text.push(option.as_str()),
        }
    }
    (flags, text.join(","))
}

/// Unmounts what is mounted at `path`, if anything is, settled, and removes the directory.
pub fn unmount(path: &str) {
    settle(path);
    match umount2(path, MntFlags::empty()) {
        // None was mounted, or it is no more.
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
        Err(error) => {
            crate::error!("cannot unmount {path}: {error}");
            // Some process still has it; what it does from now on fails.
            let _ = umount2(path, MntFlags::MNT_DETACH);
        }
    }
    let _ = fs::remove_dir(path);
}

/// Has everything that was written to the file system at `path` on its disk, and marked as whole: who has the disk next need
/// not recover it, and may be one who cannot. It is read-only then, also where another mount of it is left.
pub fn settle(path: &str) {
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    match mount(None::<&str>, path, None::<&str>, flags, None::<&str>) {
        // None was mounted, or it is no more.
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
        Err(error) => {
            crate::error!("{path} cannot be made read-only: {error}");
            // Some process still writes to it: what it wrote so far goes to the disk.
            nix::unistd::sync();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_flags_or_text() {
        let all = ["ro", "noatime", "data=journal", "loop", "nosuid", "suid", "errors=panic", "rprivate"];
        let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOATIME;
        assert_eq!(flags_and_text(&all.map(String::from)), (flags, "data=journal,errors=panic".into()));
        assert_eq!(flags_and_text(&[]), (MsFlags::empty(), String::new()));
    }
}
