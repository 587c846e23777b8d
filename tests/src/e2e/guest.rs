//! A guest with the real agent, driven without the runtime.

use std::fs::File;
use std::io::Read;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use katavm_devices::balloon::Balloon;
use katavm_devices::fs::{ExportOptions, Fs, FsShare};
use katavm_devices::net::Net;
use katavm_devices::rng::Rng;
use katavm_devices::vsock::{Vsock, VsockHost};
use katavm_protocol::agent::{
    ContainerRequest, CreateContainerRequest, CreateSandboxRequest, Empty, Exit, ProcessRequest, Ready,
    RemoveContainerRequest, Stdio, StreamHello, StreamKind, StreamReply,
};
use katavm_protocol::agent_ttrpc::AgentClient;
use katavm_protocol::{frame, ports};
use katavm_vmm::{ExitReason, Microvm, MicrovmBuilder, MicrovmConfig};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use super::Context;

/// How long the agent may take to be ready, emulated and on a busy machine.
const LIMIT: Duration = Duration::from_secs(120);
/// The guest's context identifier.
pub(super) const CID: u64 = 3;

/// A running guest with its agent.
pub struct Guest {
    /// The machine.
    pub vm: Microvm,
    /// The host's side of its sockets.
    pub sockets: VsockHost,
    /// Its shared folders.
    pub share: FsShare,
    /// What the agent said when it was ready.
    pub ready: Ready,
    /// The agent.
    pub agent: AgentClient,
    pub(super) runtime: Runtime,
    /// It goes on from a snapshot.
    pub(super) rebuilt: bool,
}

/// What a container process did.
pub struct Output {
    /// All of its standard output.
    pub stdout: Vec<u8>,
    /// How it ended.
    pub exit: Exit,
}

impl Guest {
    /// Boots the guest image and waits for its agent.
    ///
    /// # Errors
    /// When the guest does not come up; the console is noted.
    pub fn boot(context: &Context, change: impl FnOnce(&mut MicrovmConfig)) -> Result<Self> {
        Self::boot_with(context, Vec::new(), change)
    }

    /// Boots the guest image with these network interfaces and waits for its agent.
    ///
    /// # Errors
    /// As [`boot`](Self::boot).
    pub fn boot_with(context: &Context, nets: Vec<Net>, change: impl FnOnce(&mut MicrovmConfig)) -> Result<Self> {
        Self::boot_on(context, |builder| Ok(nets.into_iter().fold(builder, MicrovmBuilder::net)), change)
    }

    /// Boots the guest image with what `devices` adds and waits for its agent.
    ///
    /// # Errors
    /// As [`boot`](Self::boot).
    pub fn boot_on(
        context: &Context,
        devices: impl FnOnce(MicrovmBuilder) -> Result<MicrovmBuilder>,
        change: impl FnOnce(&mut MicrovmConfig),
    ) -> Result<Self> {
        let mut config = MicrovmConfig {
            kernel: context.image("vmlinux")?,
            initramfs: Some(context.image("initramfs")?),
            ..Default::default()
        };
        change(&mut config);
        let (vsock, sockets) = Vsock::new(CID)?;
        let share = FsShare::new();
        let fs = Fs::new("katavm", share.clone())?;
        let builder = Microvm::builder(config).vsock(vsock).fs(fs).rng(Rng::new()?).balloon(Balloon::new()?);
        let vm = devices(builder)?.build()?;
        let listener = sockets.listen(ports::READY)?;
        vm.start()?;
        let ready = listener.accept(Some(LIMIT)).and_then(|mut stream| frame::read::<Ready>(&mut stream));
        let ready = ready.with_context(|| {
            context.note("console", vm.console().tail());
            format!("the agent is not ready ({:?}); console:\n{}", vm.exit_reason(), vm.console().tail())
        })?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let stream = sockets.connect(ports::RPC, LIMIT)?;
        let agent = runtime.block_on(async {
            stream.set_nonblocking(true)?;
            let stream = tokio::net::UnixStream::from_std(stream)?;
            anyhow::Ok(AgentClient::new(ttrpc::r#async::Client::new(ttrpc::r#async::transport::Socket::new(stream))))
        })?;
        Ok(Self { vm, sockets, share, ready, agent, runtime, rebuilt: false })
    }

    /// Waits for an answer of the agent.
    ///
    /// # Errors
    /// What the agent answered.
    pub fn ask<T>(&self, request: impl Future<Output = ttrpc::Result<T>>) -> Result<T> {
        self.runtime.block_on(request).with_context(|| format!("console:\n{}", self.vm.console().tail()))
    }

    /// A deadline for one request.
    #[must_use]
    pub fn soon() -> ttrpc::context::Context {
        ttrpc::context::with_timeout(LIMIT.as_nanos() as i64)
    }

    /// Prepares the sandbox.
    ///
    /// # Errors
    /// What the agent answered.
    pub fn sandbox(&self) -> Result<()> {
        let request = CreateSandboxRequest { shared_tag: "katavm".into(), ..Default::default() };
        self.ask(self.agent.create_sandbox(Self::soon(), &request)).map(drop)
    }

    /// Runs `args` in a new container `id` on the root file system at `rootfs`, to its end.
    ///
    /// # Errors
    /// When any step fails.
    pub fn run(&self, id: &str, rootfs: &Path, args: &[&str]) -> Result<Output> {
        let (stdout, exit) = self.start(id, rootfs, args)?.wait(self)?;
        let request = RemoveContainerRequest { container_id: id.into(), ..Default::default() };
        self.ask(self.agent.remove_container(Self::soon(), &request))?;
        Ok(Output { stdout, exit })
    }

    /// Starts `args` in a new container `id` on the root file system at `rootfs`.
    ///
    /// # Errors
    /// When any step fails.
    pub fn start(&self, id: &str, rootfs: &Path, args: &[&str]) -> Result<Running> {
        let stdio = Stdio { stdout: true, ..Default::default() };
        self.create(id, rootfs, args, stdio, |_| ())?;
        self.go(id)
    }

    /// Starts `args` in a new container `id`, with a stream to its standard input as well.
    ///
    /// # Errors
    /// When any step fails.
    pub fn start_with_input(&self, id: &str, rootfs: &Path, args: &[&str]) -> Result<(Running, UnixStream)> {
        self.start_piped(id, rootfs, args, |_| ())
    }

    /// The same with every capability.
    ///
    /// # Errors
    /// When any step fails.
    pub fn start_privileged_with_input(&self, id: &str, rootfs: &Path, args: &[&str]) -> Result<(Running, UnixStream)> {
        self.start_piped(id, rootfs, args, privilege)
    }

    fn start_piped(
        &self,
        id: &str,
        rootfs: &Path,
        args: &[&str],
        change: impl FnOnce(&mut Value),
    ) -> Result<(Running, UnixStream)> {
        self.create(id, rootfs, args, Stdio { stdin: true, stdout: true, ..Default::default() }, change)?;
        let stdin = self.stream(id, StreamKind::STREAM_KIND_STDIN)?;
        Ok((self.go(id)?, stdin))
    }

    /// Starts `args` in a new container `id` with every capability.
    ///
    /// # Errors
    /// When any step fails.
    pub fn start_privileged(&self, id: &str, rootfs: &Path, args: &[&str]) -> Result<Running> {
        self.create(id, rootfs, args, Stdio { stdout: true, ..Default::default() }, privilege)?;
        self.go(id)
    }

    fn create(
        &self,
        id: &str,
        rootfs: &Path,
        args: &[&str],
        stdio: Stdio,
        change: impl FnOnce(&mut Value),
    ) -> Result<()> {
        self.share.add_export(id, File::open(rootfs)?.into(), ExportOptions::default())?;
        let mut create = CreateContainerRequest { container_id: id.into(), ..Default::default() };
        let mut spec = spec(id, args);
        change(&mut spec);
        create.spec = serde_json::to_vec(&spec)?;
        create.stdio = Some(stdio).into();
        self.ask(self.agent.create_container(Self::soon(), &create)).map(drop)
    }

    fn go(&self, id: &str) -> Result<Running> {
        let stdout = self.stream(id, StreamKind::STREAM_KIND_STDOUT)?;
        let request = ContainerRequest { container_id: id.into(), ..Default::default() };
        self.ask(self.agent.start_container(Self::soon(), &request))?;
        Ok(Running { id: id.into(), stdout, read: Vec::new() })
    }

    fn stream(&self, id: &str, kind: StreamKind) -> Result<UnixStream> {
        let mut stream = self.sockets.connect(ports::STREAM, LIMIT)?;
        frame::write(&mut stream, &StreamHello { container_id: id.into(), kind: kind.into(), ..Default::default() })?;
        let reply: StreamReply = frame::read(&mut stream)?;
        ensure!(reply.error.is_empty(), "no stream: {}", reply.error);
        Ok(stream)
    }

    /// Ends the guest in order.
    ///
    /// # Errors
    /// When it ends otherwise.
    pub fn end(self) -> Result<()> {
        // The reply may not arrive: the machine is gone by then.
        let soon = ttrpc::context::with_timeout(Duration::from_secs(5).as_nanos() as i64);
        let _ = self.runtime.block_on(self.agent.destroy_sandbox(soon, &Empty::default()));
        let reason = self.vm.wait();
        // The emulated SVM of the lab refuses the agent's I/O port after a restore (agent/src/end.rs): it then reboots.
        let expected = reason == ExitReason::Orderly || self.rebuilt && reason == ExitReason::Reset;
        ensure!(expected, "ended because {reason:?}; console:\n{}", self.vm.console().tail());
        Ok(())
    }
}

/// A container process that runs.
pub struct Running {
    id: String,
    stdout: UnixStream,
    read: Vec<u8>,
}

impl Running {
    /// Reads output until it has `words`.
    ///
    /// # Errors
    /// When it ends before.
    pub fn read_until(&mut self, words: &[u8]) -> Result<()> {
        while !self.read.windows(words.len()).any(|part| part == words) {
            self.read_more()?;
        }
        Ok(())
    }

    /// Waits for some more output.
    ///
    /// # Errors
    /// When it ends before.
    pub fn read_more(&mut self) -> Result<()> {
        let mut bytes = [0; 4096];
        let len = self.stdout.read(&mut bytes)?;
        ensure!(len > 0, "the output ended: {}", String::from_utf8_lossy(&self.read));
        self.read.extend_from_slice(&bytes[..len]);
        Ok(())
    }

    /// A duplicate of its output stream, to read elsewhere.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn output(&self) -> Result<UnixStream> {
        Ok(self.stdout.try_clone()?)
    }

    /// Reads its output to the end: all of it, what was read before as well.
    ///
    /// # Errors
    /// When the connection breaks.
    pub fn rest(&mut self) -> Result<Vec<u8>> {
        let mut stdout = std::mem::take(&mut self.read);
        self.stdout.read_to_end(&mut stdout)?;
        self.stdout.shutdown(Shutdown::Both).ok();
        Ok(stdout)
    }

    /// Reads its output to the end and waits for its exit.
    ///
    /// # Errors
    /// When the connection breaks.
    pub fn wait(mut self, guest: &Guest) -> Result<(Vec<u8>, Exit)> {
        Ok((self.rest()?, guest.exit(&self)?))
    }
}

/// Whoever has the conversation with a guest's agent.
pub trait Conversation {
    /// Waits for the end of a container process.
    ///
    /// # Errors
    /// What the agent answered.
    fn exit(&self, running: &Running) -> Result<Exit>;
}

impl Conversation for Guest {
    fn exit(&self, running: &Running) -> Result<Exit> {
        let exit = exit_of(running, &self.agent, &self.runtime);
        exit.with_context(|| format!("console:\n{}", self.vm.console().tail()))
    }
}

/// Asks an agent for the end of a container process, and waits for it.
pub(super) fn exit_of(running: &Running, agent: &AgentClient, runtime: &Runtime) -> Result<Exit> {
    let request = ProcessRequest { container_id: running.id.clone(), ..Default::default() };
    let exit = runtime.block_on(agent.wait(Guest::soon(), &request))?.exit;
    exit.into_option().context("no exit")
}

/// Docker's default set, shortened to what the cases need.
const CAPABILITIES: [&str; 6] =
    ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_NET_RAW"];

/// Makes the container root with everything that the guest's kernel has to give.
pub(super) fn privilege(spec: &mut Value) {
    spec["process"]["capabilities"] = json!({"bounding": EVERYTHING, "effective": EVERYTHING, "permitted": EVERYTHING});
    spec["linux"]["resources"] = json!({"devices": [{"allow": true, "access": "rwm"}]});
}

/// All capabilities of Linux 6.12 (capabilities(7)).
const EVERYTHING: &[&str] = &[
    "CAP_AUDIT_CONTROL",
    "CAP_AUDIT_READ",
    "CAP_AUDIT_WRITE",
    "CAP_BLOCK_SUSPEND",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_KILL",
    "CAP_LEASE",
    "CAP_LINUX_IMMUTABLE",
    "CAP_MAC_ADMIN",
    "CAP_MAC_OVERRIDE",
    "CAP_MKNOD",
    "CAP_NET_ADMIN",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_RAW",
    "CAP_PERFMON",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYSLOG",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_CHROOT",
    "CAP_SYS_MODULE",
    "CAP_SYS_NICE",
    "CAP_SYS_PACCT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_WAKE_ALARM",
];

fn spec(id: &str, args: &[&str]) -> Value {
    json!({
        "ociVersion": "1.2.0",
        "process": {
            "args": args, "cwd": "/", "user": {"uid": 0, "gid": 0},
            "capabilities": {"bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES},
            "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
        },
        "root": {"path": format!("/run/katavm/shared/{id}")},
        "hostname": id,
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"},
        ],
        "linux": {"namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "cgroup"}]},
    })
}
