//! A microVM that was built: starting, pausing, stopping and watching it.

use std::fs::File;
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use katavm_devices::balloon::Balloon;
use katavm_devices::block::{Block, BlockConfig, BlockError};
use katavm_devices::mem::MemError;
use katavm_devices::memory::GuestMemory;
use katavm_devices::net::{Backend, Net, NetLimits};
use katavm_devices::rate::Limits;
use katavm_devices::vsock::ConnectionId;
use kvm_ioctls::{Kvm, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::builder::MicrovmBuilder;
use crate::config::MicrovmConfig;
use crate::console::Console;
use crate::control::Goal;
use crate::device::{Device, lock};
use crate::ending::ExitReason;
use crate::event_loop::EventLoop;
use crate::kvm::{KvmError, ioctl};
use crate::snapshot::{self, MicrovmState, SnapshotError, VcpuState, VmState};
use crate::timeline::Timeline;
use crate::vcpu::cpuid::Cpuid;
use crate::vcpu::{self, Environment, VcpuThread};

/// Why a microVM cannot do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum MicrovmError {
    /// It has ended.
    #[error("the virtual machine has ended: {0}")]
    Ended(ExitReason),
    /// It has fewer network interfaces.
    #[error("the virtual machine has no network interface {0}, counted from 0")]
    NoInterface(usize),
    /// Every place for disks is taken.
    #[error("the virtual machine has no place left for a disk")]
    NoPlace,
    /// No disk has this place.
    #[error("place {0} of the virtual machine has no disk")]
    NoDisk(usize),
    /// The disk is not possible.
    #[error(transparent)]
    Disk(#[from] BlockError),
    /// It was built without one.
    #[error("the virtual machine has no balloon")]
    NoBalloon,
    /// It was built without memory to grow into, or with less.
    #[error(transparent)]
    Memory(#[from] MemError),
    /// It was built for fewer.
    #[error("the virtual machine cannot have {wanted} vCPUs: {most} at most")]
    Vcpus {
        /// What was asked for.
        wanted: u8,
        /// What there can be.
        most: u8,
    },
    /// A vCPU cannot be made.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Its thread cannot be made.
    #[error("cannot get a thread for a vCPU: {0}")]
    Thread(std::io::Error),
    /// The backend cannot be watched.
    #[error("cannot attach a network interface: {0}")]
    Attach(std::io::Error),
}

/// A virtual machine with its devices and threads. Dropping it stops it.
pub struct Microvm {
    // Threads before what they use: fields are dropped in this order.
    pub(crate) vcpus: Mutex<Vec<VcpuThread>>,
    pub(crate) loops: Vec<EventLoop>,
    pub(crate) environment: Environment,
    pub(crate) devices: Vec<Device>,
    pub(crate) kvm: Kvm,
    pub(crate) vm: Arc<VmFd>,
    pub(crate) memory: GuestMemory,
    pub(crate) memory_mib: u32,
    pub(crate) vcpu_range: RangeInclusive<u8>,
}

impl Microvm {
    /// Begins to build a microVM.
    #[must_use]
    pub fn builder(config: MicrovmConfig) -> MicrovmBuilder {
        MicrovmBuilder::new(config)
    }

    /// Lets the vCPUs run for the first time.
    ///
    /// # Errors
    /// When the microVM has ended.
    pub fn start(&self) -> Result<(), MicrovmError> {
        self.resume()
    }

    /// Stops all vCPUs and device loops where they are; returns when all of them stand still.
    ///
    /// # Errors
    /// When the microVM has ended.
    pub fn pause(&self) -> Result<(), MicrovmError> {
        self.alive()?;
        self.set(Goal::Pause);
        self.environment.control.wait_parked();
        // What the host does for the guest is part of what stands still.
        self.devices.iter().for_each(|device| lock(&*device.shared()).settle());
        self.alive()
    }

    /// Lets all vCPUs and device loops go on.
    ///
    /// # Errors
    /// When the microVM has ended.
    pub fn resume(&self) -> Result<(), MicrovmError> {
        self.alive()?;
        self.set(Goal::Run);
        Ok(())
    }

    /// Stops it for good, whatever the guest does.
    pub fn stop(&self) {
        self.environment.ending.end(ExitReason::Stopped);
        self.set(Goal::Stop);
    }

    /// Waits until it has ended, and stops its threads.
    #[must_use]
    pub fn wait(&self) -> ExitReason {
        let reason = self.environment.ending.wait();
        self.set(Goal::Stop);
        // What the guest sent before it ended reaches the host's streams, too.
        for device in &self.devices {
            if let Device::Vsock(vsock) = device {
                lock(vsock).settle();
            }
        }
        reason
    }

    /// Waits for its end and closes the host's ends of all streams: what the guest sent before has been passed on.
    pub fn hang_up(&self) {
        // Why it ended is told by `exit_reason`.
        let _ = self.wait();
        for device in &self.devices {
            if let Device::Vsock(vsock) = device {
                drop(lock(vsock).detach());
            }
        }
    }

    /// The state of the paused machine, RAM apart.
    ///
    /// # Errors
    /// When it runs or has ended, or when KVM refuses.
    pub fn save(&self) -> Result<MicrovmState, SnapshotError> {
        self.paused()?;
        let threads = lock(&self.vcpus);
        let mut vcpus = Vec::with_capacity(threads.len());
        for thread in &*threads {
            vcpus.push(VcpuState::save(&self.kvm, &lock(thread.vcpu()))?);
        }
        let bus = &self.environment.bus;
        Ok(MicrovmState {
            memory_mib: self.memory_mib,
            vcpus,
            vm: VmState::save(&self.vm)?,
            transports: bus.transports().iter().map(|transport| lock(transport).save()).collect(),
            devices: self.devices.iter().map(Device::save).collect(),
            serial: bus.serial().save(),
        })
    }

    /// Writes the RAM of the paused machine to `file`.
    ///
    /// # Errors
    /// When it runs or has ended, or of the file.
    pub fn save_memory(&self, file: &mut File) -> Result<(), SnapshotError> {
        self.paused()?;
        Ok(snapshot::write(&self.memory, file)?)
    }

    /// Takes the host's ends of all streams out of the paused machine, which is of no use after: see `Vsock::detach`.
    ///
    /// # Errors
    /// When it runs or has ended.
    pub fn detach_streams(&self) -> Result<Vec<(ConnectionId, OwnedFd)>, SnapshotError> {
        self.paused()?;
        let mut streams = Vec::new();
        for device in &self.devices {
            if let Device::Vsock(vsock) = device {
                streams.extend(lock(vsock).detach());
            }
        }
        Ok(streams)
    }

    fn paused(&self) -> Result<(), SnapshotError> {
        match self.exit_reason() {
            Some(reason) => Err(SnapshotError::Ended(reason)),
            None if self.environment.control.goal() == Goal::Pause => Ok(()),
            None => Err(SnapshotError::Running),
        }
    }

    /// Gives network interface `index`, counted from 0 in the order in which they were added, its backends, running
    /// or not: one for all of its pairs of queues, or one for each. Its link goes up.
    ///
    /// # Errors
    /// When there is no such interface, or a backend's descriptor cannot be watched.
    pub fn attach_net(
        &self,
        index: usize,
        backends: impl IntoIterator<Item = impl Backend + 'static>,
    ) -> Result<(), MicrovmError> {
        lock(self.interface(index)?).attach_queues(backends).map_err(MicrovmError::Attach)
    }

    /// Holds the link of network interface `index` down, or lets it be up while it has a backend.
    ///
    /// # Errors
    /// When there is no such interface.
    pub fn set_net_link(&self, index: usize, up: bool) -> Result<(), MicrovmError> {
        lock(self.interface(index)?).set_link(up);
        Ok(())
    }

    /// Takes the backend of network interface `index` away, if it has one: its link goes down.
    ///
    /// # Errors
    /// When there is no such interface.
    pub fn detach_net(&self, index: usize) -> Result<(), MicrovmError> {
        lock(self.interface(index)?).detach();
        Ok(())
    }

    /// Sets other limits for network interface `index`.
    ///
    /// # Errors
    /// When there is no such interface.
    pub fn set_net_limits(&self, index: usize, limits: NetLimits) -> Result<(), MicrovmError> {
        lock(self.interface(index)?).set_limits(limits);
        Ok(())
    }

    /// How many places for disks are empty.
    #[must_use]
    pub fn empty_places(&self) -> usize {
        let is_empty = |device: &&Device| matches!(device, Device::Block(block) if lock(block).is_empty());
        self.devices.iter().filter(is_empty).count()
    }

    /// Puts a disk into an empty place, running or not; the place, by which the agent binds its driver.
    ///
    /// # Errors
    /// When no place is empty, or the disk is not possible.
    pub fn attach_disk(&self, config: BlockConfig) -> Result<usize, MicrovmError> {
        for (place, device) in self.devices.iter().enumerate() {
            if let Device::Block(block) = device {
                let mut block = lock(block);
                if block.is_empty() {
                    block.attach(config)?;
                    return Ok(place);
                }
            }
        }
        Err(MicrovmError::NoPlace)
    }

    /// Takes the disk at `place` away, if there is one. The agent unbinds its driver before; a driver that is still
    /// there gets errors from now on.
    ///
    /// # Errors
    /// When it is no place for disks.
    pub fn detach_disk(&self, place: usize) -> Result<(), MicrovmError> {
        self.disk(place)?.detach();
        Ok(())
    }

    /// Looks how large the disk at `place` is now, and tells the guest when that has changed.
    ///
    /// # Errors
    /// When there is none, or of the host.
    pub fn resize_disk(&self, place: usize) -> Result<(), MicrovmError> {
        let transport = self.environment.bus.transports().get(place).ok_or(MicrovmError::NoDisk(place))?;
        // The transport first, as accesses of vCPUs do: no driver reads half of the capacity.
        let mut transport = lock(transport);
        if self.disk(place)?.resize()? {
            transport.config_changed();
        }
        Ok(())
    }

    /// Sets other limits for the disk at `place`.
    ///
    /// # Errors
    /// When there is none.
    pub fn limit_disk(&self, place: usize, limits: Limits) -> Result<(), MicrovmError> {
        Ok(self.disk(place)?.set_limits(limits)?)
    }

    fn disk(&self, place: usize) -> Result<MutexGuard<'_, Block>, MicrovmError> {
        match self.devices.get(place) {
            Some(Device::Block(block)) => Ok(lock(block)),
            _ => Err(MicrovmError::NoDisk(place)),
        }
    }

    /// How many MiB of memory it had at its start, and can have: see [`Self::resize_memory`].
    #[must_use]
    pub fn memory_range(&self) -> RangeInclusive<u32> {
        let growth = self.devices.iter().find_map(Device::mem).map_or(0, |mem| lock(mem).region_len() >> 20);
        self.memory_mib..=self.memory_mib.saturating_add(u32::try_from(growth).unwrap_or(u32::MAX))
    }

    /// How many vCPUs it had at its start, and can have: see [`Self::add_vcpus`].
    #[must_use]
    pub fn vcpu_range(&self) -> RangeInclusive<u8> {
        self.vcpu_range.clone()
    }

    /// Asks the guest to have `mib` MiB of memory in all, and waits until it has, or for `patience` in vain; how many MiB it
    /// has then. It never has fewer than at its start, and may keep more than it is to have where it cannot do without.
    ///
    /// # Errors
    /// When it cannot have as many.
    pub fn resize_memory(&self, mib: u32, patience: Duration) -> Result<u32, MicrovmError> {
        let wanted = u64::from(mib.saturating_sub(self.memory_mib));
        let found = self.devices.iter().enumerate().find_map(|(place, device)| Some((place, device.mem()?)));
        let Some((place, mem)) = found else {
            return if wanted == 0 { Ok(self.memory_mib) } else { Err(MemError::TooMuch { wanted, most: 0 }.into()) };
        };
        if let Some(transport) = self.environment.bus.transports().get(place) {
            // The transport first, as accesses of vCPUs do: no driver reads half of a number.
            let mut transport = lock(transport);
            lock(mem).request(wanted)?;
            transport.config_changed();
        }
        let progress = lock(mem).progress();
        let plugged = progress.wait(patience, |plugged| plugged.div_ceil(2 << 20) == wanted.div_ceil(2));
        Ok(self.memory_mib + u32::try_from(plugged >> 20).unwrap_or(u32::MAX))
    }

    /// Makes vCPUs until there are `count`; the guest can bring those that are new online then. It takes none away: one
    /// that the guest has taken offline costs nothing but its thread, which waits.
    ///
    /// # Errors
    /// When it was built for fewer, or a vCPU or its thread cannot be made.
    pub fn add_vcpus(&self, count: u8) -> Result<(), MicrovmError> {
        let most = *self.vcpu_range.end();
        if count > most {
            return Err(MicrovmError::Vcpus { wanted: count, most });
        }
        let mut vcpus = lock(&self.vcpus);
        let first = u8::try_from(vcpus.len()).unwrap_or(u8::MAX);
        if first >= count {
            return Ok(());
        }
        let cpuid = Cpuid::supported(&self.kvm)?;
        for index in first..count {
            let vcpu = self.vm.create_vcpu(index.into()).map_err(ioctl("KVM_CREATE_VCPU"))?;
            vcpu::set_up(&vcpu, &cpuid.of(index, most))?;
            vcpus.push(VcpuThread::spawn(index, vcpu, &self.environment).map_err(MicrovmError::Thread)?);
        }
        Ok(())
    }

    /// Asks the guest to have `mib` MiB of its memory in the balloon, which the host has then.
    ///
    /// # Errors
    /// When it has no balloon.
    pub fn set_balloon(&self, mib: u32) -> Result<(), MicrovmError> {
        lock(self.balloon()?).set_target(mib);
        Ok(())
    }

    /// How many MiB are in the balloon, as the guest says.
    ///
    /// # Errors
    /// When it has no balloon.
    pub fn balloon_mib(&self) -> Result<u32, MicrovmError> {
        Ok(lock(self.balloon()?).held_mib())
    }

    fn balloon(&self) -> Result<&Mutex<Balloon>, MicrovmError> {
        let balloon = self.devices.iter().find_map(|device| match device {
            Device::Balloon(balloon) => Some(&**balloon),
            _ => None,
        });
        balloon.ok_or(MicrovmError::NoBalloon)
    }

    fn interface(&self, index: usize) -> Result<&Mutex<Net>, MicrovmError> {
        let mut nets = self.devices.iter().filter_map(|device| match device {
            Device::Net(net) => Some(&**net),
            _ => None,
        });
        nets.nth(index).ok_or(MicrovmError::NoInterface(index))
    }

    /// Why it ended, if it has.
    #[must_use]
    pub fn exit_reason(&self) -> Option<ExitReason> {
        self.environment.ending.reason()
    }

    /// An eventfd that is readable from the end on.
    #[must_use]
    pub fn exit_event(&self) -> &EventFd {
        self.environment.ending.event()
    }

    /// What the guest writes to its serial console.
    #[must_use]
    pub fn console(&self) -> &Console {
        &self.environment.console
    }

    /// When the steps of the boot happened.
    #[must_use]
    pub fn timeline(&self) -> &Timeline {
        &self.environment.timeline
    }

    /// How often vCPUs left the guest so far, by KVM's own count.
    #[must_use]
    pub fn exits(&self) -> u64 {
        lock(&self.vcpus).iter().map(VcpuThread::exits).sum()
    }

    fn alive(&self) -> Result<(), MicrovmError> {
        self.exit_reason().map_or(Ok(()), |reason| Err(MicrovmError::Ended(reason)))
    }

    fn set(&self, goal: Goal) {
        self.environment.control.set(goal);
        lock(&self.vcpus).iter().for_each(VcpuThread::kick);
        self.loops.iter().for_each(EventLoop::kick);
    }
}

impl Drop for Microvm {
    fn drop(&mut self) {
        self.stop();
    }
}
