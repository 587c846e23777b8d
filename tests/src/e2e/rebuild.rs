//! A guest from nothing but bytes, a memory file, and its streams: in this process, or in another one.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use katavm_devices::balloon::Balloon;
use katavm_devices::block::{Block, BlockConfig};
use katavm_devices::fs::{ExportOptions, Fs, FsShare};
use katavm_devices::mem::Mem;
use katavm_devices::net::Net;
use katavm_devices::rng::Rng;
use katavm_devices::vsock::{ConnectionId, Vsock, VsockHost};
use katavm_protocol::agent::{Empty, Exit};
use katavm_protocol::agent_ttrpc::AgentClient;
use katavm_vmm::snapshot::{DeviceState, MicrovmState};
use katavm_vmm::{Microvm, MicrovmConfig};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::{Deserialize, Serialize};
use tokio::runtime::Runtime;

use super::Context;
use super::guest::{CID, Conversation, Guest, Running, exit_of};

/// What a guest that is rebuilt can grow to, as far as a case wants it.
pub const MAX_VCPUS: u8 = 3;

/// A guest that has been taken to pieces.
pub struct Saved {
    state: Vec<u8>,
    memory: PathBuf,
    streams: Vec<(ConnectionId, OwnedFd)>,
    sockets: VsockHost,
    agent: AgentClient,
    runtime: Runtime,
}

impl Saved {
    /// Serialises a running guest and drops its machine and devices.
    ///
    /// # Errors
    /// When any part of it cannot be saved.
    pub fn take(context: &Context, guest: Guest) -> Result<Self> {
        guest.vm.pause()?;
        let state = postcard::to_stdvec(&guest.vm.save()?)?;
        let memory = context.scratch().join("memory");
        guest.vm.save_memory(&mut File::create(&memory)?)?;
        let streams = guest.vm.detach_streams()?;
        let Guest { sockets, agent, runtime, .. } = guest;
        Ok(Self { state, memory, streams, sockets, agent, runtime })
    }
}

/// Takes a guest to pieces and puts it together again, on the disks that `disks` opens in between.
///
/// # Errors
/// When it cannot be saved or built.
pub fn here(
    context: &Context,
    guest: Guest,
    exports: &[(&str, &Path)],
    disks: impl FnOnce() -> Result<Vec<BlockConfig>>,
) -> Result<Guest> {
    let ready = guest.ready.clone();
    let Saved { state, memory, streams, sockets, agent, runtime } = Saved::take(context, guest)?;
    let (vm, share) = build(&state, &memory, streams, &sockets, exports, disks()?)?;
    vm.resume()?;
    Ok(Guest { vm, sockets, share, ready, agent, runtime, rebuilt: true })
}

/// The machine as it was, paused. The memory file is only needed until it is mapped.
fn build<P: AsRef<Path>, N: AsRef<str>>(
    state: &[u8],
    memory: &Path,
    streams: Vec<(ConnectionId, OwnedFd)>,
    sockets: &VsockHost,
    exports: &[(N, P)],
    disks: Vec<BlockConfig>,
) -> Result<(Microvm, FsShare)> {
    let state: MicrovmState = postcard::from_bytes(state)?;
    let share = FsShare::new();
    for (name, root) in exports {
        share.add_export(name.as_ref(), File::open(root)?.into(), ExportOptions::default())?;
    }
    let memory_mib = MicrovmConfig::default().memory_mib;
    let vcpus = u8::try_from(state.vcpus.len())?;
    let config = MicrovmConfig { memory_mib, vcpus, max_vcpus: MAX_VCPUS, ..Default::default() };
    let mut builder = Microvm::builder(config);
    let (mut streams, mut disks) = (Some(streams), disks.into_iter());
    for device in &state.devices {
        builder = match device {
            DeviceState::Vsock(saved) => {
                builder.vsock(Vsock::restore(sockets, CID, saved, streams.take().unwrap_or_default())?)
            }
            DeviceState::Fs(saved) => {
                let fs = Fs::new("katavm", share.clone())?;
                let report = share.restore(saved);
                ensure!(report.stale_nodes == 0 && report.stale_handles == 0, "files were lost: {report:?}");
                builder.fs(fs)
            }
            DeviceState::Rng(saved) => builder.rng(Rng::restore(saved)?),
            DeviceState::Balloon(saved) => builder.balloon(Balloon::restore(saved)?),
            DeviceState::Net(saved) => builder.net(Net::restore(saved)?),
            DeviceState::Mem(saved) => builder.mem(Mem::restore(saved)?),
            DeviceState::Block(saved) => {
                let disk = if saved.attached { Some(disks.next().context("a disk is missing")?) } else { None };
                builder.block(Block::restore(saved, disk)?)
            }
        };
    }
    let vm = builder.build_from(&state, &File::open(memory)?)?;
    fs::remove_file(memory)?;
    Ok((vm, share))
}

/// The argument by which this program is told to go on with a guest of another process.
const ARGUMENT: &str = "--rebuild-guest";

/// What the other process is told, beside the descriptors of the streams.
#[derive(Serialize, Deserialize)]
struct Move {
    state: PathBuf,
    memory: PathBuf,
    exports: Vec<(String, PathBuf)>,
    /// In the order of the descriptors.
    streams: Vec<ConnectionId>,
}

/// A guest that goes on in another process; the conversation with its agent stays here.
pub struct Elsewhere {
    child: Child,
    report: BufReader<UnixStream>,
    agent: AgentClient,
    runtime: Runtime,
}

impl Elsewhere {
    /// Starts a process of this program and hands the guest over: state and memory as files, the streams' descriptors
    /// by SCM_RIGHTS (unix(7)).
    ///
    /// # Errors
    /// When the other process does not get the guest running.
    pub fn start(saved: Saved, exports: &[(&str, &Path)]) -> Result<Self> {
        let Saved { state, memory, streams, agent, runtime, .. } = saved;
        let state_path = memory.with_extension("state");
        fs::write(&state_path, state)?;
        let (ours, theirs) = UnixStream::pair()?;
        let child = Command::new(std::env::current_exe()?)
            .arg(ARGUMENT)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .spawn()?;
        let mut this = Self { child, report: BufReader::new(ours), agent, runtime };
        let exports = exports.iter().map(|(name, path)| ((*name).to_string(), path.to_path_buf())).collect();
        let (ids, descriptors): (Vec<_>, Vec<_>) = streams.into_iter().unzip();
        let message = postcard::to_stdvec(&Move { state: state_path, memory, exports, streams: ids })?;
        send(this.report.get_ref(), &message, &descriptors)?;
        // The other process has them: an end of a stream must be heard there alone.
        drop(descriptors);
        ensure!(this.line()? == "resumed", "the other process did not resume the guest");
        Ok(this)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.report.read_line(&mut line).context("the other process says nothing")?;
        ensure!(!line.is_empty(), "the other process has ended: {:?}", self.child.wait()?);
        Ok(line.trim().to_string())
    }

    /// Ends the guest in order; why the machine ended over there, and how often KVM left it.
    ///
    /// # Errors
    /// When it does not end.
    pub fn end(mut self) -> Result<(String, u64)> {
        // The reply may not arrive: the machine is gone by then.
        let _ = self.runtime.block_on(self.agent.destroy_sandbox(Guest::soon(), &Empty::default()));
        let line = self.line()?;
        let (exits, reason) = line.split_once(' ').context("no reason")?;
        ensure!(self.child.wait()?.success(), "the other process failed");
        Ok((reason.to_string(), exits.parse()?))
    }
}

impl Conversation for Elsewhere {
    fn exit(&self, running: &Running) -> Result<Exit> {
        exit_of(running, &self.agent, &self.runtime)
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        // One that was waited for is left alone by both.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Takes over where this process was started to go on with a guest of another one.
#[must_use]
pub fn enter() -> Option<ExitCode> {
    if std::env::args().nth(1).as_deref() != Some(ARGUMENT) {
        return None;
    }
    let code = match go_on() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("rebuilding a guest: {error:#}");
            ExitCode::FAILURE
        }
    };
    Some(code)
}

fn go_on() -> Result<()> {
    let mut report = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let (message, descriptors) = receive(&mut report)?;
    let Move { state, memory, exports, streams } = postcard::from_bytes(&message)?;
    ensure!(streams.len() == descriptors.len(), "{} descriptors for {} streams", descriptors.len(), streams.len());
    let streams = streams.into_iter().zip(descriptors).collect();
    // This process has no part in the guest's earlier life.
    let sockets = VsockHost::new()?;
    let (vm, _share) = build(&fs::read(state)?, &memory, streams, &sockets, &exports, Vec::new())?;
    vm.resume()?;
    writeln!(report, "resumed")?;
    let reason = vm.wait();
    writeln!(report, "{} {reason:?}", vm.exits())?;
    Ok(())
}

/// The message in a frame of its length, the descriptors with its first byte.
fn send(socket: &UnixStream, message: &[u8], descriptors: &[OwnedFd]) -> Result<()> {
    let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let length = u32::try_from(message.len())?.to_le_bytes();
    let rights = [ControlMessage::ScmRights(&raw)];
    let sent = sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&length)], &rights, MsgFlags::empty(), None)?;
    ensure!(sent == length.len(), "half a length was sent");
    Ok((&*socket).write_all(message)?)
}

fn receive(socket: &mut UnixStream) -> Result<(Vec<u8>, Vec<OwnedFd>)> {
    socket.set_read_timeout(Some(Duration::from_secs(60)))?;
    let mut length = [0; 4];
    // SCM_MAX_FD of unix(7).
    let mut space = nix::cmsg_space!([RawFd; 253]);
    let mut descriptors = Vec::new();
    {
        let mut parts = [IoSliceMut::new(&mut length)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_WAITALL;
        let received = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
        for control in received.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = control {
                // SAFETY: the kernel has just made these descriptors for this process, and nothing else owns them.
                descriptors.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
    }
    let mut message = vec![0; u32::from_le_bytes(length) as usize];
    socket.read_exact(&mut message)?;
    Ok((message, descriptors))
}
