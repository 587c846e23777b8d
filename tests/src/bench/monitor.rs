//! The monitors that are compared, each as a process that boots one guest and shows its console on stdout.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use katavm_devices::rng::Rng;
use katavm_vmm::{Microvm, MicrovmConfig};
use serde_json::json;

/// MiB of guest memory, for all.
const MEMORY: u32 = 256;
/// The same for all; each adds what its devices need.
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
        if env::var_os("FIRECRACKER").is_some() {
            all.push(Self::Firecracker);
        }
        all
    }

    /// The command that boots `kernel` with `initramfs`; `scratch` is for its configuration.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn command(self, kernel: &Path, initramfs: &Path, scratch: &Path) -> Result<Vec<OsString>> {
        let words = |words: &[&str]| words.iter().map(OsString::from).collect::<Vec<_>>();
        Ok(match self {
            Self::Katavm => {
                let mut command = vec![env::current_exe()?.into_os_string()];
                command.extend([OsString::from("boot-one"), kernel.into(), initramfs.into()]);
                command
            }
            Self::Qemu => {
                let memory = MEMORY.to_string();
                let mut command = words(&[
                    "qemu-system-x86_64",
                    "-M",
                    "microvm,acpi=off,rtc=off,pcie=off,usb=off",
                    "-accel",
                    "kvm",
                    "-cpu",
                    "host",
                    "-m",
                    &memory,
                    "-nodefaults",
                    "-no-user-config",
                    "-display",
                    "none",
                    "-no-reboot",
                    "-serial",
                    "stdio",
                    "-append",
                    CMDLINE,
                    "-kernel",
                ]);
                command.extend([kernel.into(), OsString::from("-initrd"), initramfs.into()]);
                command
            }
            Self::Firecracker => {
                let config = scratch.join("firecracker.json");
                let text = json!({
                    "boot-source": {"kernel_image_path": kernel, "initrd_path": initramfs, "boot_args": CMDLINE},
                    "machine-config": {"vcpu_count": 1, "mem_size_mib": MEMORY},
                    "drives": [],
                });
                fs::write(&config, text.to_string())?;
                let binary = env::var_os("FIRECRACKER").context("FIRECRACKER is not set")?;
                vec![binary, "--no-api".into(), "--config-file".into(), config.into()]
            }
        })
    }
}

/// A command from its words.
pub fn process(words: &[OsString]) -> Result<Command> {
    let (program, args) = words.split_first().context("an empty command")?;
    let mut command = Command::new(program);
    command.args(args);
    Ok(command)
}

/// katavm's side of the comparison: boots one guest with its console on stdout, and nothing else.
///
/// # Errors
/// When it cannot be built.
pub fn boot_one(kernel: PathBuf, initramfs: PathBuf) -> Result<()> {
    let config = MicrovmConfig {
        kernel,
        initramfs: Some(initramfs),
        memory_mib: MEMORY,
        // As loud as the others, who have no `quiet`.
        cmdline: "loglevel=7".into(),
        ..Default::default()
    };
    let vm = Microvm::builder(config).rng(Rng::new()?).build()?;
    vm.console().mirror(std::io::stdout());
    vm.start()?;
    // How it ends is the guest's business.
    let _ = vm.wait();
    Ok(())
}
