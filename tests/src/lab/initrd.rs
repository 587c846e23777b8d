//! The lab's initial RAM disk: this program as `/init`, the C library, a few modules and the job.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::{Context, Result};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::artefacts::Artefacts;
use super::cpio::Archive;
use super::job::Job;

/// Where the job is in the initial RAM disk.
pub const JOB: &str = "/job.json";
/// Where the modules are, sorted by name into the order of loading.
pub const MODULES: &str = "/modules";

/// Makes it in memory: nothing is left behind, however this process ends.
pub fn make(artefacts: &Artefacts, program: &Path, job: &Job) -> Result<OwnedFd> {
    let mut archive = Archive::default();
    for folder in ["dev", "proc", "sys", "lower", "upper", "new", "modules", "lib64"] {
        archive.folder(folder);
    }
    archive.link("lib", "lib64");
    archive.file("init", 0o755, &read(program)?);
    archive.file("job.json", 0o644, &serde_json::to_vec(job)?);
    for (folder, target) in [(artefacts.modules(), "modules"), (artefacts.libraries(), "lib64")] {
        for entry in fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            archive.file(&format!("{target}/{name}"), 0o755, &read(&path)?);
        }
    }
    // Inherited by QEMU, so without close-on-exec.
    let fd = memfd_create("katavm-lab-initrd", MFdFlags::empty()).context("cannot make a memory file")?;
    let mut file = File::from(fd);
    file.write_all(&archive.finish()).context("cannot write the lab's initial RAM disk")?;
    Ok(file.into())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}
