//! `katavm exec`

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use anyhow::{Context, bail};
use oci_spec::runtime::{Capabilities, Capability, Process, Spec, User};
use rustix::event::{PollFd, PollFlags, poll};

use super::arguments::{Exec, Global};
use super::{console, control, find, pid_file};
use crate::link::{self, FromStandIn, ToStandIn};
use crate::process::signals::{Received, Signals};
use crate::process::stdio::Inherited;
use crate::process::terminal::Terminal;
use crate::service::{Client, Streams};
use crate::standin;
use crate::state::{Found, Id};

/// What a process ends with whose sandbox process has died.
const KILLED: u8 = 128 + 9;

/// Runs a further process in a container; its exit code.
///
/// # Errors
/// Why it was not run.
pub fn exec(global: &Global, options: Exec) -> anyhow::Result<u8> {
    if options.preserve_fds > 0 {
        bail!("--preserve-fds: descriptors of the host mean nothing in a guest with a kernel of its own");
    }
    let found = find(global, &options.id)?;
    let process = process(&found, &options)?;
    let terminal = process.terminal().unwrap_or_default();
    let exec = Planned { found, id: Id::random()?, terminal, json: serde_json::to_vec(&process)? };
    if options.detach || options.console_socket.is_some() { exec.detached(&options) } else { exec.attached(&options) }
}

struct Planned {
    found: Found,
    id: Id,
    terminal: bool,
    json: Vec<u8>,
}

impl Planned {
    fn client(&self) -> anyhow::Result<Client> {
        control::client(&self.found, "cannot exec in a stopped container")
    }

    /// Makes and starts the process.
    fn start(self, client: &Client) -> anyhow::Result<()> {
        client.exec(self.id.as_str(), self.json, self.terminal)?;
        client.start(self.id.as_str())?;
        Ok(())
    }

    /// The process has this process' streams; returns at its end.
    fn attached(self, options: &Exec) -> anyhow::Result<u8> {
        let signals = Signals::block()?;
        let client = self.client()?;
        let stdio = Inherited::take().context("cannot duplicate the standard streams")?;
        let terminal = self.terminal.then(|| Terminal::new(std::io::stdin())).transpose()?.map(Arc::new);
        let stdin = std::io::stdin();
        let streams = if self.terminal { Streams::terminal(&stdin) } else { Streams::standard(&stdio) };
        let link = client.attach(self.id.as_str(), &streams)?;
        self.start(&client)?;
        // The sandbox process has made it raw; it comes back with this guard, even if that process dies.
        let _raw = terminal.as_ref().map(Terminal::raw).transpose()?;
        if let Some(path) = &options.pid_file {
            pid_file::write(path, std::process::id().cast_signed())?;
        }
        attend(&link, &signals)
    }

    /// The process goes on by itself, with a stand-in.
    fn detached(self, options: &Exec) -> anyhow::Result<u8> {
        let console = console::open(options.console_socket.as_deref(), self.terminal)?;
        let stdio = Inherited::take().context("cannot duplicate the standard streams")?;
        // Before there are threads: the stand-in gets its link when the sandbox process has taken the streams.
        let (link, stand_in) = {
            let client = self.client()?;
            let streams = match &console {
                Some(console) => Streams::terminal(&console.slave),
                None => Streams::standard(&stdio),
            };
            let link = client.attach(self.id.as_str(), &streams)?;
            drop(client);
            let slave = console.as_ref().map(|console| console.slave.try_clone()).transpose()?;
            let copy = link.try_clone()?;
            let plan = standin::Plan { terminal: slave, ..Default::default() };
            (link, standin::start(plan, copy).context("cannot make the process' stand-in")?)
        };
        drop(link);
        let client = self.client()?;
        self.start(&client)?;
        if let Some(console) = console {
            console.send()?;
        }
        if let Some(path) = &options.pid_file {
            pid_file::write(path, stand_in.as_raw_nonzero().get())?;
        }
        Ok(0)
    }
}

/// Passes signals on until the process has ended; its exit code.
fn attend(link: &OwnedFd, signals: &Signals) -> anyhow::Result<u8> {
    loop {
        let mut fds = [PollFd::new(link, PollFlags::IN), PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("cannot wait for the process"),
        }
        let [heard, signalled] = fds.map(|fd| !fd.revents().is_empty());
        if signalled {
            while let Some(received) = signals.take()? {
                let message = match received {
                    Received::Resized => FromStandIn::Resized,
                    Received::Forward(signal) => FromStandIn::Signal(signal),
                };
                link::send(link, &message, &[]).context("cannot pass a signal on")?;
            }
        }
        if heard {
            match link::receive(link)? {
                Some((ToStandIn::Exited(status), _)) => return Ok(u8::try_from(status).unwrap_or(u8::MAX)),
                Some(_) => {}
                None => return Ok(KILLED),
            }
        }
    }
}

/// The process as the command line describes it: from a file, or like the container's first with changes.
fn process(found: &Found, options: &Exec) -> anyhow::Result<Process> {
    if let Some(path) = &options.process {
        let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        return serde_json::from_slice(&text).with_context(|| format!("{} is no process", path.display()));
    }
    if options.command.is_empty() {
        bail!("exec needs a command, or a process by --process");
    }
    let config = found.record.bundle.join("config.json");
    let spec = Spec::load(&config).with_context(|| format!("cannot read {}", config.display()))?;
    let mut process = spec.process().clone().context("config.json has no process")?;
    process.set_args(Some(options.command.clone()));
    process.set_terminal(Some(options.tty));
    if let Some(cwd) = &options.cwd {
        process.set_cwd(cwd.clone());
    }
    let env = process.env_mut().get_or_insert_default();
    env.extend(options.env.iter().cloned());
    if let Some((uid, gid)) = options.user {
        let mut user = User::default();
        user.set_uid(uid);
        user.set_gid(gid.unwrap_or_default());
        process.set_user(user);
    }
    if !options.additional_gids.is_empty() {
        let mut user = process.user().clone();
        user.set_additional_gids(Some(options.additional_gids.clone()));
        process.set_user(user);
    }
    if options.no_new_privs {
        process.set_no_new_privileges(Some(true));
    }
    add_capabilities(&mut process, &options.cap)?;
    Ok(process)
}

fn add_capabilities(process: &mut Process, names: &[String]) -> anyhow::Result<()> {
    if names.is_empty() {
        return Ok(());
    }
    let mut capabilities = process.capabilities().clone().unwrap_or_default();
    for name in names {
        let upper = name.to_ascii_uppercase();
        let long = if upper.starts_with("CAP_") { upper } else { format!("CAP_{upper}") };
        let capability: Capability =
            serde_json::from_value(long.clone().into()).map_err(|_| anyhow::anyhow!("unknown capability {long:?}"))?;
        let with = |set: &Option<Capabilities>| {
            let mut set = set.clone().unwrap_or_default();
            set.insert(capability);
            Some(set)
        };
        let (bounding, effective) = (with(capabilities.bounding()), with(capabilities.effective()));
        let permitted = with(capabilities.permitted());
        capabilities.set_bounding(bounding).set_effective(effective).set_permitted(permitted);
    }
    process.set_capabilities(Some(capabilities));
    Ok(())
}
