//! The lab's initial RAM disk: this program as `/init`, the C library, a few modules and the job.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::{Context, Result};
use katavm_guest_image::cpio::Archive;
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::artefacts::Artefacts;
use super::job::Job;

/// Where the job is in the initial RAM disk.
pub const JOB: &str = "/job.json";
/// Where the modules are, sorted by name into the order of loading.
pub const MODULES: &str = "/modules";

const LOADER: &str = "ld-linux-x86-64.so.2";

/// Makes it in memory: nothing is left behind, however this process ends.
pub fn make(artefacts: &Artefacts, program: &Path, job: &Job) -> Result<OwnedFd> {
    let mut archive = Archive::new();
    for folder in ["modules", "lib", "lib64"] {
        archive.directory(folder, 0o755)?;
    }
    archive.file("init", 0o755, &read(program)?)?;
    archive.file("job.json", 0o644, &serde_json::to_vec(job)?)?;
    for (folder, target) in [(artefacts.modules(), "modules"), (artefacts.libraries(), "lib")] {
        for entry in fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default();
            // The loader's place is fixed by the ABI and named in the program itself.
            let target = if name == LOADER { "lib64" } else { target };
            archive.file(Path::new(target).join(name), 0o755, &read(&path)?)?;
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
