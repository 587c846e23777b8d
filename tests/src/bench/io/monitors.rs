//! Each monitor as a process that gives a guest one disk.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use katavm_devices::block::{Block, BlockConfig};
use katavm_vmm::{Microvm, MicrovmConfig};
use serde_json::json;

use super::super::monitor::{MEMORY_MIB, Monitor};

/// The word by which this program is told to be our monitor.
pub const OURS: &str = "monitor-of-io";
const CMDLINE: &str = "console=ttyS0 reboot=k panic=-1 8250.nr_uarts=1 quiet";

/// What all of them boot.
pub struct Setup {
    /// The kernel, an ELF file.
    pub kernel: PathBuf,
    /// The initramfs of [`super::worker`].
    pub initramfs: PathBuf,
    /// The disk's file.
    pub disk: PathBuf,
    /// A folder for a monitor's own files.
    pub scratch: PathBuf,
}

/// The command that boots the guest with its console on stdout; as the monitors' documents have them for speed, with the
/// host's page cache between.
///
/// # Errors
/// When a file cannot be written.
pub fn command(monitor: Monitor, setup: &Setup) -> Result<Command> {
    let Setup { kernel, initramfs, disk, scratch } = setup;
    Ok(match monitor {
        Monitor::Katavm => {
            let mut command = Command::new(std::env::current_exe()?);
            command.arg(OURS).args([kernel, initramfs, disk]);
            command
        }
        Monitor::Qemu => {
            let mut command = Command::new("qemu-system-x86_64");
            command
                .args(["-M", "microvm,acpi=off,rtc=off,pcie=off,usb=off", "-accel", "kvm", "-cpu", "host"])
                .args(["-m", &MEMORY_MIB.to_string(), "-nodefaults", "-no-user-config", "-display", "none"])
                .args(["-global", "virtio-mmio.force-legacy=false"])
                .args(["-no-reboot", "-serial", "stdio", "-append", CMDLINE])
                .args(["-object", "iothread,id=io", "-device", "virtio-blk-device,drive=disk,iothread=io", "-drive"])
                .arg(format!("if=none,id=disk,format=raw,cache=writeback,aio=io_uring,file={}", disk.display()))
                .arg("-kernel")
                .arg(kernel)
                .arg("-initrd")
                .arg(initramfs);
            command
        }
        Monitor::Firecracker => {
            let config = scratch.join("firecracker.json");
            let text = json!({
                "boot-source": { "kernel_image_path": kernel, "initrd_path": initramfs, "boot_args": CMDLINE },
                "machine-config": { "vcpu_count": 1, "mem_size_mib": MEMORY_MIB },
                "drives": [{
                    "drive_id": "disk", "path_on_host": disk, "is_root_device": false, "is_read_only": false,
                    "cache_type": "Writeback", "io_engine": "Async",
                }],
            });
            fs::write(&config, text.to_string())?;
            let binary = std::env::var_os("FIRECRACKER").context("FIRECRACKER is not set")?;
            let mut command = Command::new(binary);
            command.args(["--no-api", "--config-file"]).arg(config);
            command
        }
    })
}

/// Is our monitor: boots the guest on the library that `katavm` is made of, and waits for its end.
///
/// # Errors
/// When it cannot be booted.
pub fn run(kernel: &Path, initramfs: &Path, disk: &Path) -> Result<()> {
    let config = MicrovmConfig {
        memory_mib: MEMORY_MIB,
        kernel: kernel.into(),
        initramfs: Some(initramfs.into()),
        ..Default::default()
    };
    let disk = Block::new(BlockConfig::open(disk, false, "disk")?)?;
    let vm = Microvm::builder(config).block(disk).build()?;
    vm.console().mirror(File::from(std::io::stdout().as_fd().try_clone_to_owned()?));
    vm.start()?;
    // How it went is on the console.
    let _ = vm.wait();
    Ok(())
}
