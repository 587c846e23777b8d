//! The monitors that are compared, each as a process that boots one guest and shows its console.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use serde_json::json;

/// MiB of guest memory, for all.
pub const MEMORY_MIB: u32 = 256;
/// What the others are told; katavm's own words are its own, and as loud with `--console`.
const CMDLINE: &str = "console=ttyS0 reboot=k panic=-1 8250.nr_uarts=1";

/// One of the virtual machine monitors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Monitor {
    /// Ours.
    Katavm,
    /// QEMU's `microvm` machine.
    Qemu,
    /// Firecracker, where a binary is given.
    Firecracker,
}

/// What all of them boot, and where they may write.
pub struct Setup {
    /// The kernel, an ELF file.
    pub kernel: PathBuf,
    /// The initramfs of [`super::guest`].
    pub initramfs: PathBuf,
    /// A bundle for katavm.
    pub bundle: PathBuf,
    /// A folder for a monitor's own files.
    pub scratch: PathBuf,
}

impl Monitor {
    /// The name in the output.
    pub fn name(self) -> &'static str {
        match self {
            Self::Katavm => "katavm",
            Self::Qemu => "qemu",
            Self::Firecracker => "firecracker",
        }
    }

    /// Those that this machine has.
    pub fn available() -> Vec<Self> {
        let mut all = vec![Self::Katavm, Self::Qemu];
        if env::var_os("FIRECRACKER").is_some_and(|binary| !binary.is_empty()) {
            all.push(Self::Firecracker);
        }
        all
    }

    /// The command that boots a guest with its console on stdout or stderr.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn command(self, setup: &Setup) -> Result<Command> {
        Ok(match self {
            Self::Katavm => {
                let mut command = katavm(&setup.scratch, &setup.bundle);
                command.arg("--console").arg("--kernel").arg(&setup.kernel).arg("--initrd").arg(&setup.initramfs);
                command
            }
            Self::Qemu => {
                let mut command = Command::new("qemu-system-x86_64");
                command
                    .args(["-M", "microvm,acpi=off,rtc=off,pcie=off,usb=off", "-accel", "kvm", "-cpu", "host"])
                    .args(["-m", &MEMORY_MIB.to_string(), "-nodefaults", "-no-user-config", "-display", "none"])
                    .args(["-no-reboot", "-serial", "stdio", "-append", CMDLINE])
                    .arg("-kernel")
                    .arg(&setup.kernel)
                    .arg("-initrd")
                    .arg(&setup.initramfs);
                command
            }
            Self::Firecracker => {
                let config = setup.scratch.join("firecracker.json");
                let text = json!({
                    "boot-source": {
                        "kernel_image_path": setup.kernel, "initrd_path": setup.initramfs, "boot_args": CMDLINE,
                    },
                    "machine-config": {"vcpu_count": 1, "mem_size_mib": MEMORY_MIB},
                    "drives": [],
                });
                fs::write(&config, text.to_string())?;
                let binary: OsString = env::var_os("FIRECRACKER").context("FIRECRACKER is not set")?;
                let mut command = Command::new(binary);
                command.args(["--no-api", "--config-file"]).arg(config);
                command
            }
        })
    }
}

/// `katavm run` of `bundle`, with its state in `scratch`; options may follow.
pub fn katavm(scratch: &Path, bundle: &Path) -> Command {
    let mut command = Command::new("katavm");
    command.arg("--root").arg(scratch.join("state")).arg("run").arg(bundle);
    command.args(["--memory", &MEMORY_MIB.to_string()]);
    command
}
