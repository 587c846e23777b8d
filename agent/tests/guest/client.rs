//! The guest's side: becoming the agent, and a small client of it.

use std::ffi::CString;
use std::future::Future;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use katavm_agent::transport::UNIX_DIR;
use katavm_protocol::agent::{
    ContainerRequest, CreateContainerRequest, CreateExecRequest, Empty, Exit, ProcessRequest, Ready,
    RemoveContainerRequest, Stdio, StreamHello, StreamKind, StreamReply,
};
use katavm_protocol::agent_ttrpc::AgentClient;
use katavm_protocol::{frame, ports};
use nix::unistd::{ForkResult, execv, fork};
use serde_json::{Value, json};
use ttrpc::context::{self, Context};

use super::cases;

fn socket(port: u32) -> String {
    format!("{UNIX_DIR}/{port}.sock")
}

/// Forks the driver and becomes the agent, which is to be PID 1.
pub fn become_the_agent() -> ! {
    std::fs::create_dir_all(UNIX_DIR).expect("the directory of sockets");
    let ready = UnixListener::bind(socket(ports::READY)).expect("the ready port");
    // SAFETY: this process has one thread.
    match unsafe { fork() }.expect("fork") {
        ForkResult::Child => drive(&ready),
        ForkResult::Parent { .. } => {
            let agent = CString::new("/agent").expect("no NUL");
            let Err(error) = execv(&agent, std::slice::from_ref(&agent));
            panic!("the agent is not executed: {error}");
        }
    }
}

fn drive(ready: &UnixListener) -> ! {
    let (mut agent, _) = ready.accept().expect("the agent dials");
    let ready: Ready = frame::read(&mut agent).expect("a Ready frame");
    // The agent has mounted a root over this one.
    nix::unistd::chroot("/..").and_then(|()| nix::unistd::chdir("/")).expect("the agent's root");
    println!("# agent {} on {}: ", ready.version, ready.kernel_release);
    println!(
        "# main at {} us, ready {} us later",
        ready.agent_main_ns / 1000,
        (ready.ready_ns - ready.agent_main_ns) / 1000
    );
    let line = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let filter = line.split_whitespace().find_map(|word| word.strip_prefix("katavm.test=")).unwrap_or("").to_owned();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let client =
            ttrpc::r#async::Client::connect(&format!("unix://{}", socket(ports::RPC))).await.expect("the agent");
        let agent = Agent { client: AgentClient::new(client) };
        cases::run(&agent, &filter).await;
        println!("# destroying the sandbox");
        agent.client.destroy_sandbox(soon(), &Empty::new()).await.expect("DestroySandbox");
    });
    std::thread::sleep(Duration::from_secs(60));
    println!("FAILED end: the agent has not ended the VM");
    std::process::exit(1)
}

/// A context with a deadline, so that a hanging request fails its case.
pub fn soon() -> Context {
    context::with_timeout(60_000_000_000)
}

/// The agent's client.
pub struct Agent {
    pub client: AgentClient,
}

/// What a process has done.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    pub status: u32,
    pub stdout: String,
    pub stderr: String,
}

pub fn ids(container: &str, exec: &str) -> ProcessRequest {
    ProcessRequest { container_id: container.into(), exec_id: exec.into(), ..Default::default() }
}

pub fn removal(id: &str) -> RemoveContainerRequest {
    RemoveContainerRequest { container_id: id.into(), ..Default::default() }
}

pub fn container(id: &str) -> ContainerRequest {
    ContainerRequest { container_id: id.into(), ..Default::default() }
}

pub fn all_streams() -> Stdio {
    Stdio { stdin: true, stdout: true, stderr: true, ..Default::default() }
}

/// The `process` object: a program, as root with the capabilities that Docker gives.
pub fn process(args: &[&str]) -> Value {
    let caps =
        json!(["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_MKNOD", "CAP_SETUID", "CAP_SETGID", "CAP_KILL"]);
    json!({
        "args": args, "cwd": "/", "user": {"uid": 0, "gid": 0}, "env": ["PATH=/bin:/usr/bin", "TERM=xterm"],
        "capabilities": {"bounding": caps, "effective": caps, "permitted": caps}
    })
}

/// A specification as engines make it.
pub fn spec(args: &[&str]) -> Value {
    json!({
        "ociVersion": "1.2.0",
        "root": {"path": "/rootfs"},
        "hostname": "box",
        "process": process(args),
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]}
        ],
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "cgroup"},
                           {"type": "network"}],
            "maskedPaths": ["/proc/kcore", "/proc/keys"], "readonlyPaths": ["/proc/sys"]
        }
    })
}

impl Agent {
    pub async fn create(&self, id: &str, spec: &Value, stdio: Stdio) -> ttrpc::Result<u32> {
        let request = CreateContainerRequest {
            container_id: id.into(),
            spec: spec.to_string().into_bytes(),
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        Ok(self.client.create_container(soon(), &request).await?.pid)
    }

    pub async fn create_exec(&self, id: &str, exec: &str, process: &Value, stdio: Stdio) -> ttrpc::Result<u32> {
        let request = CreateExecRequest {
            container_id: id.into(),
            exec_id: exec.into(),
            process: process.to_string().into_bytes(),
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        Ok(self.client.create_exec(soon(), &request).await?.pid)
    }

    pub async fn start(&self, id: &str) {
        self.client.start_container(soon(), &container(id)).await.expect("StartContainer");
    }

    pub async fn remove(&self, id: &str) {
        self.client.remove_container(soon(), &removal(id)).await.expect("RemoveContainer");
    }

    pub async fn wait(&self, id: &str, exec: &str) -> Exit {
        self.client.wait(soon(), &ids(id, exec)).await.expect("Wait").exit.unwrap_or_default()
    }

    /// Runs a container from its creation to its removal, with nothing on its standard input.
    pub async fn run(&self, id: &str, spec: &Value) -> Outcome {
        self.create(id, spec, all_streams()).await.expect("CreateContainer");
        let streams = Streams::connect(id, "");
        self.start(id).await;
        let outcome = self.finish(id, "", streams).await;
        self.remove(id).await;
        outcome
    }

    /// Runs a further process of a running container.
    pub async fn exec(&self, id: &str, exec: &str, process: &Value) -> Outcome {
        self.create_exec(id, exec, process, all_streams()).await.expect("CreateExec");
        let streams = Streams::connect(id, exec);
        self.client.start_exec(soon(), &ids(id, exec)).await.expect("StartExec");
        self.finish(id, exec, streams).await
    }

    async fn finish(&self, id: &str, exec: &str, streams: Streams) -> Outcome {
        let Streams { stdin, stdout, stderr } = streams;
        stdin.shutdown(Shutdown::Write).expect("shutdown");
        let (stdout, stderr) = (read_all(stdout), read_all(stderr));
        let status = self.wait(id, exec).await.status;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Outcome { status, stdout: text(stdout.await), stderr: text(stderr.await) }
    }
}

/// The three streams of a process, connected.
pub struct Streams {
    pub stdin: UnixStream,
    pub stdout: UnixStream,
    pub stderr: UnixStream,
}

impl Streams {
    pub fn connect(id: &str, exec: &str) -> Self {
        let one = |kind| connect(id, exec, kind).expect("a stream");
        Self {
            stdin: one(StreamKind::STREAM_KIND_STDIN),
            stdout: one(StreamKind::STREAM_KIND_STDOUT),
            stderr: one(StreamKind::STREAM_KIND_STDERR),
        }
    }
}

/// Connects one stream, or says why the agent refuses.
pub fn connect(id: &str, exec: &str, kind: StreamKind) -> Result<UnixStream, String> {
    let mut stream = UnixStream::connect(socket(ports::STREAM)).expect("the stream port");
    // A stream that hangs fails its case.
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout");
    let hello = StreamHello { container_id: id.into(), exec_id: exec.into(), kind: kind.into(), ..Default::default() };
    frame::write(&mut stream, &hello).expect("a hello");
    let reply: StreamReply = frame::read(&mut stream).expect("a reply");
    if reply.error.is_empty() { Ok(stream) } else { Err(reply.error) }
}

/// Everything that a stream carries, to its end.
pub fn read_all(mut stream: UnixStream) -> impl Future<Output = Vec<u8>> {
    let read = tokio::task::spawn_blocking(move || {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).expect("a stream is read");
        bytes
    });
    async { read.await.expect("the reader") }
}

/// Writes everything and ends the stream.
pub fn write_all(mut stream: UnixStream, bytes: Vec<u8>) -> impl Future<Output = ()> {
    let write = tokio::task::spawn_blocking(move || {
        stream.write_all(&bytes).expect("a stream is written");
        stream.shutdown(Shutdown::Write).expect("shutdown");
    });
    async { write.await.expect("the writer") }
}
