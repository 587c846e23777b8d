//! The thread of one vCPU.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use katavm_devices::legacy::ResetRequest;
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::kick::{self, Kicker};
use crate::bus::Bus;
use crate::console::Console;
use crate::control::{Control, Goal};
use crate::ending::{Ending, ExitReason};
use crate::stats::VcpuStats;
use crate::timeline::Timeline;

/// The byte by which the agent announces that its kernel lacks an option.
const UNUSABLE_KERNEL: u8 = 2;

/// What all vCPUs of a machine share.
#[derive(Clone)]
pub struct Environment {
    pub bus: Arc<Bus>,
    pub control: Control,
    pub ending: Ending,
    pub console: Console,
    pub timeline: Arc<Timeline>,
}

/// A vCPU and the thread that runs it.
pub struct VcpuThread {
    vcpu: Arc<Mutex<VcpuFd>>,
    kicker: Kicker,
    control: Control,
    stats: Option<VcpuStats>,
    thread: Option<JoinHandle<()>>,
}

impl VcpuThread {
    /// Starts a thread that runs vCPU `index` as the control says.
    ///
    /// # Errors
    /// When the thread cannot be had.
    pub fn spawn(index: u8, vcpu: VcpuFd, environment: &Environment) -> io::Result<Self> {
        kick::install()?;
        // Older hosts have no such counters; then none are shown.
        let stats = VcpuStats::open(&vcpu).ok();
        let vcpu = Arc::new(Mutex::new(vcpu));
        let (sender, receiver): (Sender<Kicker>, Receiver<Kicker>) = channel();
        let runner = Runner { index, environment: environment.clone() };
        let member = environment.control.join();
        let shared = Arc::clone(&vcpu);
        let run = move || {
            let _member = member;
            runner.run(&shared, &sender);
        };
        let thread = std::thread::Builder::new().name(format!("vcpu{index}")).spawn(run)?;
        let kicker = receiver.recv().map_err(io::Error::other)?;
        Ok(Self { vcpu, kicker, control: environment.control.clone(), stats, thread: Some(thread) })
    }

    /// Makes the thread look at its goal.
    pub fn kick(&self) {
        if self.thread.as_ref().is_some_and(|thread| !thread.is_finished()) {
            self.kicker.kick();
        }
    }

    /// The vCPU itself. Only to be locked while its thread is parked or has returned: it holds it otherwise.
    pub fn vcpu(&self) -> &Mutex<VcpuFd> {
        &self.vcpu
    }

    /// How often the vCPU left the guest; zero on hosts whose KVM does not count.
    pub fn exits(&self) -> u64 {
        self.stats.as_ref().and_then(|stats| stats.exits().ok()).unwrap_or(0)
    }
}

impl Drop for VcpuThread {
    /// Stops the whole group: it is of no use without one of its members.
    fn drop(&mut self) {
        self.control.set(Goal::Stop);
        self.kick();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was reported by the guard in `run`.
            let _ = thread.join();
        }
    }
}

struct Runner {
    index: u8,
    environment: Environment,
}

impl Runner {
    fn run(&self, vcpu: &Mutex<VcpuFd>, kicker: &Sender<Kicker>) {
        let Environment { control, ending, timeline, .. } = &self.environment;
        let mut guard = ending.report_panic("a vCPU thread");
        let mut locked = vcpu.lock().unwrap_or_else(PoisonError::into_inner);
        // The receiver waits for exactly this.
        let _ = kicker.send(Kicker::new(&mut locked));
        loop {
            match control.goal() {
                Goal::Run => {
                    timeline.mark_first_run();
                    if let Err(reason) = self.step(&mut locked) {
                        ending.end(reason);
                        break;
                    }
                }
                Goal::Pause => {
                    complete(&mut locked);
                    drop(locked);
                    control.park();
                    locked = vcpu.lock().unwrap_or_else(PoisonError::into_inner);
                }
                Goal::Stop => break,
            }
        }
        guard.disarm();
    }

    /// Runs the guest until the next exit and handles it.
    fn step(&self, vcpu: &mut VcpuFd) -> Result<(), ExitReason> {
        let bus = &self.environment.bus;
        match vcpu.run() {
            Ok(VcpuExit::IoOut(port, data)) => match bus.port_write(port, data) {
                Some(request) => Err(self.reset(request)),
                None => Ok(()),
            },
            Ok(VcpuExit::IoIn(port, data)) => {
                bus.port_read(port, data);
                Ok(())
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                bus.mmio_read(address, data);
                Ok(())
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                bus.mmio_write(address, data);
                Ok(())
            }
            Ok(VcpuExit::Shutdown) => Err(ExitReason::TripleFault { vcpu: self.index, rip: rip(vcpu) }),
            Ok(VcpuExit::InternalError) => Err(self.internal_error(vcpu)),
            Ok(other) => {
                let what = format!("{other:?}");
                Err(ExitReason::InternalError { vcpu: self.index, rip: rip(vcpu), what })
            }
            Err(error) => match error.errno() {
                // Kicked: the next KVM_RUN shall enter the guest again, unless the goal has changed.
                libc::EINTR | libc::EAGAIN => {
                    vcpu.set_kvm_immediate_exit(0);
                    Ok(())
                }
                _ => {
                    let what = format!("KVM_RUN failed: {error}");
                    Err(ExitReason::InternalError { vcpu: self.index, rip: rip(vcpu), what })
                }
            },
        }
    }

    fn reset(&self, request: ResetRequest) -> ExitReason {
        match request {
            ResetRequest::Announced(UNUSABLE_KERNEL) => ExitReason::UnusableKernel,
            ResetRequest::Announced(_) => ExitReason::Orderly,
            ResetRequest::Cpu if self.environment.console.panicked() => ExitReason::Panic,
            ResetRequest::Cpu => ExitReason::Reset,
        }
    }

    fn internal_error(&self, vcpu: &mut VcpuFd) -> ExitReason {
        let run = vcpu.get_kvm_run();
        // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, for which this member is the valid one.
        let (suberror, data) = unsafe { (run.__bindgen_anon_1.internal.suberror, run.__bindgen_anon_1.internal.data) };
        let what = match suberror {
            1 => format!("an instruction it cannot emulate (KVM_INTERNAL_ERROR_EMULATION, {:x?})", &data[..4]),
            other => format!("internal error {other}"),
        };
        ExitReason::InternalError { vcpu: self.index, rip: rip(vcpu), what }
    }
}

/// Lets KVM finish the access that the last exit was about, without entering the guest: the registers are whole then.
fn complete(vcpu: &mut VcpuFd) {
    vcpu.set_kvm_immediate_exit(1);
    // Returns EINTR at once, by the flag.
    let _ = vcpu.run();
    vcpu.set_kvm_immediate_exit(0);
}

fn rip(vcpu: &VcpuFd) -> u64 {
    vcpu.get_regs().map_or(0, |regs| regs.rip)
}
