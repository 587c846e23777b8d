//! `katavm run`

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use katavm_protocol::agent::Exit;
use katavm_vmm::{ExitReason, Microvm};

use super::arguments::{Global, Run, TimingsFormat};
use super::state_root;
use crate::config::Bundle;
use crate::container::{self, ContainerError, Job, Step, Streams};
use crate::process::signals::Signals;
use crate::process::stdio::Inherited;
use crate::process::terminal::{Terminal, WindowSize};
use crate::sandbox::image::GuestImage;
use crate::sandbox::plan::{Plan, SizeOptions};
use crate::sandbox::vm::{self, Boot, Started};
use crate::sandbox::{Sandbox, SandboxError, probe, share};
use crate::state::{Id, Record, StateDir, Status};
use crate::timings::{self, Timings};
use crate::watcher::{self, Role};

/// How long what a failed guest has sent is waited for.
const LEFTOVER_PATIENCE: Duration = Duration::from_secs(2);

/// Runs a bundle's container; its exit code.
///
/// # Errors
/// Whatever keeps it from running to its end.
pub fn run(global: &Global, options: Run, mut timings: Timings) -> anyhow::Result<u8> {
    let bundle = Bundle::load(&options.bundle)?;
    for field in &bundle.unhonoured {
        log::warn!("{field}");
    }
    let plan = Plan::new(&bundle, SizeOptions { memory: options.memory, cpus: options.cpus })?;
    let terminal = plan.terminal.then(|| Terminal::new(std::io::stdin())).transpose()?;
    let image = GuestImage::find(options.kernel, options.initrd)?;
    let id = options.id.map_or_else(Id::random, Ok).context("cannot make up a container id")?;

    let signals = Signals::block()?;
    let root = state_root(global)?;
    // Dropped last: it sees that all else is gone.
    let (state, _watcher) = match watcher::start(root.claim(&id)?)? {
        Role::Sandbox(state, watcher) => (state, watcher),
        Role::Watcher => return Ok(0),
    };
    let mut record = Record::new(&id, &bundle.path);
    state.write(&record)?;

    probe::ensure(&root)?;
    let console = options.console.then(|| std::os::fd::AsFd::as_fd(&std::io::stderr()).try_clone_to_owned());
    let console = console.transpose().context("cannot duplicate standard error")?;
    let boot = Boot { image, size: plan.size, share: share::open(&plan.exports)?, nets: Vec::new(), console };
    let started = vm::boot(boot)?;
    let job = Job {
        id: id.to_string(),
        spec: plan.guest_spec,
        hostname: bundle.spec.hostname().clone().unwrap_or_default(),
        stdio: Inherited::take().context("cannot duplicate the standard streams")?,
        terminal,
        fallback_size: console_size(&bundle),
    };
    let outcome = supervise(started, job, signals, &state, &mut record, &mut timings);
    tell(&timings, options.timings);
    let exit = outcome.map_err(explain)?;
    Ok(u8::try_from(exit.status).unwrap_or(u8::MAX))
}

/// Runs the container and ends the virtual machine.
fn supervise(
    started: Started,
    job: Job,
    signals: Signals,
    state: &StateDir,
    record: &mut Record,
    timings: &mut Timings,
) -> anyhow::Result<Exit> {
    let Started { vm, host, ready } = started;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.context("cannot start the runtime for the agent's service")?;
    let mut streams = Streams::default();
    let mut progress = |step| note(step, timings, state, record);
    let outcome = runtime.block_on(async {
        let signals = signals.listen()?;
        let sandbox = Sandbox::new(&vm, Arc::new(host))?;
        let ready = move |patience| ready.wait(patience);
        let exit = container::run(&sandbox, ready, job, &signals, &mut streams, &mut progress).await;
        anyhow::Ok(exit?)
    });
    finish(vm, timings);
    // The streams have ended with the machine: what was on its way is written still.
    let leftover = runtime.block_on(async { tokio::time::timeout(LEFTOVER_PATIENCE, streams.drained()).await });
    if leftover.is_err() {
        log::warn!("nobody reads what the container wrote last");
    }
    // Threads that wait for a guest that is gone need not be waited for.
    runtime.shutdown_background();
    outcome
}

fn note(step: Step, timings: &mut Timings, state: &StateDir, record: &mut Record) {
    match step {
        Step::Ready(ready) => {
            let now = katavm_vmm::now();
            timings.mark_at(timings::AGENT_READY, now);
            // The guest's clock starts with its kernel: counted back from when its report arrived.
            timings.mark_at(timings::GUEST_CLOCK, now.saturating_sub(ready.ready_ns));
            let since_main = ready.ready_ns.saturating_sub(ready.agent_main_ns);
            timings.mark_at(timings::AGENT_MAIN, now.saturating_sub(since_main));
            timings.fact("guest_kernel", ready.kernel_release);
        }
        Step::Created => timings.mark(timings::CREATED),
        Step::Running => {
            timings.mark(timings::RUNNING);
            record.status = Status::Running;
        }
        Step::Exited => {
            timings.mark(timings::EXITED);
            record.status = Status::Stopped;
        }
    }
    if let Err(error) = state.write(record) {
        log::warn!("{error}");
    }
}

/// Ends the machine for good and notes what it knows.
fn finish(vm: Microvm, timings: &mut Timings) {
    timings.mark_at(timings::VM_CREATED, vm.timeline().vm_created());
    timings.mark_at(timings::FIRST_RUN, vm.timeline().first_run());
    timings.mark_at(timings::VM_ENDED, vm.timeline().ended());
    timings.fact("kvm_exits", vm.exits());
}

fn tell(timings: &Timings, format: Option<TimingsFormat>) {
    let text = match format {
        None => return,
        Some(TimingsFormat::Json) => timings.to_json() + "\n",
        Some(TimingsFormat::Table) => timings.to_table(),
    };
    // Nobody reads a closed standard error.
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// A KVM that gives up on a guest may be one that cannot run any: that is asked again then.
fn explain(error: anyhow::Error) -> anyhow::Error {
    let gave_up = matches!(
        error.downcast_ref(),
        Some(ContainerError::Sandbox(SandboxError::Ended { reason: ExitReason::InternalError { .. }, .. }))
    );
    if !gave_up {
        return error;
    }
    match katavm_vmm::probe::check(std::path::Path::new(probe::KVM)) {
        Err(reason) => error.context(reason),
        Ok(_) => error,
    }
}

fn console_size(bundle: &Bundle) -> WindowSize {
    let size = bundle.spec.process().as_ref().and_then(|process| process.console_size());
    let number = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
    size.map(|size| WindowSize { rows: number(size.height()), columns: number(size.width()) }).unwrap_or_default()
}
