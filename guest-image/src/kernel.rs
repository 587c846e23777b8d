//! Builds the guest kernel from Debian's `linux-source-6.12` package and `kernel.config`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::available_parallelism;

use anyhow::{Context, Result, bail};

use crate::config;
use crate::support::cache::{self, Inputs};
use crate::support::{packages, step};

/// Our options, each with its reason.
pub const CONFIG: &str = include_str!("../kernel.config");

/// Debian's package with the sources, in Debian 12 (security) and 13.
const SOURCE_PACKAGE: &str = "linux-source-6.12";
const SOURCE_TAR: &str = "/usr/src/linux-source-6.12.tar.xz";
const SOURCE_FOLDER: &str = "linux-source-6.12";

/// What the build needs besides the sources; lz4 packs the bzImage.
const TOOLS: [&str; 8] = ["build-essential", "flex", "bison", "bc", "libelf-dev", "xz-utils", "lz4", SOURCE_PACKAGE];

/// Bump when the steps below change what they make.
const RECIPE: &str = "kernel 1";

/// What the folder that [`build`] returns holds, beside the build's log.
pub const FILES: [&str; 4] = ["vmlinux", "bzImage", "config", "kernel-release"];

/// Builds the kernel, or finds it in the cache, and returns the folder with [`FILES`].
///
/// # Errors
/// When a package cannot be had, a step fails (with the end of its log), or an option of `kernel.config` does not hold
/// in the final configuration (each such option is named).
pub fn build() -> Result<PathBuf> {
    packages::ensure(&TOOLS)?;
    let inputs = Inputs::new(RECIPE)
        .text("config", CONFIG)
        .text("source", &output("dpkg-query", &["-W", "-f", "${Version}", SOURCE_PACKAGE])?)
        .text("compiler", &output("gcc", &["--version"])?);
    cache::artefact("kernel", inputs, compile)
}

fn compile(folder: &Path) -> Result<()> {
    let log = folder.join("build.log");
    let unpack = ["-xf", SOURCE_TAR, "-C", &folder.to_string_lossy()];
    step::run("unpacking the kernel's sources", &mut step::command("tar", unpack), &log)?;
    let source = folder.join(SOURCE_FOLDER);
    configure(&source, &log)?;
    let jobs = format!("-j{}", available_parallelism().map_or(1, usize::from));
    step::run("compiling the kernel", &mut make(&source, &[&jobs, "vmlinux", "bzImage"]), &log)?;

    for (made, name) in [
        ("vmlinux", "vmlinux"),
        ("arch/x86/boot/bzImage", "bzImage"),
        (".config", "config"),
        ("include/config/kernel.release", "kernel-release"),
    ] {
        let made = source.join(made);
        fs::copy(&made, folder.join(name)).with_context(|| format!("the build left no {}", made.display()))?;
    }
    // The symbols and tables that only a debugger reads: a third of the file.
    let vmlinux = folder.join("vmlinux");
    step::run("stripping vmlinux", step::command("strip", ["--strip-all"]).arg(&vmlinux), &log)?;
    fs::remove_dir_all(&source).with_context(|| format!("cannot remove {}", source.display()))
}

/// Makes the final `.config` and refuses one in which an option of ours does not hold.
fn configure(source: &Path, log: &Path) -> Result<()> {
    let fragment = source.join("katavm.config");
    fs::write(&fragment, CONFIG)?;
    let everything_else_off = format!("KCONFIG_ALLCONFIG={}", fragment.display());
    step::run("configuring the kernel", &mut make(source, &[&everything_else_off, "allnoconfig"]), log)?;

    let unmet = config::unmet(CONFIG, &fs::read_to_string(source.join(".config"))?);
    if !unmet.is_empty() {
        let lines: Vec<String> = unmet.iter().map(|option| format!("  {option}")).collect();
        bail!(
            "kernel.config asks for options that do not hold in this kernel's .config (renamed, or a dependency is \
             missing):\n{}",
            lines.join("\n")
        );
    }
    Ok(())
}

/// `make` in the kernel's tree, with everything fixed that would otherwise differ from build to build.
fn make(source: &Path, arguments: &[&str]) -> Command {
    let mut command = step::command("make", arguments);
    command
        .current_dir(source)
        .envs([
            ("KBUILD_BUILD_TIMESTAMP", "2025-01-01"),
            ("KBUILD_BUILD_USER", "katavm"),
            ("KBUILD_BUILD_HOST", "katavm"),
        ])
        .envs([("KBUILD_BUILD_VERSION", "1"), ("LC_ALL", "C")])
        // A jobserver of a surrounding make or cargo is none of this build's business.
        .env_remove("MAKEFLAGS")
        .env_remove("MFLAGS")
        .env_remove("ARCH")
        .env_remove("CROSS_COMPILE");
    command
}

fn output(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).output().with_context(|| format!("cannot run {program}"))?;
    if !output.status.success() {
        bail!("{program} {} ended with {}", arguments.join(" "), output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
