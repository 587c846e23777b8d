//! `katavm run`

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};

use super::arguments::{Global, Network, Run, TimingsFormat};
use super::{background, control, launch_options, pid_file, state_root};
use crate::config::Bundle;
use crate::hooks::{self, Point};
use crate::launch::Launch;
use crate::pod::Io;
use crate::process::signals::Signals;
use crate::process::stdio::Inherited;
use crate::process::terminal::Terminal;
use crate::sandbox::probe;
use crate::sandbox::size::memory_limit;
use crate::state::{Id, Journal, Status};
use crate::supervise::{self, Mode, Outside};
use crate::timings::Timings;
use crate::watcher;

/// Runs a bundle's container; its exit code.
///
/// # Errors
/// Whatever keeps it from running to its end.
pub fn run(global: &Global, options: Run, mut timings: Timings) -> anyhow::Result<u8> {
    let (bundle, id) = target(&options)?;
    let Run { detach, keep, front, machine, network, publish, console, timings: told, .. } = options;
    let root = state_root(global)?;
    let mut settled = launch_options(global, machine, console)?;
    settled.user_network = network.map(|Network::User| publish);
    let has_own_network = settled.user_network.is_some();
    let launch = Launch::plan(&root, id, Bundle::load(&bundle)?, settled)?;
    if has_own_network && launch.pod.is_some() {
        bail!("--net: a container in the sandbox of another has the network of that");
    }
    if detach {
        background::make(global, &launch, &front)?;
        if let Err(error) = control::start(global, &launch.id) {
            super::delete::by_force(&state_root(global)?, &launch.id)?;
            return Err(error);
        }
        return Ok(0);
    }
    if launch.pod.is_some() {
        bail!("a container in the sandbox of another goes on by itself: use create and start, or run --detach");
    }
    if front.console_socket.is_some() {
        bail!("cannot use console socket if katavm will not detach or allocate tty");
    }
    if front.preserve_fds > 0 {
        bail!("--preserve-fds: descriptors of the host mean nothing in a guest with a kernel of its own");
    }
    let terminal = launch.plan.terminal.then(|| Terminal::new(std::io::stdin())).transpose()?;

    let signals = Signals::block()?;
    // Made first and dropped last: it cleans up after everything else.
    let _watcher = watcher::start(&root)?;
    let state = root.claim(&launch.id)?;
    let stand_in = launch.start_stand_in(None)?;
    let pid = stand_in.pid;
    if let Some(path) = &front.pid_file {
        pid_file::write(path, pid.as_raw_nonzero().get())?;
    }
    let mut record = launch.recorded(pid);
    record.kept = keep;
    let hooks = record.hooks.clone();
    let state_now = record.for_hooks(Status::Creating);
    let directory = state.path().to_owned();
    let journal = Journal::new(state, record);
    hooks::run_before(hooks.as_ref(), &state_now)?;
    launch.enter_cgroup(pid.as_raw_nonzero().get().unsigned_abs())?;
    probe::ensure(&root)?;
    let io = Io {
        stdio: Inherited::take().context("cannot duplicate the standard streams")?,
        has_terminal: terminal.is_some(),
        terminal: terminal.map(Arc::new),
        fallback_size: launch.console_size(),
        patience: None,
        lingers: false,
    };
    let outside = Outside { io: Some(io), stand_in, signals, journal, directory };
    let outcome = supervise::supervise(&launch, outside, Mode::Foreground, &mut timings);
    if !keep {
        let state_now = launch.record().for_hooks(Status::Stopped);
        hooks::run_all(hooks.as_ref(), Point::Poststop, &state_now);
    }
    tell(&timings, told);
    // It ends with its link; nobody else waits for it.
    let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
    let exit = outcome?;
    if exit.oom_killed {
        log::warn!("{}", out_of_memory(memory_limit(&launch.bundle.spec), launch.plan.size.memory_mib));
    }
    Ok(u8::try_from(exit.status).unwrap_or(u8::MAX))
}

/// Which bundle, and under which id: `run BUNDLE`, or `run [--bundle BUNDLE] ID` as with runc.
fn target(options: &Run) -> anyhow::Result<(PathBuf, Id)> {
    let is_bundle = |path: &Path| path.components().count() != 1 || path.join("config.json").exists();
    if options.front.bundle.is_none() && (options.id.is_some() || is_bundle(&options.target)) {
        let id = options.id.clone().map_or_else(Id::random, Ok).context("cannot make up a container id")?;
        return Ok((options.target.clone(), id));
    }
    if options.id.is_some() {
        bail!("give the container's name once: with --id, or with --bundle and as the argument");
    }
    let bundle = options.front.bundle.clone().unwrap_or_else(|| PathBuf::from("."));
    if options.front.bundle.is_none() && !bundle.join("config.json").exists() {
        // Nothing but a bundle was meant: its own error is the helpful one.
        return Ok((options.target.clone(), Id::random().context("cannot make up a container id")?));
    }
    let name = options.target.to_str().context("a container's name must be UTF-8")?;
    Ok((bundle, name.parse()?))
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

/// What an exit code of 137 does not tell.
fn out_of_memory(limit: Option<u64>, guest_mib: u32) -> String {
    const BEGIN: &str = "out of memory: the guest's kernel killed a process of the container";
    match limit.map(|bytes| bytes >> 20).filter(|limit| *limit < guest_mib.into()) {
        Some(limit) => format!("{BEGIN}, whose limit is {limit} MiB (linux.resources.memory.limit)"),
        None => format!("{BEGIN}; the whole guest has {guest_mib} MiB, --memory gives it more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whose_memory_ran_out_is_told() {
        assert!(out_of_memory(Some(64 << 20), 146).ends_with("whose limit is 64 MiB (linux.resources.memory.limit)"));
        for limit in [None, Some(1 << 30)] {
            assert!(out_of_memory(limit, 512).ends_with("the whole guest has 512 MiB, --memory gives it more"));
        }
    }
}
