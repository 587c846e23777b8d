//! Building a microVM, step by step.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex};

use katavm_devices::balloon::Balloon;
use katavm_devices::block::Block;
use katavm_devices::fs::Fs;
use katavm_devices::legacy::{Serial, SerialState};
use katavm_devices::mem::Mem;
use katavm_devices::memory::GuestMemory;
use katavm_devices::net::Net;
use katavm_devices::rng::Rng;
use katavm_devices::virtio::mmio::{MmioTransport, NOTIFY_OFFSET, SharedDevice, WINDOW};
use katavm_devices::virtio::queue::QueueError;
use katavm_devices::virtio::{Interrupt, Worker};
use katavm_devices::vsock::Vsock;
use kvm_ioctls::{IoEventAddress, Kvm, VcpuFd, VmFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::boot::{self, BootError, Window};
use crate::bus::Bus;
use crate::config::MicrovmConfig;
use crate::console::Console;
use crate::control::{Control, Goal};
use crate::device::{Device, QUICK, SLOTS, lock};
use crate::ending::Ending;
use crate::event_loop::EventLoop;
use crate::growth::Growing;
use crate::kvm::{self, KvmError, ioctl};
use crate::layout::{MAX_DEVICES, MAX_VCPUS, MMIO_START, SERIAL_GSI, VIRTIO_GSI, VIRTIO_LINES};
use crate::memory::{self, Growth, MemoryError, Source};
use crate::microvm::Microvm;
use crate::snapshot::{MicrovmState, SnapshotError, same};
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
    /// The state to build from.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// Too many or too few vCPUs.
    #[error("{0} vCPUs: it must be 1 to {MAX_VCPUS}")]
    Vcpus(u8),
    /// More devices than there are places for.
    #[error("{0} virtio devices: {MAX_DEVICES} at most")]
    Devices(usize),
}

/// Collects what a microVM is made of.
pub struct MicrovmBuilder {
    config: MicrovmConfig,
    devices: Vec<Device>,
}

impl MicrovmBuilder {
    pub(crate) fn new(config: MicrovmConfig) -> Self {
        Self { config, devices: Vec::new() }
    }

    /// Adds the socket device.
    #[must_use]
    pub fn vsock(self, vsock: Vsock) -> Self {
        self.device(Device::Vsock(Arc::new(Mutex::new(vsock))))
    }

    /// Adds a shared file system.
    #[must_use]
    pub fn fs(self, fs: Fs) -> Self {
        self.device(Device::Fs(Arc::new(Mutex::new(fs))))
    }

    /// Adds a disk, or a place for one: see [`Microvm::attach_disk`].
    #[must_use]
    pub fn block(self, block: Block) -> Self {
        self.device(Device::Block(Arc::new(Mutex::new(block))))
    }

    /// Adds a network interface, with or without its backend: see [`Microvm::attach_net`].
    #[must_use]
    pub fn net(self, net: Net) -> Self {
        self.device(Device::Net(Arc::new(Mutex::new(net))))
    }

    /// Adds the entropy source.
    #[must_use]
    pub fn rng(self, rng: Rng) -> Self {
        self.device(Device::Rng(Arc::new(Mutex::new(rng))))
    }

    /// Adds the balloon, by which the guest gives memory back.
    #[must_use]
    pub fn balloon(self, balloon: Balloon) -> Self {
        self.device(Device::Balloon(Arc::new(Mutex::new(balloon))))
    }

    /// Adds memory to grow into: see [`Microvm::resize_memory`]. One at most.
    #[must_use]
    pub fn mem(self, mem: Mem) -> Self {
        self.device(Device::Mem(Arc::new(Mutex::new(mem))))
    }

    fn device(mut self, device: Device) -> Self {
        self.devices.push(device);
        self
    }

    /// Builds the microVM up to the point where its vCPUs may run; they wait for [`Microvm::start`].
    ///
    /// # Errors
    /// Any [`BuildError`]; nothing is left of the attempt.
    pub fn build(self) -> Result<Microvm, BuildError> {
        let frame = self.frame(Source::Nothing { huge_pages: self.config.huge_pages }, None)?;
        let cmdline = boot::cmdline(&frame.windows, &self.extra_cmdline());
        let entry = boot::load(&frame.memory, &self.config, &cmdline)?;
        vcpu::write_tables(&frame.memory).map_err(BootError::from)?;
        let cpuid = Cpuid::supported(&frame.kvm)?;
        let count = self.config.possible_vcpus();
        self.finish(frame, |index, vcpu| {
            vcpu::set_up(vcpu, &cpuid.of(index, count))?;
            if index == 0 {
                vcpu::boot(vcpu, entry)?;
            }
            Ok(())
        })
    }

    /// Builds the microVM as it was saved, with its RAM mapped privately from `memory`. The devices must
    /// have been restored from their own states and added in the same order; kernel and initramfs are not used.
    ///
    /// # Errors
    /// Any [`BuildError`]; nothing is left of the attempt.
    pub fn build_from(self, state: &MicrovmState, memory: &File) -> Result<Microvm, BuildError> {
        same("MiB of memory", state.memory_mib as usize, self.config.memory_mib as usize)?;
        same("vCPUs", state.vcpus.len(), self.config.vcpus.into())?;
        same("devices", state.transports.len(), self.devices.len())?;
        let frame = self.frame(Source::Snapshot(memory), Some(&state.serial))?;
        let transports = frame.environment.bus.transports().iter().zip(&state.transports);
        for (index, (transport, saved)) in transports.enumerate() {
            lock(transport).restore(saved).map_err(|error| SnapshotError::Device(index, error))?;
        }
        let microvm = self.finish(frame, |index, vcpu| match state.vcpus.get(usize::from(index)) {
            Some(saved) => Ok(saved.restore(vcpu)?),
            None => Ok(()),
        })?;
        // Only now: interrupts need vCPUs to go to, and a local APIC forgets what came before it was restored.
        state.vm.restore(&microvm.vm)?;
        let bus = &microvm.environment.bus;
        bus.transports().iter().for_each(|transport| lock(transport).interrupt().resend());
        bus.serial().resend().map_err(SnapshotError::from)?;
        Ok(microvm)
    }

    /// The machine without its vCPUs and threads.
    fn frame(&self, source: Source<'_>, serial: Option<&SerialState>) -> Result<Frame, BuildError> {
        self.check()?;
        let timeline = Arc::new(Timeline::default());
        let ending = Ending::new(Arc::clone(&timeline))?;
        let console = Console::new(ending.clone());

        let kvm = kvm::open(&self.config.kvm)?;
        let vm = Arc::new(kvm.create_vm().map_err(ioctl("KVM_CREATE_VM"))?);
        timeline.mark_created();

        // Memory slots, then interrupt controllers, then eventfds: see `kvm::set_memory`.
        let memory = memory::map(self.config.memory_mib, self.growth(), source)?;
        kvm::set_memory(&vm, &memory)?;
        self.place_growth(&vm, &memory)?;
        kvm::create_irqchip(&vm)?;
        let windows = windows(self.devices.len());
        let transports = self.attach(&vm, &memory, &windows)?;
        let line = line(&vm, SERIAL_GSI)?;
        let serial = match serial {
            Some(state) => Serial::restore(state, line, console.clone()).map_err(SnapshotError::from)?,
            None => Serial::new(line, console.clone()),
        };
        let bus = Arc::new(Bus::new(transports, serial));
        let environment = Environment { bus, control: Control::new(Goal::Pause), ending, console, timeline };
        Ok(Frame { kvm, vm, memory, windows, environment })
    }

    /// Adds vCPUs, each set up by `set_up`, and the threads.
    fn finish(
        self,
        frame: Frame,
        set_up: impl Fn(u8, &VcpuFd) -> Result<(), BuildError>,
    ) -> Result<Microvm, BuildError> {
        let Frame { kvm, vm, memory, environment, .. } = frame;
        let loops = self.spawn_loops(&environment)?;
        let mut vcpus = Vec::with_capacity(self.config.vcpus.into());
        for index in 0..self.config.vcpus {
            let vcpu = vm.create_vcpu(index.into()).map_err(ioctl("KVM_CREATE_VCPU"))?;
            set_up(index, &vcpu)?;
            vcpus.push(VcpuThread::spawn(index, vcpu, &environment)?);
        }
        let memory_mib = self.config.memory_mib;
        let (vcpus, vcpu_range) = (Mutex::new(vcpus), self.config.vcpus..=self.config.possible_vcpus());
        Ok(Microvm { vcpus, loops, environment, devices: self.devices, kvm, vm, memory, memory_mib, vcpu_range })
    }

    /// What the caller adds to the command line, and what memory and vCPUs that come later need.
    fn extra_cmdline(&self) -> String {
        let MicrovmConfig { cmdline, vcpus, .. } = &self.config;
        let growing = if self.growth().len > 0 { boot::GROWING } else { "" };
        let maxcpus = if self.config.possible_vcpus() > *vcpus { format!(" maxcpus={vcpus}") } else { String::new() };
        format!("{cmdline}{growing}{maxcpus}").trim_start().to_owned()
    }

    /// The region that memory is plugged into.
    fn growth(&self) -> Growth {
        self.growing().map_or_else(Growth::default, |mem| {
            let mem = lock(mem);
            Growth { len: mem.region_len(), granted: mem.granted() }
        })
    }

    fn growing(&self) -> Option<&Mutex<Mem>> {
        self.devices.iter().find_map(Device::mem)
    }

    /// Has what is plugged in already be there, before queues are looked for in it.
    fn place_growth(&self, vm: &Arc<VmFd>, memory: &GuestMemory) -> Result<(), BuildError> {
        let Some(mem) = self.growing().filter(|mem| lock(mem).region_len() > 0) else { return Ok(()) };
        let start = memory::growth_start(self.config.memory_mib);
        let backing = Box::new(Growing::new(Arc::clone(vm), memory.clone()));
        Ok(lock(mem).place(start.0, backing)?)
    }

    fn check(&self) -> Result<(), BuildError> {
        let (vcpus, possible) = (self.config.vcpus, self.config.possible_vcpus());
        if vcpus == 0 || possible > MAX_VCPUS {
            return Err(BuildError::Vcpus(possible));
        }
        if self.devices.len() > MAX_DEVICES {
            return Err(BuildError::Devices(self.devices.len()));
        }
        Ok(())
    }

    /// Gives every device its window, its interrupt line and its kicks.
    fn attach(
        &self,
        vm: &VmFd,
        memory: &GuestMemory,
        windows: &[Window],
    ) -> Result<Vec<Arc<Mutex<MmioTransport>>>, BuildError> {
        let mut transports = Vec::with_capacity(self.devices.len());
        for (device, window) in self.devices.iter().zip(windows) {
            let device = device.shared();
            let interrupt = Interrupt::new(line(vm, window.gsi)?);
            register_kicks(vm, &device, window)?;
            let transport = MmioTransport::new(device, memory.clone(), interrupt)?;
            transports.push(Arc::new(Mutex::new(transport)));
        }
        Ok(transports)
    }

    fn spawn_loops(&self, environment: &Environment) -> Result<Vec<EventLoop>, BuildError> {
        let Environment { control, ending, .. } = environment;
        let spawn = |(name, workers): (String, _)| Ok(EventLoop::spawn(&name, workers, control, ending)?);
        threads(&self.devices).into_iter().map(spawn).collect()
    }
}

/// One thread for all devices that are soon done, one for each that is not, one for all places of disks, which are empty at
/// first, and as many for all network interfaces, most of which are placeholders, as one of them has pairs of queues.
fn threads(devices: &[Device]) -> Vec<(String, Vec<Worker>)> {
    let mut threads = vec![(QUICK.to_owned(), Vec::new())];
    for device in devices {
        // A device that shares no thread shares those of none that came before; its own parts do.
        let shares = matches!(device.thread(), QUICK | SLOTS) || matches!(device, Device::Net(_));
        let first = if shares { 0 } else { threads.len() };
        for (name, worker) in device.parts() {
            match threads.iter_mut().skip(first).find(|(other, _)| *other == name) {
                Some((_, workers)) => workers.push(worker),
                None => threads.push((name, vec![worker])),
            }
        }
    }
    threads
}

/// A machine in the making.
struct Frame {
    kvm: Kvm,
    vm: Arc<VmFd>,
    memory: GuestMemory,
    windows: Vec<Window>,
    environment: Environment,
}

fn windows(count: usize) -> Vec<Window> {
    let addresses = (MMIO_START..).step_by(WINDOW as usize);
    let lines = (VIRTIO_GSI..VIRTIO_GSI + VIRTIO_LINES).cycle();
    addresses.zip(lines).take(count).map(|(address, gsi)| Window { address, gsi }).collect()
}

/// An eventfd that raises interrupt line `gsi`.
fn line(vm: &VmFd, gsi: u32) -> Result<EventFd, BuildError> {
    let line = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
    vm.register_irqfd(&line, gsi).map_err(ioctl("KVM_IRQFD"))?;
    Ok(line)
}

/// A write of a queue's number to `QueueNotify` wakes the device's event loop without leaving the kernel; where the vCPU is
/// to serve the queue, it leaves the guest.
fn register_kicks(vm: &VmFd, device: &SharedDevice, window: &Window) -> Result<(), BuildError> {
    let device = lock(device);
    let address = IoEventAddress::Mmio(window.address + NOTIFY_OFFSET);
    for (kick, index) in device.queues().kicks().iter().zip(0_u32..) {
        if !device.served_by_vcpu(index as usize) {
            vm.register_ioevent(kick, &address, index).map_err(ioctl("KVM_IOEVENTFD"))?;
        }
    }
    Ok(())
}
