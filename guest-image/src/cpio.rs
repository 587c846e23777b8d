//! Writes the cpio archive that the kernel unpacks as its first root file system.
//!
//! The format is "newc" (kernel source, `Documentation/driver-api/early-userspace/buffer-format.rst`). Writing it here
//! needs no root for a device node and gives the same bytes on every machine: owner 0:0, time 0, inodes counted from 1.

use std::path::{Path, PathBuf};

use thiserror::Error;

const MAGIC: &str = "070701";
const TRAILER: &str = "TRAILER!!!";
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const LINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// Why an entry cannot be archived.
#[derive(Debug, Error)]
pub enum Error {
    /// The header has 32 bits for a length.
    #[error("{0} is too big for a cpio archive: at most 4 GiB - 1")]
    TooBig(PathBuf),
    /// The archive is unpacked at "/": names are relative, without `..`.
    #[error("{0} is no name for an archive entry: give a relative path without \"..\"")]
    Name(PathBuf),
}

/// An archive in the making.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

struct Entry<'a> {
    name: &'a str,
    mode: u32,
    device: (u32, u32),
    contents: &'a [u8],
}

impl Archive {
    /// An empty archive.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a directory. The kernel makes no parents: add them first.
    ///
    /// # Errors
    /// When `name` is not usable.
    pub fn directory(&mut self, name: impl AsRef<Path>, permissions: u32) -> Result<(), Error> {
        self.add(name.as_ref(), DIRECTORY | permissions, (0, 0), &[])
    }

    /// Adds a regular file.
    ///
    /// # Errors
    /// When `name` is not usable or `contents` too big.
    pub fn file(&mut self, name: impl AsRef<Path>, permissions: u32, contents: &[u8]) -> Result<(), Error> {
        self.add(name.as_ref(), REGULAR | permissions, (0, 0), contents)
    }

    /// Adds a character device node with `device` = (major, minor).
    ///
    /// # Errors
    /// When `name` is not usable.
    pub fn character_device(
        &mut self,
        name: impl AsRef<Path>,
        permissions: u32,
        device: (u32, u32),
    ) -> Result<(), Error> {
        self.add(name.as_ref(), CHARACTER_DEVICE | permissions, device, &[])
    }

    /// Adds a symbolic link to `target`.
    ///
    /// # Errors
    /// When `name` is not usable.
    pub fn link(&mut self, name: impl AsRef<Path>, target: &str) -> Result<(), Error> {
        self.add(name.as_ref(), LINK | 0o777, (0, 0), target.as_bytes())
    }

    /// Ends the archive and returns its bytes.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        self.entries = 0;
        self.write(&Entry { name: TRAILER, mode: 0, device: (0, 0), contents: &[] }, 0, 0);
        self.bytes
    }

    fn add(&mut self, path: &Path, mode: u32, device: (u32, u32), contents: &[u8]) -> Result<(), Error> {
        let plain = path.components().all(|part| matches!(part, std::path::Component::Normal(_)));
        let name = path.to_str().filter(|name| plain && !name.is_empty()).ok_or_else(|| Error::Name(path.into()))?;
        let length = u32::try_from(contents.len()).map_err(|_| Error::TooBig(path.into()))?;
        self.entries += 1;
        self.write(&Entry { name, mode, device, contents }, self.entries, length);
        Ok(())
    }

    fn write(&mut self, entry: &Entry<'_>, inode: u32, length: u32) {
        let links = if entry.mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        // A name's length counts its final NUL; names are far below 4 GiB, being paths of this recipe.
        let name_length = u32::try_from(entry.name.len() + 1).unwrap_or(u32::MAX);
        let (major, minor) = entry.device;
        // inode, mode, uid, gid, links, mtime, size, dev major and minor, rdev major and minor, name size, check
        let fields = [inode, entry.mode, 0, 0, links, 0, length, 0, 0, major, minor, name_length, 0];
        self.bytes.extend(MAGIC.bytes());
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(entry.name.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(entry.contents);
        self.pad();
    }

    /// Header with name, and contents, each end on a 4-byte boundary.
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;

    fn sample() -> Vec<u8> {
        let mut archive = Archive::new();
        archive.directory("dev", 0o755).unwrap();
        archive.character_device("dev/console", 0o600, (5, 1)).unwrap();
        archive.file("init", 0o755, b"hello").unwrap();
        archive.file("empty", 0o644, b"").unwrap();
        archive.link("other", "/init").unwrap();
        archive.finish()
    }

    fn cpio(arguments: &[&str], archive: &[u8]) -> Option<String> {
        let Ok(mut child) = Command::new("cpio").args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()
        else {
            eprintln!("SKIPPED: no cpio program here to compare with");
            return None;
        };
        child.stdin.take().unwrap().write_all(archive).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "cpio {arguments:?}: {}", output.status);
        Some(String::from_utf8(output.stdout).unwrap())
    }

    #[test]
    fn cpio_lists_every_entry_with_type_mode_and_owner() {
        let Some(listing) = cpio(&["-itvn", "--quiet"], &sample()) else { return };
        let lines: Vec<Vec<&str>> = listing.lines().map(|line| line.split_whitespace().collect()).collect();
        let heads: Vec<String> =
            lines.iter().map(|line| [&line[..4], &line[line.len() - 1..]].concat().join(" ")).collect();
        assert_eq!(
            heads,
            [
                "drwxr-xr-x 2 0 0 dev",
                "crw------- 1 0 0 dev/console",
                "-rwxr-xr-x 1 0 0 init",
                "-rw-r--r-- 1 0 0 empty",
                "lrwxrwxrwx 1 0 0 /init"
            ]
        );
        assert!(listing.contains(" 5,   1 "), "console is not 5:1 in\n{listing}");
    }

    #[test]
    fn cpio_gives_a_files_contents_back() {
        let Some(contents) = cpio(&["-i", "--quiet", "--to-stdout", "init"], &sample()) else { return };
        assert_eq!(contents, "hello");
    }

    #[test]
    fn equal_entries_give_equal_bytes_in_whole_words() {
        assert_eq!(sample(), sample());
        assert_eq!(sample().len() % 4, 0);
    }

    #[test]
    fn names_that_leave_the_root_are_refused() {
        for name in ["/init", "../init", "a/../b", "", "."] {
            assert!(matches!(Archive::new().file(name, 0o644, b""), Err(Error::Name(_))), "{name:?} was accepted");
        }
    }
}
