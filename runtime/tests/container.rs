//! A whole container run against an agent that is a script: no virtual machine, real streams, real ttrpc.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use katavm_devices::fs::FsShare;
use katavm_protocol::agent::{
    CheckRequest, CheckResponse, ConfigureNetworkRequest, ContainerRequest, CreateContainerRequest, CreateExecRequest,
    CreateSandboxRequest, Empty, Event, Exit, ListProcessesResponse, ProcessRequest, ProcessResponse, Ready,
    RemoveContainerRequest, ResizeTerminalRequest, SetVolumeRequest, SignalRequest, StatsResponse, Stdio, StreamHello,
    StreamKind, StreamReply, UpdateContainerRequest, WaitResponse,
};
use katavm_protocol::agent_ttrpc::{Agent, create_agent};
use katavm_protocol::{frame, ports};
use katavm_runtime::cpuset::Cpuset;
use katavm_runtime::pod::{Io, NewContainer, Phase, Pod, PodError};
use katavm_runtime::process::stdio::Inherited;
use katavm_runtime::sandbox::heartbeat::Beat;
use katavm_runtime::sandbox::size::{Limits, Size};
use katavm_runtime::sandbox::vm::{Dial, Machine};
use katavm_runtime::sandbox::{Sandbox, SandboxError};
use katavm_runtime::state::{Journal, Record, StateRoot, Status};
use katavm_vmm::ExitReason;
use rustix::event::{EventfdFlags, eventfd};
use tokio::sync::{mpsc, watch};
use ttrpc::r#async::{ServerStreamSender, TtrpcContext};

/// What the container does once it runs: it gets its streams, and gives its exit status.
type Program = Box<dyn FnOnce(HashMap<i32, UnixStream>, &Guest) -> u32 + Send>;

/// The machine and the agent in one.
struct Guest {
    end: OwnedFd,
    reason: Mutex<Option<ExitReason>>,
    streams: Mutex<HashMap<i32, UnixStream>>,
    program: Mutex<Option<Program>>,
    refuse: Option<&'static str>,
    /// How long the agent takes to answer a heartbeat.
    slowness: Duration,
    beats: AtomicU32,
    exit: watch::Sender<Option<u32>>,
    signals: Mutex<Vec<u32>>,
    wanted: Mutex<Stdio>,
    rpc: mpsc::UnboundedSender<UnixStream>,
}

impl Guest {
    fn end_for(&self, reason: ExitReason) {
        self.reason.lock().unwrap().get_or_insert(reason);
        self.streams.lock().unwrap().clear();
        rustix::io::write(&self.end, &1_u64.to_ne_bytes()).unwrap();
    }
}

struct Handle(Arc<Guest>);

impl Machine for Handle {
    fn end_event(&self) -> BorrowedFd<'_> {
        self.0.end.as_fd()
    }

    fn end(&self) -> Option<ExitReason> {
        self.0.reason.lock().unwrap().clone()
    }

    fn stop(&self) {
        self.0.end_for(ExitReason::Stopped);
    }

    fn console_tail(&self) -> String {
        "last words\n".into()
    }

    fn least(&self) -> Size {
        Size { memory_mib: 256, vcpus: 1 }
    }
}

impl Dial for Handle {
    fn dial(&self, port: u32, _timeout: Duration) -> io::Result<UnixStream> {
        let (ours, mut theirs) = UnixStream::pair()?;
        match port {
            ports::RPC => self.0.rpc.send(theirs).map_err(io::Error::other)?,
            ports::STREAM => {
                let guest = Arc::clone(&self.0);
                std::thread::spawn(move || {
                    let hello: StreamHello = frame::read(&mut theirs).unwrap();
                    assert_eq!(hello.container_id, "c1");
                    // The container may be started as soon as the answer is out.
                    let mut streams = guest.streams.lock().unwrap();
                    frame::write(&mut theirs, &StreamReply::new()).unwrap();
                    streams.insert(hello.kind.value(), theirs);
                });
            }
            other => panic!("port {other}"),
        }
        Ok(ours)
    }
}

struct Service(Arc<Guest>);

#[async_trait]
impl Agent for Service {
    async fn check(&self, _: &TtrpcContext, _: CheckRequest) -> ttrpc::Result<CheckResponse> {
        self.0.beats.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(self.0.slowness).await;
        Ok(CheckResponse::new())
    }

    async fn create_sandbox(&self, _: &TtrpcContext, request: CreateSandboxRequest) -> ttrpc::Result<Empty> {
        assert_eq!(request.shared_tag, "katavm");
        assert_eq!(request.entropy.len(), 32);
        Ok(Empty::new())
    }

    async fn create_container(&self, _: &TtrpcContext, r: CreateContainerRequest) -> ttrpc::Result<ProcessResponse> {
        if let Some(reason) = self.0.refuse {
            return Err(ttrpc::Error::RpcStatus(ttrpc::get_status(ttrpc::Code::NOT_FOUND, reason)));
        }
        *self.0.wanted.lock().unwrap() = r.stdio.unwrap_or_default();
        Ok(ProcessResponse { pid: 100, ..Default::default() })
    }

    async fn start_container(&self, _: &TtrpcContext, _: ContainerRequest) -> ttrpc::Result<Empty> {
        let guest = Arc::clone(&self.0);
        std::thread::spawn(move || {
            let streams = std::mem::take(&mut *guest.streams.lock().unwrap());
            let program = guest.program.lock().unwrap().take().unwrap();
            let status = program(streams, &guest);
            guest.exit.send_replace(Some(status));
        });
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, _: ProcessRequest) -> ttrpc::Result<WaitResponse> {
        let mut exit = self.0.exit.subscribe();
        let status = exit.wait_for(Option::is_some).await.unwrap().unwrap();
        let exit = Exit { status, ..Default::default() };
        Ok(WaitResponse { exit: Some(exit).into(), ..Default::default() })
    }

    async fn signal(&self, _: &TtrpcContext, request: SignalRequest) -> ttrpc::Result<Empty> {
        self.0.signals.lock().unwrap().push(request.signal);
        Ok(Empty::new())
    }

    async fn destroy_sandbox(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        self.0.end_for(ExitReason::Orderly);
        Ok(Empty::new())
    }

    async fn set_volume(&self, _: &TtrpcContext, _: SetVolumeRequest) -> ttrpc::Result<Empty> {
        unimplemented!()
    }
    async fn remove_container(&self, _: &TtrpcContext, _: RemoveContainerRequest) -> ttrpc::Result<Empty> {
        Ok(Empty::new())
    }
    async fn create_exec(&self, _: &TtrpcContext, _: CreateExecRequest) -> ttrpc::Result<ProcessResponse> {
        unimplemented!()
    }
    async fn start_exec(&self, _: &TtrpcContext, _: ProcessRequest) -> ttrpc::Result<Empty> {
        unimplemented!()
    }
    async fn resize_terminal(&self, _: &TtrpcContext, _: ResizeTerminalRequest) -> ttrpc::Result<Empty> {
        unimplemented!()
    }
    async fn close_stdin(&self, _: &TtrpcContext, _: ProcessRequest) -> ttrpc::Result<Empty> {
        unimplemented!()
    }
    async fn list_processes(&self, _: &TtrpcContext, _: ContainerRequest) -> ttrpc::Result<ListProcessesResponse> {
        unimplemented!()
    }
    async fn stats(&self, _: &TtrpcContext, _: ContainerRequest) -> ttrpc::Result<StatsResponse> {
        unimplemented!()
    }
    async fn configure_network(&self, _: &TtrpcContext, _: ConfigureNetworkRequest) -> ttrpc::Result<Empty> {
        unimplemented!()
    }
    async fn update_container(&self, _: &TtrpcContext, _: UpdateContainerRequest) -> ttrpc::Result<Empty> {
        unimplemented!()
    }
    async fn pause(&self, _: &TtrpcContext, _: ContainerRequest) -> ttrpc::Result<Empty> {
        unimplemented!()
    }
    async fn resume(&self, _: &TtrpcContext, _: ContainerRequest) -> ttrpc::Result<Empty> {
        unimplemented!()
    }
    async fn events(&self, _: &TtrpcContext, _: Empty, _: ServerStreamSender<Event>) -> ttrpc::Result<()> {
        unimplemented!()
    }
}

struct Outcome {
    result: Result<u32, PodError>,
    /// What was written down when the container had been made, and at its end.
    written: Vec<Status>,
    end: Option<ExitReason>,
    signals: Vec<u32>,
    wanted: Stdio,
}

#[derive(Default)]
struct Setup {
    refuse: Option<&'static str>,
    slowness: Duration,
    beat: Beat,
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    /// Sent one after the other while the container runs.
    signals: Vec<i32>,
}

/// Runs `program` as a container, as a sandbox process does it.
fn run(setup: Setup, program: impl FnOnce(HashMap<i32, UnixStream>, &Guest) -> u32 + Send + 'static) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (rpc, mut connections) = mpsc::unbounded_channel::<UnixStream>();
    let guest = Arc::new(Guest {
        end: eventfd(0, EventfdFlags::CLOEXEC).unwrap(),
        reason: Mutex::default(),
        streams: Mutex::default(),
        program: Mutex::new(Some(Box::new(program))),
        refuse: setup.refuse,
        slowness: setup.slowness,
        beats: AtomicU32::new(0),
        exit: watch::Sender::new(None),
        signals: Mutex::default(),
        wanted: Mutex::default(),
        rpc,
    });
    let dir = tempfile::tempdir().unwrap();
    let id = "c1".parse().unwrap();
    let root = StateRoot::open(dir.path().join("state")).unwrap();
    let record = Record::new(&id, dir.path(), dir.path());
    let journal = Journal::new(root.claim(&id).unwrap(), record);
    let io = Io::plain(Inherited { stdin: setup.stdin, stdout: setup.stdout, stderr: None });
    let mut written = Vec::new();
    let result = runtime.block_on(async {
        let service = create_agent(Arc::new(Service(Arc::clone(&guest))));
        let accepted = futures_stream(&mut connections).await;
        let mut server = ttrpc::r#async::Server::new().add_listener(accepted).register_service(service);
        server.start().await.unwrap();
        let handle = || Arc::new(Handle(Arc::clone(&guest)));
        let sandbox = Arc::new(Sandbox::new(handle(), handle()).unwrap().with_beat(setup.beat));
        let ready = |_| Ok(Ready { kernel_release: "6.12".into(), ..Default::default() });
        let (pod, ready) = Pod::prepare(&sandbox, None, FsShare::new(), None, false, ready, "").await.unwrap();
        assert_eq!(ready.kernel_release, "6.12");
        let new = NewContainer {
            id: "c1".into(),
            spec: b"{}".to_vec(),
            exports: Vec::new(),
            tmpfs: Vec::new(),
            replaced: Vec::new(),
            disks: Vec::new(),
            overlay: None,
            io,
            link: None,
            journal,
            cgroup: None,
            limits: Some(Limits::default()),
            cpuset: Cpuset::default(),
            is_first: true,
        };
        let lives = async {
            let process = pod.create(new).await?;
            let container = pod.container("c1").unwrap();
            written.push(container.status());
            process.start().await?;
            for signal in &setup.signals {
                process.signal(*signal).await?;
            }
            pod.deserted().await;
            written.push(container.status());
            match process.phase() {
                Phase::Stopped(exit) => Ok(exit.status),
                phase => panic!("{phase:?}"),
            }
        };
        let result = tokio::select! {
            ended = sandbox.ended() => Err(ended.into()),
            lost = sandbox.heartbeat_lost(pod.agent()) => Err(lost.into()),
            result = lives => result,
        };
        let hangs = matches!(result, Err(PodError::Sandbox(SandboxError::Hangs { .. })));
        sandbox.shut_down((!hangs).then_some(pod.agent())).await;
        pod.drained().await;
        result
    });
    let (end, signals) = (guest.reason.lock().unwrap().clone(), guest.signals.lock().unwrap().clone());
    let wanted = guest.wanted.lock().unwrap().clone();
    Outcome { result, written, end, signals, wanted }
}

/// The connections that the dialler makes, as a listener.
async fn futures_stream(connections: &mut mpsc::UnboundedReceiver<UnixStream>) -> ttrpc::r#async::transport::Listener {
    let connections = std::mem::replace(connections, mpsc::unbounded_channel().1);
    ttrpc::r#async::transport::Listener::new(futures::stream::unfold(connections, |mut connections| async {
        let stream = connections.recv().await?;
        stream.set_nonblocking(true).unwrap();
        Some((tokio::net::UnixStream::from_std(stream), connections))
    }))
}

fn take(streams: &mut HashMap<i32, UnixStream>, kind: StreamKind) -> UnixStream {
    streams.remove(&(kind as i32)).unwrap()
}

#[test]
fn a_container_runs_and_its_output_is_whole() {
    let (stdin, mut writer) = io::pipe().unwrap();
    let (mut reader, stdout) = io::pipe().unwrap();
    let data: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 253) as u8).collect();
    let sent = data.clone();
    let feeder = std::thread::spawn(move || writer.write_all(&sent).unwrap());
    let collector = std::thread::spawn(move || {
        let mut all = Vec::new();
        reader.read_to_end(&mut all).unwrap();
        all
    });
    let setup = Setup { stdin: Some(stdin.into()), stdout: Some(stdout.into()), ..Default::default() };
    let outcome = run(setup, |mut streams, _| {
        let mut stdin = take(&mut streams, StreamKind::STREAM_KIND_STDIN);
        let mut stdout = take(&mut streams, StreamKind::STREAM_KIND_STDOUT);
        io::copy(&mut stdin, &mut stdout).unwrap();
        // What is written last of all arrives after the exit status.
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            stdout.write_all(b"late").unwrap();
        });
        7
    });
    assert_eq!(outcome.result.unwrap(), 7);
    assert_eq!(outcome.written, [Status::Created, Status::Stopped]);
    assert_eq!(outcome.end, Some(ExitReason::Orderly));
    assert!(outcome.wanted.stdin && outcome.wanted.stdout && !outcome.wanted.stderr);
    feeder.join().unwrap();
    let received = collector.join().unwrap();
    assert!(received[..data.len()] == data && &received[data.len()..] == b"late", "{}", received.len());
}

#[test]
fn a_refusal_is_told_and_the_guest_ended() {
    let refusal = "exec: \"foo\": executable file not found in $PATH";
    let outcome = run(Setup { refuse: Some(refusal), ..Default::default() }, |_, _| 0);
    assert_eq!(outcome.result.unwrap_err().to_string(), refusal);
    assert_eq!(outcome.written, []);
    assert_eq!(outcome.end, Some(ExitReason::Orderly));
}

#[test]
fn a_guest_that_fails_is_told_with_its_reason_and_its_output_so_far() {
    let (mut reader, stdout) = io::pipe().unwrap();
    let outcome = run(Setup { stdout: Some(stdout.into()), ..Default::default() }, |mut streams, guest| {
        take(&mut streams, StreamKind::STREAM_KIND_STDOUT).write_all(b"before").unwrap();
        guest.end_for(ExitReason::Panic);
        std::thread::sleep(Duration::from_secs(3600));
        0
    });
    let error = outcome.result.unwrap_err();
    assert!(matches!(error, PodError::Sandbox(SandboxError::Ended { reason: ExitReason::Panic, .. })));
    assert!(error.to_string().ends_with("\n  | last words"), "{error}");
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(text, "before");
}

#[test]
fn an_agent_that_stops_answering_is_told_with_the_consoles_last_lines() {
    let beat = Beat { every: Duration::from_millis(10), patience: Duration::from_millis(50) };
    let slowness = Duration::from_secs(3600);
    let outcome = run(Setup { beat, slowness, ..Default::default() }, |_, _| {
        std::thread::sleep(Duration::from_secs(3600));
        0
    });
    let error = outcome.result.unwrap_err();
    assert!(matches!(error, PodError::Sandbox(SandboxError::Hangs { .. })), "{error}");
    assert_eq!(error.to_string(), "the guest stopped answering; the last lines of its console:\n  | last words");
    // Not asked to end itself: it would not hear that either.
    assert_eq!(outcome.end, Some(ExitReason::Stopped));
}

#[test]
fn an_agent_that_is_slow_is_left_alone() {
    let beat = Beat { every: Duration::from_millis(1), patience: Duration::from_secs(60) };
    let slowness = Duration::from_millis(30);
    let outcome = run(Setup { beat, slowness, ..Default::default() }, |_, guest| {
        while guest.beats.load(Ordering::Relaxed) < 5 {
            std::thread::sleep(Duration::from_millis(5));
        }
        3
    });
    assert_eq!(outcome.result.unwrap(), 3);
    assert_eq!(outcome.end, Some(ExitReason::Orderly));
}

#[test]
fn signals_are_passed_on_in_order() {
    let signals = vec![libc::SIGUSR1, libc::SIGTERM, libc::SIGRTMIN() + 2];
    let outcome = run(Setup { signals: signals.clone(), ..Default::default() }, |_, guest| {
        while guest.signals.lock().unwrap().len() < 3 {
            std::thread::yield_now();
        }
        137
    });
    assert_eq!(outcome.result.unwrap(), 137);
    assert_eq!(outcome.signals, signals.iter().map(|signal| signal.unsigned_abs()).collect::<Vec<_>>());
}

#[test]
fn a_full_disk_does_not_hang_the_container() {
    let stdout = File::options().write(true).open("/dev/full").unwrap();
    let outcome = run(Setup { stdout: Some(stdout.into()), ..Default::default() }, |mut streams, _| {
        let mut stdout = take(&mut streams, StreamKind::STREAM_KIND_STDOUT);
        let mut errors = (0..1000).filter_map(|_| stdout.write_all(&[0; 4096]).err()).map(|error| error.kind());
        // A socket that is closed before all was read from it says so, once, before it says EPIPE (unix(7)).
        let error = errors.find(|error| *error != io::ErrorKind::ConnectionReset).unwrap();
        assert_eq!(error, io::ErrorKind::BrokenPipe);
        141
    });
    assert_eq!(outcome.result.unwrap(), 141);
}
