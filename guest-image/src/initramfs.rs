//! Builds the static agent and the initramfs that holds it as `/init`.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cpio::Archive;
use crate::support::cache::{self, Inputs};
use crate::support::{packages, step};

const AGENT: &str = "katavm-agent";
/// Stated outright: only with a target of its own does `crt-static` spare build scripts and procedural macros.
const TARGET: &str = "x86_64-unknown-linux-gnu";
const RECIPE: &str = "initramfs 2";

/// The archive's name in the folder that [`build`] returns.
pub const FILE: &str = "initramfs";

/// Builds the agent and its initramfs, or finds them in their caches, and returns the folder with [`FILE`].
///
/// # Errors
/// When a package cannot be had, the agent does not compile, or the archive cannot be written.
pub fn build() -> Result<PathBuf> {
    let agent = build_agent()?;
    let inputs = Inputs::new(RECIPE).file(&agent)?;
    cache::artefact(FILE, inputs, |folder| {
        let agent = fs::read(&agent).with_context(|| format!("cannot read {}", agent.display()))?;
        Ok(fs::write(folder.join(FILE), pack(&agent)?)?)
    })
}

/// The archive with `init` as `/init`: that, the names of programs that it is as well, the console that the kernel opens
/// for it, and the directories that it mounts or writes in.
///
/// Not compressed: the kernel copies it out either way, and unpacking would be the dearest step of the boot.
///
/// # Errors
/// When `init` is 4 GiB or more.
pub fn pack(init: &[u8]) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    for mount_point in ["bin", "dev", "proc", "run", "sys"] {
        archive.directory(mount_point, 0o755)?;
    }
    archive.directory("tmp", 0o1777)?;
    archive.character_device("dev/console", 0o600, (5, 1))?;
    archive.file("init", 0o755, init)?;
    for name in ["newuidmap", "newgidmap"] {
        archive.link(Path::new("bin").join(name), "/init")?;
    }
    Ok(archive.finish())
}

/// Has cargo build the agent, static, in a target folder of its own; cargo is the cache here.
fn build_agent() -> Result<PathBuf> {
    packages::ensure(&["build-essential", "libseccomp-dev"])?;
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the workspace has no folder")?;
    let target = target_folder(workspace).join("agent");
    fs::create_dir_all(&target).with_context(|| format!("cannot make {}", target.display()))?;
    let cargo = env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let mut command = step::command(&cargo.to_string_lossy(), ["build", "--locked", "--profile", "agent"]);
    command
        .args(["--package", AGENT, "--bin", AGENT, "--target", TARGET, "--target-dir"])
        .arg(&target)
        .current_dir(workspace)
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .envs([("LIBSECCOMP_LINK_TYPE", "static"), ("LIBSECCOMP_LIB_PATH", "/usr/lib/x86_64-linux-gnu")]);
    let log = target.join("build.log");
    fs::write(&log, "")?;
    step::run("building the agent", &mut command, &log)?;
    Ok(target.join(TARGET).join("agent").join(AGENT))
}

fn target_folder(workspace: &Path) -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace.join("target"), |folder| workspace.join(folder))
}
