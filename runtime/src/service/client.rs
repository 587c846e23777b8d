//! The commands' side of the service.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use containerd_shim_protos::api::{
    CloseIORequest, CreateTaskRequest, DeleteRequest, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest,
    ResumeRequest, StartRequest, StatsRequest, UpdateTaskRequest, WaitRequest,
};
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::shim_async::TaskClient;
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use ttrpc::r#async::Client as Connection;
use ttrpc::r#async::transport::Socket;
use ttrpc::context::{Context, with_duration};

use super::task::processes;
use super::{ATTACH, ShortPath, TASK, attach};
use crate::link::{self, Greeting, Hello, ToStandIn, ToWatcher};
use crate::sandbox::agent::GuestProcess;
use crate::state::StateDir;

/// How long a sandbox process has for an answer. Generous: guests run on busy hosts.
const PATIENCE: Duration = Duration::from_secs(120);

/// Why a sandbox process did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// It said no, and why.
    #[error("{0}")]
    Refused(String),
    /// It is gone, or does not answer.
    #[error("cannot speak to the container's sandbox process: {0}")]
    Connection(String),
    /// This process lacks something.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl From<ttrpc::Error> for ClientError {
    fn from(error: ttrpc::Error) -> Self {
        match error {
            ttrpc::Error::RpcStatus(status) if status.code() != ttrpc::Code::DEADLINE_EXCEEDED => {
                Self::Refused(status.message)
            }
            other => Self::Connection(other.to_string()),
        }
    }
}

/// A connection to a sandbox process; each call blocks until it is answered.
pub struct Client {
    runtime: Runtime,
    task: TaskClient,
    directory: ShortPath,
    id: String,
}

impl Client {
    /// Connects to the sandbox process that serves container `id` in `directory`.
    ///
    /// # Errors
    /// Any [`ClientError`].
    pub fn connect(directory: &Path, id: &str) -> Result<Self, ClientError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let short = ShortPath::of(directory)?;
        let task = runtime.block_on(async {
            let stream = UnixStream::connect(short.join(TASK)).await;
            let stream = stream.map_err(|error| ClientError::Connection(error.to_string()))?;
            Ok::<_, ClientError>(TaskClient::new(Connection::new(Socket::new(stream))))
        })?;
        Ok(Self { runtime, task, directory: short, id: id.into() })
    }

    /// Starts the container's first process, or a further one.
    ///
    /// # Errors
    /// Any [`ClientError`].
    pub fn start(&self, exec_id: &str) -> Result<(), ClientError> {
        let request = StartRequest { id: self.id.clone(), exec_id: exec_id.into(), ..Default::default() };
        self.ask(self.task.start(soon(), &request)).map(drop)
    }

    /// Makes a further process, whose streams were passed by [`Client::attach`].
    ///
    /// # Errors
    /// Any [`ClientError`].
    pub fn exec(&self, exec_id: &str, process: Vec<u8>, terminal: bool) -> Result<(), ClientError> {
        let spec = Any { value: process, ..Default::default() };
        let request = ExecProcessRequest {
            id: self.id.clone(),
            exec_id: exec_id.into(),
            terminal,
            spec: MessageField::some(spec),
            ..Default::default()
        };
        self.ask(self.task.exec(soon(), &request)).map(drop)
    }

    /// Passes streams for a further process: the three standard ones, or a terminal alone. What is returned is the link
    /// to the process.
    ///
    /// # Errors
    /// Any [`ClientError`].
    pub fn attach(&self, exec_id: &str, streams: &Streams<'_>) -> Result<OwnedFd, ClientError> {
        self.hand_over(exec_id, streams, None)
    }

    /// Passes what a further container needs: the streams of its first process, its state directory, and the link to
    /// its stand-in. Keep what is returned until it is made.
    ///
    /// # Errors
    /// Any [`ClientError`].
    pub fn attach_container(
        &self,
        streams: &Streams<'_>,
        state: &StateDir,
        link: &OwnedFd,
    ) -> Result<OwnedFd, ClientError> {
        self.hand_over("", streams, Some((state, link)))
    }

    fn hand_over(
        &self,
        exec_id: &str,
        streams: &Streams<'_>,
        container: Option<(&StateDir, &OwnedFd)>,
    ) -> Result<OwnedFd, ClientError> {
        let socket = attach::dial(&self.directory.join(ATTACH))?;
        let mut given: Vec<BorrowedFd<'_>> = streams.all.iter().flatten().copied().collect();
        given.extend(container.iter().flat_map(|(state, link)| [state.lock().as_fd(), link.as_fd()]));
        let hello = Hello {
            container_id: self.id.clone(),
            exec_id: exec_id.into(),
            streams: streams.all.map(|stream| stream.is_some()),
            terminal: streams.terminal,
            state: container.map(|(state, _)| state.path().to_owned()),
        };
        link::send(&socket, &Greeting::Process(hello), &given)?;
        match link::receive(&socket)? {
            Some((ToStandIn::Heard, _)) => Ok(socket),
            _ => Err(ClientError::Connection("it did not take the streams".into())),
        }
    }

    /// Makes a further container of a bundle, for which everything was passed by [`Client::attach_container`].
    ///
    /// # Errors
    /// Any [`ClientError`].
    pub fn create(&self, bundle: &Path, terminal: bool) -> Result<(), ClientError> {
        let bundle = bundle.to_str().ok_or_else(|| io::Error::other("the bundle's path is not UTF-8"))?.to_owned();
        let request = CreateTaskRequest { id: self.id.clone(), bundle, terminal, ..Default::default() };
        self.ask(self.task.create(soon(), &request)).map(drop)
    }

    /// Sends a signal to a process, or to all of the container.
    ///
    /// # Errors
    /// Any [`ClientError`].
    pub fn kill(&self, exec_id: &str, signal: i32, all: bool) -> Result<(), ClientError> {
        let (exec_id, signal) = (exec_id.into(), signal.unsigned_abs());
        let request = KillRequest { id: self.id.clone(), exec_id, signal, all, ..Default::default() };
        self.ask(self.task.kill(soon(), &request)).map(drop)
    }

    /// Removes a container that has ended.
    ///
    /// # Errors
    /// Any [`ClientError`].
    pub fn delete(&self) -> Result<(), ClientError> {
        let request = DeleteRequest { id: self.id.clone(), ..Default::default() };
        self.ask(self.task.delete(soon(), &request)).map(drop)
    }

    /// Waits for the end of a container that was killed, for at most `patience`, and removes it.
    ///
    /// # Errors
    /// Any [`ClientError`].
    pub fn wait_and_delete(&self, patience: Duration) -> Result<(), ClientError> {
        let request = WaitRequest { id: self.id.clone(), ..Default::default() };
        self.ask(self.task.wait(with_duration(patience), &request))?;
        self.delete()
    }

    /// Freezes the container.
    ///
    /// # Errors
    /// Any [`ClientError`].
    pub fn pause(&self) -> Result<(), ClientError> {
        let request = PauseRequest { id: self.id.clone(), ..Default::default() };
        self.ask(self.task.pause(soon(), &request)).map(drop)
    }

    /// Thaws it.
    ///
    /// # Errors
    /// Any [`ClientError`].
    pub fn resume(&self) -> Result<(), ClientError> {
        let request = ResumeRequest { id: self.id.clone(), ..Default::default() };
        self.ask(self.task.resume(soon(), &request)).map(drop)
    }

    /// Ends the standard input of a process.
    ///
    /// # Errors
    /// Any [`ClientError`].
    pub fn close_stdin(&self, exec_id: &str) -> Result<(), ClientError> {
        let request =
            CloseIORequest { id: self.id.clone(), exec_id: exec_id.into(), stdin: true, ..Default::default() };
        self.ask(self.task.close_io(soon(), &request)).map(drop)
    }

    /// Changes the container's limits; `resources` is JSON as in the runtime specification.
    ///
    /// # Errors
    /// Any [`ClientError`].
    pub fn update(&self, resources: Vec<u8>) -> Result<(), ClientError> {
        let resources = MessageField::some(Any { value: resources, ..Default::default() });
        let request = UpdateTaskRequest { id: self.id.clone(), resources, ..Default::default() };
        self.ask(self.task.update(soon(), &request)).map(drop)
    }

    /// The container's processes as the guest counts them.
    ///
    /// # Errors
    /// Any [`ClientError`].
    pub fn processes(&self) -> Result<Vec<GuestProcess>, ClientError> {
        let request = PidsRequest { id: self.id.clone(), ..Default::default() };
        let answer = self.ask(self.task.pids(soon(), &request))?;
        Ok(answer.processes.iter().filter_map(|process| processes::unpack(&process.info)).collect())
    }

    /// What the container has used.
    ///
    /// # Errors
    /// Any [`ClientError`].
    pub fn stats(&self) -> Result<Metrics, ClientError> {
        let request = StatsRequest { id: self.id.clone(), ..Default::default() };
        let answer = self.ask(self.task.stats(soon(), &request))?;
        let unpacked = answer.stats.unpack::<Metrics>().map_err(|error| ClientError::Connection(error.to_string()))?;
        unpacked.ok_or_else(|| ClientError::Connection("an answer without statistics".into()))
    }

    /// Watches the container from now on.
    ///
    /// # Errors
    /// Any [`ClientError`].
    pub fn watch(&self) -> Result<Watch, ClientError> {
        let socket = attach::dial(&self.directory.join(ATTACH))?;
        link::send(&socket, &Greeting::Watch(self.id.clone()), &[])?;
        match link::receive(&socket)? {
            Some((ToWatcher::Heard, _)) => Ok(Watch(socket)),
            Some((ToWatcher::Refused(reason), _)) => Err(ClientError::Refused(reason)),
            _ => Err(ClientError::Connection("it does not tell what happens".into())),
        }
    }

    fn ask<T>(&self, request: impl Future<Output = ttrpc::Result<T>>) -> Result<T, ClientError> {
        Ok(self.runtime.block_on(request)?)
    }
}

/// A container that is watched.
pub struct Watch(OwnedFd);

impl Watch {
    /// What has happened; nothing when the sandbox process has ended. Waits for it.
    ///
    /// # Errors
    /// Those of recvmsg(2).
    pub fn next(&self) -> io::Result<Option<ToWatcher>> {
        Ok(link::receive(&self.0)?.map(|(message, _)| message))
    }

    /// Waits until [`Self::next`] does not wait, or for `patience`; whether something has happened.
    ///
    /// # Errors
    /// Those of poll(2).
    pub fn wait(&self, patience: Duration) -> io::Result<bool> {
        let end = Instant::now() + patience;
        loop {
            let left = Timespec::try_from(end.saturating_duration_since(Instant::now())).map_err(io::Error::other)?;
            match poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&left)) {
                Ok(ready) => return Ok(ready > 0),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Streams that are passed.
pub struct Streams<'a> {
    all: [Option<BorrowedFd<'a>>; 3],
    terminal: bool,
}

impl<'a> Streams<'a> {
    /// The three standard streams.
    #[must_use]
    pub fn standard(stdio: &'a crate::process::stdio::Inherited) -> Self {
        let all = [&stdio.stdin, &stdio.stdout, &stdio.stderr];
        Self { all: all.map(|stream| stream.as_ref().map(AsFd::as_fd)), terminal: false }
    }

    /// A terminal.
    #[must_use]
    pub fn terminal(slave: &'a impl AsFd) -> Self {
        Self { all: [Some(slave.as_fd()), None, None], terminal: true }
    }
}

fn soon() -> Context {
    with_duration(PATIENCE)
}
