//! Building a microVM, step by step.

use std::io;
use std::sync::{Arc, Mutex};

use katavm_devices::block::Block;
use katavm_devices::fs::Fs;
use katavm_devices::legacy::Serial;
use katavm_devices::memory::GuestMemory;
use katavm_devices::rng::Rng;
use katavm_devices::virtio::Interrupt;
use katavm_devices::virtio::mmio::{MmioTransport, NOTIFY_OFFSET, SharedDevice, WINDOW};
use katavm_devices::virtio::queue::QueueError;
use katavm_devices::vsock::Vsock;
use kvm_ioctls::{IoEventAddress, Kvm, VmFd};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::boot::{self, BootError, Window};
use crate::bus::Bus;
use crate::config::MicrovmConfig;
use crate::console::Console;
use crate::control::{Control, Goal};
use crate::ending::Ending;
use crate::event_loop::EventLoop;
use crate::kvm::{self, KvmError, ioctl};
use crate::layout::{MAX_DEVICES, MAX_VCPUS, MMIO_START, SERIAL_GSI, VIRTIO_GSI};
use crate::memory::{self, MemoryError};
use crate::microvm::Microvm;
use crate::timeline::Timeline;
use crate::vcpu::{self, Environment, VcpuThread, cpuid::Cpuid};

/// Why a microVM was not built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The guest's RAM.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Kernel, initramfs or boot data.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A device's queues.
    #[error("a device cannot be set up: {0}")]
    Queue(#[from] QueueError),
    /// An eventfd, epoll instance or thread.
    #[error("cannot get an eventfd, epoll instance or thread: {0}")]
    Resource(#[from] io::Error),
    /// Too many or too few vCPUs.
    #[error("{0} vCPUs: it must be 1 to {MAX_VCPUS}")]
    Vcpus(u8),
    /// More devices than interrupt lines.
    #[error("{0} virtio devices: {MAX_DEVICES} at most")]
    Devices(usize),
}

/// A device and the event loop that serves it.
struct Slot {
    device: SharedDevice,
    /// Its requests block on the host's files: it gets a thread of its own.
    blocking: bool,
    name: &'static str,
}

/// Collects what a microVM is made of.
pub struct MicrovmBuilder {
    config: MicrovmConfig,
    slots: Vec<Slot>,
}

impl MicrovmBuilder {
    pub(crate) fn new(config: MicrovmConfig) -> Self {
        Self { config, slots: Vec::new() }
    }

    /// Adds the socket device.
    #[must_use]
    pub fn vsock(self, vsock: Vsock) -> Self {
        self.slot(Arc::new(Mutex::new(vsock)), false, "vsock")
    }

    /// Adds a shared file system.
    #[must_use]
    pub fn fs(self, fs: Fs) -> Self {
        self.slot(Arc::new(Mutex::new(fs)), true, "fs")
    }

    /// Adds a disk.
    #[must_use]
    pub fn block(self, block: Block) -> Self {
        self.slot(Arc::new(Mutex::new(block)), true, "block")
    }

    /// Adds the entropy source.
    #[must_use]
    pub fn rng(self, rng: Rng) -> Self {
        self.slot(Arc::new(Mutex::new(rng)), false, "rng")
    }

    fn slot(mut self, device: SharedDevice, blocking: bool, name: &'static str) -> Self {
        self.slots.push(Slot { device, blocking, name });
        self
    }

    /// Builds the microVM up to the point where its vCPUs may run; they wait for [`Microvm::start`].
    ///
    /// # Errors
    /// Any [`BuildError`]; nothing is left of the attempt.
    pub fn build(self) -> Result<Microvm, BuildError> {
        self.check()?;
        let timeline = Arc::new(Timeline::default());
        let ending = Ending::new(Arc::clone(&timeline))?;
        let control = Control::new(Goal::Pause);
        let console = Console::new(ending.clone());

        let kvm = kvm::open(&self.config.kvm)?;
        let vm = kvm.create_vm().map_err(ioctl("KVM_CREATE_VM"))?;
        timeline.mark_created();

        // Memory slots, then interrupt controllers, then eventfds: see `kvm::set_memory`.
        let memory = memory::create(self.config.memory_mib)?;
        kvm::set_memory(&vm, &memory)?;
        kvm::create_irqchip(&vm)?;
        let windows = windows(self.slots.len());
        let bus = Arc::new(self.attach(&vm, &memory, &windows, console.clone())?);

        let cmdline = boot::cmdline(&windows, &self.config.cmdline);
        let entry = boot::load(&memory, &self.config, &cmdline)?;
        vcpu::write_tables(&memory).map_err(BootError::from)?;

        let loops = self.spawn_loops(&control, &ending)?;
        let environment = Environment {
            bus: Arc::clone(&bus),
            control: control.clone(),
            ending: ending.clone(),
            console: console.clone(),
            timeline: Arc::clone(&timeline),
        };
        let vcpus = spawn_vcpus(&kvm, &vm, self.config.vcpus, entry, &environment)?;
        Ok(Microvm { vcpus, loops, environment, vm, memory })
    }

    fn check(&self) -> Result<(), BuildError> {
        if !(1..=MAX_VCPUS).contains(&self.config.vcpus) {
            return Err(BuildError::Vcpus(self.config.vcpus));
        }
        if self.slots.len() > MAX_DEVICES {
            return Err(BuildError::Devices(self.slots.len()));
        }
        Ok(())
    }

    /// Gives every device its window, its interrupt line and its kicks.
    fn attach(&self, vm: &VmFd, memory: &GuestMemory, windows: &[Window], console: Console) -> Result<Bus, BuildError> {
        let mut transports = Vec::with_capacity(self.slots.len());
        for (slot, window) in self.slots.iter().zip(windows) {
            let interrupt = Interrupt::new(line(vm, window.gsi)?);
            register_kicks(vm, &slot.device, window)?;
            let transport = MmioTransport::new(Arc::clone(&slot.device), memory.clone(), interrupt)?;
            transports.push(Arc::new(Mutex::new(transport)));
        }
        let serial = Serial::new(line(vm, SERIAL_GSI)?, console);
        Ok(Bus::new(transports, serial))
    }

    /// One loop for all devices that never block, and one for each that does.
    fn spawn_loops(&self, control: &Control, ending: &Ending) -> Result<Vec<EventLoop>, BuildError> {
        let device = |slot: &Slot| Arc::clone(&slot.device);
        let quick = self.slots.iter().filter(|slot| !slot.blocking).map(device).collect();
        let mut loops = vec![EventLoop::spawn("devices", quick, control, ending)?];
        for slot in self.slots.iter().filter(|slot| slot.blocking) {
            loops.push(EventLoop::spawn(slot.name, vec![device(slot)], control, ending)?);
        }
        Ok(loops)
    }
}

fn windows(count: usize) -> Vec<Window> {
    let addresses = (MMIO_START..).step_by(WINDOW as usize);
    addresses.zip(VIRTIO_GSI..).take(count).map(|(address, gsi)| Window { address, gsi }).collect()
}

/// An eventfd that raises interrupt line `gsi`.
fn line(vm: &VmFd, gsi: u32) -> Result<EventFd, BuildError> {
    let line = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
    vm.register_irqfd(&line, gsi).map_err(ioctl("KVM_IRQFD"))?;
    Ok(line)
}

/// A write of a queue's number to `QueueNotify` wakes the device's event loop without leaving the kernel.
fn register_kicks(vm: &VmFd, device: &SharedDevice, window: &Window) -> Result<(), BuildError> {
    let device = device.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let address = IoEventAddress::Mmio(window.address + NOTIFY_OFFSET);
    for (kick, index) in device.queues().kicks().iter().zip(0_u32..) {
        vm.register_ioevent(kick, &address, index).map_err(ioctl("KVM_IOEVENTFD"))?;
    }
    Ok(())
}

fn spawn_vcpus(
    kvm: &Kvm,
    vm: &VmFd,
    count: u8,
    entry: GuestAddress,
    environment: &Environment,
) -> Result<Vec<VcpuThread>, BuildError> {
    let cpuid = Cpuid::supported(kvm)?;
    let mut threads = Vec::with_capacity(count.into());
    for index in 0..count {
        let vcpu = vm.create_vcpu(index.into()).map_err(ioctl("KVM_CREATE_VCPU"))?;
        vcpu::set_up(&vcpu, index, &cpuid.of(index, count), entry)?;
        threads.push(VcpuThread::spawn(index, vcpu, environment)?);
    }
    Ok(threads)
}
