//! Each monitor as a process that gives a guest one device.

use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use katavm_devices::block::{Block, BlockConfig};
use katavm_devices::fs::{ExportOptions, Fs, FsShare};
use katavm_devices::net::{Net, NetConfig, NetLimits, Offloads, Tap};
use katavm_devices::vsock::Vsock;
use katavm_vmm::{Microvm, MicrovmConfig};
use serde_json::json;

use super::super::monitor::{MEMORY_MIB, Monitor};
use super::exchange::{self, PORT};
use super::host::{DISK, FILES, TAP};
use super::kinds::Kind;
use super::worker::{self, files};

/// The word by which this program is told to be our monitor.
pub const OURS: &str = "monitor-of-io";
const CMDLINE: &str = "console=ttyS0 reboot=k panic=-1 8250.nr_uarts=1 quiet";
/// The guest's context identifier of vsock.
const CID: u32 = 3;
const MAC: [u8; 6] = [0x52, 0x54, 0, 0x4b, 0x56, 0x4d];

/// What all of them boot.
pub struct Setup {
    /// The kernel, an ELF file.
    pub kernel: PathBuf,
    /// The initramfs of [`super::worker`].
    pub initramfs: PathBuf,
    /// The folder with [`DISK`] and [`FILES`], and for a monitor's own files.
    pub scratch: PathBuf,
}

/// The command that boots a guest of `kind` with its console on stdout, as the monitors' documents have it for speed;
/// `None` if that monitor has no such device, or is not measured with it.
///
/// # Errors
/// When a file cannot be written.
pub fn command(monitor: Monitor, kind: Kind, setup: &Setup) -> Result<Option<Command>> {
    Ok(match (monitor, kind) {
        (Monitor::Katavm, _) => Some(ours(kind, setup)?),
        (Monitor::Qemu, Kind::Files) => Some(beside_virtiofsd(&qemu(kind, setup), &setup.scratch)),
        (Monitor::Qemu, _) => Some(qemu(kind, setup)),
        (Monitor::Firecracker, Kind::Disk) => Some(firecracker(setup)?),
        (Monitor::Firecracker, _) => None,
    })
}

fn ours(kind: Kind, setup: &Setup) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args([OURS, kind.name()]).args([&setup.kernel, &setup.initramfs, &setup.scratch]);
    Ok(command)
}

fn qemu(kind: Kind, setup: &Setup) -> Command {
    let Setup { kernel, initramfs, scratch } = setup;
    let mut command = Command::new("qemu-system-x86_64");
    let machine = "microvm,acpi=off,rtc=off,pcie=off,usb=off";
    let machine = if kind == Kind::Files { format!("{machine},memory-backend=ram") } else { machine.into() };
    command
        .args(["-M", &machine, "-accel", "kvm", "-cpu", "host"])
        .args(["-m", &MEMORY_MIB.to_string(), "-nodefaults", "-no-user-config", "-display", "none"])
        .args(["-global", "virtio-mmio.force-legacy=false", "-no-reboot", "-serial", "stdio"])
        .args(["-append", &format!("{CMDLINE} {}={}", worker::KIND, kind.name())])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initramfs);
    match kind {
        Kind::Disk => {
            let disk = scratch.join(DISK);
            command
                .args(["-object", "iothread,id=io", "-device", "virtio-blk-device,drive=disk,iothread=io", "-drive"])
                .arg(format!("if=none,id=disk,format=raw,cache=writeback,aio=io_uring,file={}", disk.display()))
        }
        Kind::Network => command
            .arg("-netdev")
            .arg(format!("tap,id=net,ifname={TAP},script=no,downscript=no,vhost=off"))
            .args(["-device", "virtio-net-device,netdev=net"]),
        Kind::Files => command
            .args(["-object", &format!("memory-backend-memfd,id=ram,size={MEMORY_MIB}M,share=on"), "-chardev"])
            .arg(format!("socket,id=fs,path={}", scratch.join(SOCKET).display()))
            .args(["-device", &format!("vhost-user-fs-device,chardev=fs,tag={}", files::TAG)]),
        Kind::Vsock => command.args(["-device", &format!("vhost-vsock-device,guest-cid={CID}")]),
    };
    command
}

/// Where virtiofsd listens.
const SOCKET: &str = "virtiofsd.sock";

/// `command` with a virtiofsd as its child, which ends when nobody is connected any more.
fn beside_virtiofsd(command: &Command, scratch: &Path) -> Command {
    let mut shell = Command::new("sh");
    shell
        .arg("-c")
        .arg(
            "rm -f \"$1\"; /usr/libexec/virtiofsd --socket-path \"$1\" --shared-dir \"$2\" --log-level error &
             until [ -S \"$1\" ]; do sleep 0.01; done; shift 2; exec \"$@\"",
        )
        .arg("sh")
        .args([scratch.join(SOCKET), scratch.join(FILES)])
        .arg(command.get_program())
        .args(command.get_args());
    shell
}

fn firecracker(setup: &Setup) -> Result<Command> {
    let Setup { kernel, initramfs, scratch } = setup;
    let config = scratch.join("firecracker.json");
    let text = json!({
        "boot-source": {
            "kernel_image_path": kernel, "initrd_path": initramfs,
            "boot_args": format!("{CMDLINE} {}={}", worker::KIND, Kind::Disk.name()),
        },
        "machine-config": { "vcpu_count": 1, "mem_size_mib": MEMORY_MIB },
        "drives": [{
            "drive_id": "disk", "path_on_host": scratch.join(DISK), "is_root_device": false, "is_read_only": false,
            "cache_type": "Writeback", "io_engine": "Async",
        }],
    });
    fs::write(&config, text.to_string())?;
    let binary = std::env::var_os("FIRECRACKER").context("FIRECRACKER is not set")?;
    let mut command = Command::new(binary);
    command.args(["--no-api", "--config-file"]).arg(config);
    Ok(command)
}

/// Is our monitor: boots the guest on the library that `katavm` is made of, and waits for its end.
///
/// # Errors
/// When it cannot be booted.
pub fn run(kind: Kind, setup: &Setup) -> Result<()> {
    let config = MicrovmConfig {
        memory_mib: MEMORY_MIB,
        kernel: setup.kernel.clone(),
        initramfs: Some(setup.initramfs.clone()),
        cmdline: format!("{}={}", worker::KIND, kind.name()),
        ..Default::default()
    };
    let builder = Microvm::builder(config);
    let builder = match kind {
        Kind::Disk => builder.block(Block::new(BlockConfig::open(&setup.scratch.join(DISK), false, "disk")?)?),
        Kind::Network => builder.net(net()?),
        Kind::Files => builder.fs(Fs::new(files::TAG, share(&setup.scratch.join(FILES))?)?),
        Kind::Vsock => {
            let (vsock, host) = Vsock::new(CID.into())?;
            let listener = host.listen(PORT)?;
            exchange::serve(move || listener.accept(None).ok().map(|stream| File::from(OwnedFd::from(stream))))?;
            builder.vsock(vsock)
        }
    };
    let vm = builder.build()?;
    vm.console().mirror(File::from(std::io::stdout().as_fd().try_clone_to_owned()?));
    vm.start()?;
    // How it went is on the console.
    let _ = vm.wait();
    Ok(())
}

fn net() -> Result<Net> {
    let (queues, _) = katavm_runtime::host::make_tap(TAP, 1)?;
    let Some(queue) = queues.into_iter().next() else { bail!("{TAP} has no queue") };
    let offloads = Offloads::of_this_kernel();
    let mut net = Net::new(NetConfig { mac: MAC, mtu: None, offloads, pairs: 1, limits: NetLimits::default() })?;
    net.attach(Tap::new(queue)?)?;
    Ok(net)
}

/// The same path in the guest as virtiofsd's: the share's root is the folder.
fn share(root: &Path) -> Result<FsShare> {
    let share = FsShare::new();
    let folder = File::open(root.join(files::FOLDER))?;
    share.add_export(files::FOLDER, folder.into(), ExportOptions::default())?;
    Ok(share)
}
