//! The virtual machine, as far as the rest of the runtime knows about it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use katavm_devices::balloon::Balloon;
use katavm_devices::block::{Block, BlockConfig, BlockError};
use katavm_devices::fs::{Fs, FsShare};
use katavm_devices::mem::Mem;
use katavm_devices::net::Net;
use katavm_devices::rng::Rng;
use katavm_devices::vsock::{Vsock, VsockHost, VsockListener};
use katavm_protocol::agent::Ready;
use katavm_protocol::{frame, ports};
use katavm_vmm::{BuildError, ExitReason, Microvm, MicrovmBuilder, MicrovmConfig, MicrovmError};

use super::image::GuestImage;
use super::probe::KVM;
use super::size::Size;

/// The guest's own context identifier: 0 to 2 are taken (virtio 1.3, 5.10.4), and no guest sees another.
const GUEST_CID: u64 = 3;
/// The tag of the shared file system.
pub const SHARED_TAG: &str = "katavm";

/// Why there is no virtual machine.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// It cannot be built.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// It ended before it began.
    #[error(transparent)]
    Start(#[from] MicrovmError),
    /// A place for a disk.
    #[error(transparent)]
    Disk(#[from] BlockError),
    /// A device's resources.
    #[error("cannot make the guest's {device}: {error}")]
    Device {
        /// Which.
        device: &'static str,
        /// What the system said.
        error: io::Error,
    },
}

fn device(device: &'static str) -> impl FnOnce(io::Error) -> VmError {
    move |error| VmError::Device { device, error }
}

/// Connects to ports of the guest, from any thread.
pub trait Dial: Send + Sync {
    /// A connection to `port`, which somebody in the guest has accepted.
    ///
    /// # Errors
    /// That nobody did, or that the guest is gone.
    fn dial(&self, port: u32, timeout: Duration) -> io::Result<UnixStream>;
}

impl Dial for VsockHost {
    fn dial(&self, port: u32, timeout: Duration) -> io::Result<UnixStream> {
        self.connect(port, timeout)
    }
}

/// A virtual machine that runs, or did.
pub trait Machine: Send + Sync {
    /// Readable from its end on.
    fn end_event(&self) -> BorrowedFd<'_>;
    /// Why it ended, if it has.
    fn end(&self) -> Option<ExitReason>;
    /// Ends it, whatever the guest does.
    fn stop(&self);
    /// The last lines of its console.
    fn console_tail(&self) -> String;
    /// How many empty places for disks it has.
    fn empty_places(&self) -> usize {
        0
    }
    /// Puts a disk into an empty place of it; which.
    ///
    /// # Errors
    /// When no place is empty, or the disk is not possible.
    fn attach_disk(&self, _disk: BlockConfig) -> Result<usize, MicrovmError> {
        Err(MicrovmError::NoPlace)
    }
    /// Takes the disk at `place` away.
    fn detach_disk(&self, _place: usize) {}
    /// What it had at its start.
    fn least(&self) -> Size;
    /// What it can have.
    fn most(&self) -> Size {
        self.least()
    }
    /// Has the guest have `mib` MiB of memory; how much it has then, or when nothing has changed for `patience`.
    ///
    /// # Errors
    /// When it cannot have as much.
    fn resize_memory(&self, _mib: u32, _patience: Duration) -> Result<u32, MicrovmError> {
        Ok(self.least().memory_mib)
    }
    /// Makes vCPUs that are missing for `count`.
    ///
    /// # Errors
    /// When it cannot have as many.
    fn add_vcpus(&self, _count: u8) -> Result<(), MicrovmError> {
        Ok(())
    }
}

/// Queues of a disk at most: more bring nothing where one thread serves them.
const DISK_QUEUES: u16 = 4;

impl Machine for Microvm {
    fn end_event(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsRawFd;
        // SAFETY: the eventfd lives as long as the microVM, which the result borrows.
        unsafe { BorrowedFd::borrow_raw(self.exit_event().as_raw_fd()) }
    }

    fn end(&self) -> Option<ExitReason> {
        self.exit_reason()
    }

    fn stop(&self) {
        Microvm::stop(self);
    }

    fn console_tail(&self) -> String {
        self.console().tail()
    }

    fn empty_places(&self) -> usize {
        Microvm::empty_places(self)
    }

    fn attach_disk(&self, disk: BlockConfig) -> Result<usize, MicrovmError> {
        Microvm::attach_disk(self, disk)
    }

    fn detach_disk(&self, place: usize) {
        if let Err(error) = Microvm::detach_disk(self, place) {
            log::warn!("{error}");
        }
    }

    fn least(&self) -> Size {
        Size { memory_mib: *self.memory_range().start(), vcpus: *self.vcpu_range().start() }
    }

    fn most(&self) -> Size {
        Size { memory_mib: *self.memory_range().end(), vcpus: *self.vcpu_range().end() }
    }

    fn resize_memory(&self, mib: u32, patience: Duration) -> Result<u32, MicrovmError> {
        Microvm::resize_memory(self, mib, patience)
    }

    fn add_vcpus(&self, count: u8) -> Result<(), MicrovmError> {
        Microvm::add_vcpus(self, count)
    }
}

/// Where the agent reports that it is up.
pub struct ReadyPort {
    listener: VsockListener,
}

impl ReadyPort {
    /// Waits for the report, once.
    ///
    /// # Errors
    /// That it did not come in time, or that the guest is gone.
    pub fn wait(self, timeout: Duration) -> io::Result<Ready> {
        let mut stream = self.listener.accept(Some(timeout))?;
        stream.set_read_timeout(Some(timeout))?;
        frame::read(&mut stream)
    }
}

/// A virtual machine that has been started, with the ways to its guest.
pub struct Started {
    /// The machine.
    pub vm: Microvm,
    /// To the guest's ports.
    pub host: VsockHost,
    /// From the agent.
    pub ready: ReadyPort,
}

/// What a guest is booted with.
pub struct Boot {
    /// Kernel and initramfs.
    pub image: GuestImage,
    /// RAM and vCPUs at the start.
    pub size: Size,
    /// What there can be.
    pub most: Size,
    /// RAM is of huge pages.
    pub huge_pages: bool,
    /// Files.
    pub share: FsShare,
    /// Network interfaces, with or without their taps: see `Microvm::attach_net`.
    pub nets: Vec<Net>,
    /// How many places there are for disks.
    pub places: usize,
    /// Where to copy the guest's console to, all of its messages then.
    pub console: Option<OwnedFd>,
}

/// Builds a microVM and starts it.
///
/// # Errors
/// Any [`VmError`].
pub fn boot(boot: Boot) -> Result<Started, VmError> {
    let (vsock, host) = Vsock::new(GUEST_CID).map_err(device("vsock device"))?;
    // Before the guest runs: it dials once.
    let ready = ReadyPort { listener: host.listen(ports::READY).map_err(device("vsock device"))? };
    let config = MicrovmConfig {
        kvm: PathBuf::from(KVM),
        memory_mib: boot.size.memory_mib,
        huge_pages: boot.huge_pages,
        vcpus: boot.size.vcpus,
        max_vcpus: boot.most.vcpus,
        kernel: boot.image.kernel,
        initramfs: Some(boot.image.initramfs),
        cmdline: if boot.console.is_some() { "loglevel=7 katavm.log=debug".into() } else { String::new() },
    };
    let builder = Microvm::builder(config)
        .vsock(vsock)
        .fs(Fs::new(SHARED_TAG, boot.share).map_err(device("shared file system"))?)
        .rng(Rng::new().map_err(device("entropy source"))?);
    let builder = match boot.huge_pages {
        // A huge page that was given back is anybody's, and the guest would not survive that it is not there any more.
        true => builder,
        false => builder.balloon(Balloon::new().map_err(device("memory balloon"))?),
    };
    let growth = boot.most.memory_mib.saturating_sub(boot.size.memory_mib);
    let builder = match growth {
        0 => builder,
        growth => builder.mem(Mem::new(growth.into()).map_err(device("memory that is plugged in"))?),
    };
    let mut builder = boot.nets.into_iter().fold(builder, MicrovmBuilder::net);
    for _ in 0..boot.places {
        builder = builder.block(Block::slot(DISK_QUEUES.min(boot.size.vcpus.into()))?);
    }
    let vm = builder.build()?;
    if let Some(console) = boot.console {
        vm.console().mirror(std::fs::File::from(console));
    }
    vm.start()?;
    Ok(Started { vm, host, ready })
}

/// A duplicate of a machine's end event, to await.
///
/// # Errors
/// When no descriptors are left.
pub fn end_event(machine: &dyn Machine) -> io::Result<OwnedFd> {
    machine.end_event().as_fd().try_clone_to_owned()
}
