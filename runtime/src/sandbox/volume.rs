//! Volumes that the kubelet replaces as a whole (ConfigMap, Secret, projected, downward API): what a copy of one for the
//! guest consists of.

use std::fs;
use std::io::{self, Read as _};
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use katavm_protocol::agent::VolumeEntry;
use katavm_protocol::agent::volume_entry::Kind;

/// The link that the kubelet switches: it leads to the folder with the files of today.
const DATA: &str = "..data";
/// The most that is copied, in bytes: a ConfigMap and a Secret have at most 1 MiB each, and one message to the agent at
/// most 4 MiB.
const LARGEST: u64 = 3 << 20;
/// The most files, folders and links.
const MOST: usize = 2048;
/// The deepest folder.
const DEEPEST: usize = 16;

/// Whether a folder is such a volume.
#[must_use]
pub fn is_replaced(folder: &Path) -> bool {
    // It leads to a folder beside it, which begins with two dots as well.
    let target = fs::read_link(folder.join(DATA)).ok();
    target.is_some_and(|target| {
        let name = target.as_os_str().as_encoded_bytes();
        name.starts_with(b"..") && name.len() > 2 && !name.contains(&b'/')
    })
}

/// Reads one: the links at the top, and the files that `..data` leads to.
///
/// # Errors
/// That it cannot be read (it may have been replaced just now), or is too large.
pub fn read(folder: &Path) -> io::Result<Vec<VolumeEntry>> {
    let data = fs::read_link(folder.join(DATA))?;
    let mut gathered = Gathered { entries: Vec::new(), bytes: 0 };
    for found in fs::read_dir(folder)? {
        let found = found?;
        if found.file_type()?.is_symlink() {
            gathered.add(folder, Path::new(&found.file_name()))?;
        }
    }
    gathered.add_tree(folder, &data, 0)?;
    if fs::read_link(folder.join(DATA))? != data {
        return Err(io::Error::new(io::ErrorKind::Interrupted, "it was replaced while it was read"));
    }
    Ok(gathered.entries)
}

struct Gathered {
    entries: Vec<VolumeEntry>,
    bytes: u64,
}

impl Gathered {
    fn add_tree(&mut self, folder: &Path, path: &Path, depth: usize) -> io::Result<()> {
        if depth > DEEPEST {
            return Err(too_large());
        }
        self.add(folder, path)?;
        if folder.join(path).symlink_metadata()?.is_dir() {
            for found in fs::read_dir(folder.join(path))? {
                self.add_tree(folder, &path.join(found?.file_name()), depth + 1)?;
            }
        }
        Ok(())
    }

    fn add(&mut self, folder: &Path, path: &Path) -> io::Result<()> {
        let whole = folder.join(path);
        let metadata = whole.symlink_metadata()?;
        let kind = match metadata.file_type() {
            kind if kind.is_dir() => Kind::DIRECTORY,
            kind if kind.is_file() => Kind::FILE,
            kind if kind.is_symlink() => Kind::LINK,
            _ => return Err(io::Error::new(io::ErrorKind::InvalidData, "it has files of other kinds")),
        };
        let content = match kind {
            Kind::DIRECTORY => Vec::new(),
            Kind::FILE => {
                let mut content = Vec::new();
                fs::File::open(&whole)?.take(LARGEST + 1).read_to_end(&mut content)?;
                content
            }
            Kind::LINK => fs::read_link(&whole)?.into_os_string().into_vec(),
        };
        self.bytes += content.len() as u64;
        if self.entries.len() >= MOST || self.bytes > LARGEST {
            return Err(too_large());
        }
        self.entries.push(VolumeEntry {
            path: path.as_os_str().to_owned().into_vec(),
            kind: kind.into(),
            mode: metadata.mode() & 0o7777,
            uid: metadata.uid(),
            gid: metadata.gid(),
            content,
            ..Default::default()
        });
        Ok(())
    }
}

fn too_large() -> io::Error {
    io::Error::new(io::ErrorKind::FileTooLarge, format!("it is larger than {LARGEST} bytes or {MOST} files"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn config_map(folder: &Path) {
        fs::create_dir_all(folder.join("..2026/sub")).unwrap();
        fs::create_dir(folder.join("..old")).unwrap();
        fs::write(folder.join("..2026/key"), "value").unwrap();
        fs::write(folder.join("..2026/sub/file"), "x").unwrap();
        symlink("..2026", folder.join("..data")).unwrap();
        symlink("..data/key", folder.join("key")).unwrap();
    }

    #[test]
    fn what_the_kubelet_replaces_is_told_by_its_link() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!is_replaced(dir.path()));
        config_map(dir.path());
        assert!(is_replaced(dir.path()));
        for elsewhere in ["/etc", "..", "../..", "..2026/sub", "plain"] {
            fs::remove_file(dir.path().join("..data")).unwrap();
            symlink(elsewhere, dir.path().join("..data")).unwrap();
            assert!(!is_replaced(dir.path()), "{elsewhere}");
        }
    }

    #[test]
    fn a_copy_has_the_files_of_today() {
        let dir = tempfile::tempdir().unwrap();
        config_map(dir.path());
        let mut entries: Vec<_> = read(dir.path())
            .unwrap()
            .into_iter()
            .map(|entry| {
                let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
                (text(entry.path), entry.kind.enum_value_or_default(), text(entry.content))
            })
            .collect();
        entries.sort_by(|a, b| a.0.cmp(&b.0));
        let expected = [
            ("..2026", Kind::DIRECTORY, ""),
            ("..2026/key", Kind::FILE, "value"),
            ("..2026/sub", Kind::DIRECTORY, ""),
            ("..2026/sub/file", Kind::FILE, "x"),
            ("..data", Kind::LINK, "..2026"),
            ("key", Kind::LINK, "..data/key"),
        ];
        assert_eq!(entries, expected.map(|(path, kind, content)| (path.to_owned(), kind, content.to_owned())));
    }

    #[test]
    fn what_is_too_large_is_no_copy() {
        let dir = tempfile::tempdir().unwrap();
        config_map(dir.path());
        fs::File::create(dir.path().join("..2026/large")).unwrap().set_len(LARGEST + 1).unwrap();
        assert_eq!(read(dir.path()).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
    }
}
