//! One job in one machine, seen from outside.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::artefacts::Artefacts;
use super::job::{Job, Machine};
use super::qemu::Qemu;
use super::streams::Streams;
use super::terminal::{self, Signal};
use super::wire::{self, FromLab, ToLab};
use super::{guest, initrd, monitor};

/// How long a machine may take until the command starts: many times what it needs, as this machine may be busy.
const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// The same with systemd or with a counting clock.
const SLOW_BOOT_LIMIT: Duration = Duration::from_secs(360);
/// How long a machine that sends heartbeats may be silent.
const SILENCE_LIMIT: Duration = Duration::from_secs(120);
/// How much of the console is kept.
const CONSOLE_TAIL: usize = 16 * 1024;
/// How long the rest of the console is waited for after QEMU ended.
const CONSOLE_REST: Duration = Duration::from_millis(500);

/// How a job ended.
#[derive(Debug)]
pub enum Outcome {
    /// The command ended with this code; 128 + n for signal n.
    Exited(i32),
    /// The time limit was reached.
    TimedOut(Duration),
    /// This process got this signal (SIGINT, SIGTERM or SIGHUP).
    Signalled(i32),
    /// The lab failed, not the command.
    Crashed(Failure),
}

/// A failure of the lab itself.
#[derive(Debug)]
pub struct Failure {
    /// Whether the command had started.
    pub started: bool,
    /// What happened.
    pub reason: String,
    /// The last lines of the machine's console.
    pub console: String,
}

enum Event {
    Message(FromLab),
    ControlClosed,
    OutputDone(&'static str, io::Result<()>),
    Signal(Signal),
}

/// Runs a job. The streams come back when nothing of them was used.
pub fn run(
    artefacts: &Artefacts,
    job: &Job,
    machine: &Machine,
    streams: Streams,
) -> Result<(Outcome, Option<Streams>)> {
    let begin = Instant::now();
    if let Some(flaw) = artefacts.flaw() {
        eprintln!("katavm-lab: warning: {flaw}");
    }
    let program = guest::program()?;
    let initrd = initrd::make(artefacts, &program, job)?;
    let mut qemu = Qemu::start(artefacts, job, machine, initrd)?;
    phase("QEMU started", begin);
    let console = Console::follow(qemu.console.try_clone()?, machine.console.clone())?;
    let ports: [UnixStream; 4] = std::mem::take(&mut qemu.ports)
        .try_into()
        .map_err(|_| anyhow::anyhow!("the lab has other ports than expected"))?;
    let [control, stdin, stdout, stderr] = ports;

    let (sender, events) = mpsc::channel();
    listen(control.try_clone()?, sender.clone())?;
    let _signals = terminal::forward({
        let sender = sender.clone();
        move |signal| sender.send(Event::Signal(signal)).is_ok()
    })?;
    let boot_limit = if job.systemd || machine.counting { SLOW_BOOT_LIMIT } else { BOOT_LIMIT };
    let monitor = qemu.monitor.try_clone()?;
    let session = Session { events, begin, machine, monitor, boot_limit, heartbeat: job.heartbeat };
    if let Some(end) = session.wait_for_start() {
        qemu.kill();
        return Ok((end.with_console(&console), Some(streams)));
    }
    phase("command started", begin);

    // When a socket is closed QEMU throws away what it has not read from it yet: this one stays open to the end.
    let _open = stdin.try_clone()?;
    spawn("stdin", move || feed(streams.stdin, stdin))?;
    for (name, port, target) in [("stdout", stdout, streams.stdout), ("stderr", stderr, streams.stderr)] {
        let sender = sender.clone();
        spawn(name, move || {
            let result = drain(port, target);
            let _ = sender.send(Event::OutputDone(name, result));
        })?;
    }
    let end = session.wait_for_end(control)?;
    phase("command ended", begin);
    let killing = Instant::now();
    qemu.kill();
    phase("QEMU ended", killing);
    Ok((end.with_console(&console), None))
}

/// How the session ended, before the console's tail is known.
enum End {
    Exited(i32),
    TimedOut(Duration),
    Signalled(i32),
    Failed { started: bool, reason: String },
}

impl End {
    fn with_console(self, console: &Console) -> Outcome {
        match self {
            Self::Exited(code) => Outcome::Exited(code),
            Self::TimedOut(limit) => Outcome::TimedOut(limit),
            Self::Signalled(number) => Outcome::Signalled(number),
            Self::Failed { started, reason } => Outcome::Crashed(Failure { started, reason, console: console.tail() }),
        }
    }
}

struct Session<'a> {
    events: Receiver<Event>,
    begin: Instant,
    machine: &'a Machine,
    monitor: UnixStream,
    boot_limit: Duration,
    heartbeat: bool,
}

impl Session<'_> {
    /// Nothing when the command started.
    fn wait_for_start(&self) -> Option<End> {
        let limit = self.boot_limit.min(self.machine.limit);
        loop {
            let failed = |reason: String| Some(End::Failed { started: false, reason });
            match self.next(self.begin + limit) {
                Ok(Event::Message(FromLab::Started { uptime_ms })) => {
                    phase(&format!("machine's own uptime {uptime_ms} ms"), self.begin);
                    return None;
                }
                Ok(Event::Message(FromLab::Failed { reason })) => return failed(reason),
                Ok(Event::Signal(Signal::End(number))) => return Some(End::Signalled(number)),
                Ok(Event::ControlClosed) => return failed("it ended while booting".into()),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) if limit == self.machine.limit => return Some(End::TimedOut(limit)),
                Err(_) => return failed(format!("the command did not start within {} s", limit.as_secs())),
            }
        }
    }

    fn wait_for_end(&self, mut control: UnixStream) -> Result<End> {
        let deadline = self.begin + self.machine.limit;
        let (mut exit, mut outputs) = (None, 2);
        let mut heard = Instant::now();
        loop {
            if let (Some(code), 0) = (exit, outputs) {
                return Ok(End::Exited(code));
            }
            let silent = if self.heartbeat { heard + SILENCE_LIMIT } else { deadline };
            let failed = |reason: &str| Ok(End::Failed { started: true, reason: reason.into() });
            match self.next(deadline.min(silent)) {
                Ok(Event::Message(message)) => {
                    heard = Instant::now();
                    match message {
                        FromLab::Exited { code } => exit = Some(code),
                        FromLab::Failed { reason } => return failed(&reason),
                        FromLab::Alive | FromLab::Started { .. } => {}
                    }
                }
                Ok(Event::OutputDone(_, Ok(()))) => outputs -= 1,
                // A reader that went away, as `head` does, ends the command's output, not the job.
                Ok(Event::OutputDone(_, Err(error))) if error.kind() == io::ErrorKind::BrokenPipe => outputs -= 1,
                Ok(Event::OutputDone(name, Err(error))) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    return failed(&format!("the machine ended in the middle of the command ({name} broke off)"));
                }
                Ok(Event::OutputDone(name, Err(error))) => {
                    return Err(error).with_context(|| format!("cannot pass on {name}"));
                }
                Ok(Event::ControlClosed) if exit.is_none() => {
                    return failed("the machine ended in the middle of the command");
                }
                Ok(Event::ControlClosed) => {}
                Ok(Event::Signal(Signal::End(number))) => return Ok(End::Signalled(number)),
                Ok(Event::Signal(Signal::Resize)) => {
                    if let Some((rows, columns)) = terminal::size() {
                        // If the machine is gone its end of the control port says so.
                        let _ = wire::send(&mut control, &ToLab::Resize { rows, columns });
                    }
                }
                Err(_) if Instant::now() >= deadline => return Ok(End::TimedOut(self.machine.limit)),
                Err(_) => {
                    let state = monitor::look(&self.monitor, self.machine.cpu_count());
                    return failed(&format!("the machine hangs: silent for {} s\n{state}", SILENCE_LIMIT.as_secs()));
                }
            }
        }
    }

    fn next(&self, deadline: Instant) -> Result<Event, RecvTimeoutError> {
        self.events.recv_timeout(deadline.saturating_duration_since(Instant::now()))
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<()> {
    thread::Builder::new()
        .name(name.into())
        .spawn(body)
        .with_context(|| format!("cannot start the thread for {name}"))?;
    Ok(())
}

fn listen(mut control: UnixStream, sender: Sender<Event>) -> Result<()> {
    spawn("control", move || {
        while let Ok(Some(message)) = wire::receive(&mut control) {
            if sender.send(Event::Message(message)).is_err() {
                return;
            }
        }
        let _ = sender.send(Event::ControlClosed);
    })
}

/// Passes stdin on, and its end. Ends by itself when the machine is gone.
fn feed(mut source: Box<dyn Read + Send>, mut port: UnixStream) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let length = match source.read(&mut buffer) {
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // No stdin at all (EBADF), or one that failed: the command sees its end.
            Err(_) => 0,
        };
        if wire::write_frame(&mut port, &buffer[..length]).is_err() || length == 0 {
            return;
        }
    }
}

/// Passes output on until its end.
fn drain(mut port: UnixStream, mut target: Box<dyn Write + Send>) -> io::Result<()> {
    let mut buffer = Vec::new();
    while wire::read_frame(&mut port, &mut buffer)? {
        if let Err(error) = target.write_all(&buffer) {
            // Let go of the rest, so that the command does not block for good.
            let _ = io::copy(&mut port, &mut io::sink());
            return Err(error);
        }
    }
    target.flush()
}

/// The machine's serial console: its tail in memory, all of it in a file if wanted.
struct Console {
    tail: Arc<Mutex<VecDeque<u8>>>,
    done: Receiver<()>,
}

impl Console {
    fn follow(mut stream: UnixStream, file: Option<PathBuf>) -> Result<Self> {
        let mut file = match file {
            Some(path) => Some(File::create(&path).with_context(|| format!("cannot write {}", path.display()))?),
            None => None,
        };
        let tail = Arc::new(Mutex::new(VecDeque::new()));
        let (sender, done) = mpsc::channel();
        let kept = Arc::clone(&tail);
        spawn("console", move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = stream.read(&mut buffer) {
                let bytes = &buffer[..length];
                if let Some(file) = &mut file {
                    // A full disk must not end the job.
                    let _ = file.write_all(bytes);
                }
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                kept.extend(bytes);
                let excess = kept.len().saturating_sub(CONSOLE_TAIL);
                kept.drain(..excess);
            }
            let _ = sender.send(());
        })?;
        Ok(Self { tail, done })
    }

    /// The last lines, once QEMU ended.
    fn tail(&self) -> String {
        let _ = self.done.recv_timeout(CONSOLE_REST);
        let bytes: Vec<u8> = self.tail.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect();
        String::from_utf8_lossy(&bytes).replace('\r', "").trim_end().to_owned()
    }
}

/// With `KATAVM_LAB_TIMES` set, says on stderr what took how long.
fn phase(what: &str, since: Instant) {
    if std::env::var_os("KATAVM_LAB_TIMES").is_some() {
        eprintln!("katavm-lab: {what} after {} ms", since.elapsed().as_millis());
    }
}
