//! Standard streams: bytes between what this process has inherited and the container's streams in the guest.
//!
//! Each stream has a thread and a connection of its own. A thread reads no more than it can write, so a slow
//! reader slows the container down and nothing is lost or piled up.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{inotify, major, minor};
use tokio::sync::oneshot;

/// Bytes that are moved at once: what a pipe can hold by default, four times.
const CHUNK: usize = 256 * 1024;

/// Which streams the container gets; one that it does not is /dev/null in there.
#[derive(Debug)]
pub struct Inherited {
    /// `None` where this process has /dev/null (or nothing).
    pub stdin: Option<OwnedFd>,
    /// Likewise.
    pub stdout: Option<OwnedFd>,
    /// Likewise.
    pub stderr: Option<OwnedFd>,
}

impl Inherited {
    /// Duplicates of this process' streams. (A stream that was closed is /dev/null by now: Rust sees to that.)
    ///
    /// # Errors
    /// When no descriptors are left.
    pub fn take() -> io::Result<Self> {
        Ok(Self {
            stdin: unless_null(io::stdin().as_fd())?,
            stdout: unless_null(io::stdout().as_fd())?,
            stderr: unless_null(io::stderr().as_fd())?,
        })
    }

    /// Duplicates of these.
    ///
    /// # Errors
    /// When no descriptors are left.
    pub fn duplicate(&self) -> io::Result<Self> {
        let duplicate = |stream: &Option<OwnedFd>| stream.as_ref().map(OwnedFd::try_clone).transpose();
        Ok(Self { stdin: duplicate(&self.stdin)?, stdout: duplicate(&self.stdout)?, stderr: duplicate(&self.stderr)? })
    }
}

fn unless_null(fd: BorrowedFd<'_>) -> io::Result<Option<OwnedFd>> {
    let file = File::from(fd.try_clone_to_owned()?);
    let metadata = file.metadata()?;
    let null = metadata.file_type().is_char_device() && (major(metadata.rdev()), minor(metadata.rdev())) == (1, 3);
    Ok((!null).then(|| file.into()))
}

/// How a stream out of the container has ended.
pub type OutputEnd = io::Result<()>;

/// A stream out of the container. It goes on when this is dropped.
#[derive(Debug)]
pub struct OutputPump {
    /// Hears when all of it has arrived.
    pub end: oneshot::Receiver<OutputEnd>,
    /// Ends it.
    pub stop: OutputStop,
}

/// Ends a stream out of the container.
#[derive(Debug)]
pub struct OutputStop {
    event: Arc<OwnedFd>,
    stream: UnixStream,
}

impl OutputStop {
    /// Ends it, wherever it is: what the sink does not take at once is lost. A sink whose writes block is waited for.
    pub fn stop(&self) {
        // An eventfd far from overflow takes every write, and a stream that has ended needs no shutdown.
        let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// Moves what the container writes to `sink` until it has closed the stream, and counts the bytes in `moved`.
///
/// When nobody reads `sink` any more, the stream is closed, and the container's next write fails as it would
/// have with an ordinary pipe. With `lingers`, `sink` is a named pipe of which this process has both ends: they stay open
/// until what is in it was read, whether somebody reads it already or comes later.
///
/// # Errors
/// When no thread, eventfd or duplicate can be made.
pub fn pump_output(
    name: &str,
    mut stream: UnixStream,
    sink: OwnedFd,
    moved: Arc<AtomicU64>,
    lingers: bool,
) -> io::Result<OutputPump> {
    let (ended, end) = oneshot::channel();
    let stopped = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
    let stop = OutputStop { event: Arc::clone(&stopped), stream: stream.try_clone()? };
    thread::Builder::new().name(name.to_owned()).spawn(move || {
        let sink = Sink { fd: sink, stopped, moved };
        let result = copy(&mut stream, &sink);
        // One that the guest has closed already needs no shutdown.
        let _ = stream.shutdown(Shutdown::Both);
        let result = match result {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
            other => other,
        };
        // Nobody waits for it when the guest has failed.
        let _ = ended.send(result);
        if lingers && let Err(error) = sink.linger() {
            log::warn!("what was written last may be lost: {error}");
        }
    })?;
    Ok(OutputPump { end, stop })
}

fn copy(stream: &mut UnixStream, sink: &Sink) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(len) => sink.write_all(buffer.get(..len).unwrap_or_default())?,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // The guest has ended without a word: what it sent before is here.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// Where a stream out of the container leads: a descriptor that others may have set to not block.
struct Sink {
    fd: OwnedFd,
    stopped: Arc<OwnedFd>,
    moved: Arc<AtomicU64>,
}

impl Sink {
    fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match rustix::io::write(&self.fd, bytes).map_err(io::Error::from) {
                Ok(len) => {
                    bytes = bytes.get(len..).unwrap_or_default();
                    self.moved.fetch_add(len.try_into().unwrap_or(u64::MAX), Ordering::Relaxed);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.wait()?,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Returns when everything in it was read, or when the stream was stopped.
    fn linger(&self) -> io::Result<()> {
        /// For kernels that do not tell of what splice(2) reads.
        const AGAIN: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        let path = format!("/proc/self/fd/{}", self.fd.as_raw_fd());
        inotify::add_watch(&watch, path, inotify::WatchFlags::ACCESS)?;
        while rustix::io::ioctl_fionread(&self.fd)? > 0 {
            let mut fds = [PollFd::new(&watch, PollFlags::IN), PollFd::new(&self.stopped, PollFlags::IN)];
            match poll(&mut fds, Some(&AGAIN)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let [_, stopped] = fds.map(|fd| !fd.revents().is_empty());
            if stopped {
                break;
            }
            // What they say is of no interest, only that there are some.
            let mut events = [0_u8; 1024];
            while rustix::io::read(&watch, &mut events).is_ok_and(|len| len > 0) {}
        }
        Ok(())
    }

    /// Returns when it takes something; fails when the stream was stopped first.
    fn wait(&self) -> io::Result<()> {
        let mut fds = [PollFd::new(&self.fd, PollFlags::OUT), PollFd::new(&self.stopped, PollFlags::IN)];
        wait(&mut fds)?;
        let [ready, stopped] = fds.map(|fd| !fd.revents().is_empty());
        if stopped && !ready { Err(io::Error::other("nobody reads what was written last")) } else { Ok(()) }
    }
}

fn wait(fds: &mut [PollFd<'_>]) -> io::Result<()> {
    match poll(fds, None) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// A stream into the container. Dropping it ends the thread, whatever it waits for.
#[derive(Debug)]
pub struct InputPump {
    stop: OwnedFd,
    /// The end is to come when what is there has been read.
    rest_first: Arc<AtomicBool>,
    stream: UnixStream,
}

impl InputPump {
    /// Ends the stream when what its source has now was moved.
    pub fn end(&self) {
        self.rest_first.store(true, Ordering::Release);
        self.wake();
    }

    fn wake(&self) {
        // An eventfd far from overflow takes every write.
        let _ = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
    }
}

impl Drop for InputPump {
    fn drop(&mut self) {
        self.rest_first.store(false, Ordering::Release);
        self.wake();
        // This ends a write that waits for the container.
        let _ = self.stream.shutdown(Shutdown::Write);
    }
}

/// Moves `source` to the container until its end, which the container sees as its own end of file.
///
/// # Errors
/// When no thread, eventfd or duplicate can be made.
pub fn pump_input(name: &str, stream: UnixStream, source: OwnedFd) -> io::Result<InputPump> {
    let stop = eventfd(0, EventfdFlags::CLOEXEC)?;
    let rest_first = Arc::new(AtomicBool::new(false));
    let pump = InputPump { stop: stop.try_clone()?, rest_first: Arc::clone(&rest_first), stream: stream.try_clone()? };
    thread::Builder::new().name(name.to_owned()).spawn(move || {
        if let Err(error) = feed(&stream, &source, &stop, &rest_first)
            && !matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset)
        {
            log::warn!("reading from standard input: {error}");
        }
        // One that the container has closed already needs no shutdown.
        let _ = stream.shutdown(Shutdown::Write);
    })?;
    Ok(pump)
}

fn feed(mut stream: &UnixStream, source: &OwnedFd, stop: &OwnedFd, rest_first: &AtomicBool) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        let mut fds = [
            PollFd::new(source, PollFlags::IN),
            PollFd::new(stop, PollFlags::IN),
            // No event asked for: a hang-up is always told. The container reads no more then.
            PollFd::from_borrowed_fd(stream.as_fd(), PollFlags::empty()),
        ];
        wait(&mut fds)?;
        let [ready, stopped, closed] = fds.map(|fd| !fd.revents().is_empty());
        if closed || stopped && !(ready && rest_first.load(Ordering::Acquire)) {
            return Ok(());
        }
        if !ready {
            continue;
        }
        match rustix::io::read(source, &mut buffer).map_err(io::Error::from) {
            Ok(0) => return Ok(()),
            Ok(len) => stream.write_all(buffer.get(..len).unwrap_or_default())?,
            // Somebody else was quicker, and the rest is theirs.
            Err(error) if stopped && error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {}
            // A terminal that was hung up.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::OpenOptionsExt as _;
    use std::time::Duration;

    use super::*;

    fn pattern(len: u32) -> Vec<u8> {
        (0..len).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
    }

    #[test]
    fn output_arrives_whole_through_a_slow_reader() {
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let (mut reader, sink) = io::pipe().unwrap();
        let pump = pump_output("out", ours, sink.into(), Arc::default(), false).unwrap();
        let data = pattern(5_000_000);
        let sent = data.clone();
        let writer = thread::spawn(move || guest.write_all(&sent).unwrap());
        let mut received = Vec::new();
        let mut piece = vec![0; 3001];
        loop {
            let len = reader.read(&mut piece).unwrap();
            if len == 0 {
                break;
            }
            received.extend_from_slice(&piece[..len]);
        }
        writer.join().unwrap();
        assert!(received == data, "{} of {} bytes", received.len(), data.len());
        pump.end.blocking_recv().unwrap().unwrap();
    }

    #[test]
    fn output_waits_for_a_sink_that_does_not_block() {
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let (mut reader, sink) = io::pipe().unwrap();
        rustix::io::ioctl_fionbio(&sink, true).unwrap();
        let pump = pump_output("out", ours, sink.into(), Arc::default(), false).unwrap();
        let data = pattern(1_000_000);
        let sent = data.clone();
        thread::spawn(move || guest.write_all(&sent).unwrap());
        let mut received = Vec::new();
        reader.read_to_end(&mut received).unwrap();
        assert!(received == data);
        pump.end.blocking_recv().unwrap().unwrap();
    }

    #[test]
    fn a_reader_that_goes_closes_the_stream() {
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let (reader, sink) = io::pipe().unwrap();
        let pump = pump_output("out", ours, sink.into(), Arc::default(), false).unwrap();
        drop(reader);
        // Some of it may be on its way before the other side notices.
        let error = (0..1000).find_map(|_| guest.write_all(&[0; 4096]).err()).expect("the stream stays open");
        // A socket that is closed before all was read from it says the latter, once (unix(7)).
        assert!(matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset), "{error}");
        pump.end.blocking_recv().unwrap().unwrap();
    }

    #[test]
    fn what_nobody_reads_can_be_stopped() {
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let (reader, sink) = io::pipe().unwrap();
        rustix::io::ioctl_fionbio(&sink, true).unwrap();
        let moved = Arc::<AtomicU64>::default();
        let pump = pump_output("out", ours, sink.into(), Arc::clone(&moved), false).unwrap();
        thread::spawn(move || while guest.write_all(&[0; 65536]).is_ok() {});
        let mut before = u64::MAX;
        while moved.load(Ordering::Relaxed) != before || before == 0 {
            before = moved.load(Ordering::Relaxed);
            thread::sleep(Duration::from_millis(50));
        }
        pump.stop.stop();
        let error = pump.end.blocking_recv().unwrap().unwrap_err();
        assert!(error.to_string().contains("nobody reads"), "{error}");
        drop(reader);
    }

    #[test]
    fn what_was_written_to_a_named_pipe_waits_for_its_reader() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pipe");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let sink = || File::options().read(true).write(true).open(&path).unwrap().into();
        let run = |sink| {
            let (ours, mut guest) = UnixStream::pair().unwrap();
            let pump = pump_output("out", ours, sink, Arc::default(), true).unwrap();
            guest.write_all(b"last words").unwrap();
            drop(guest);
            pump.end.blocking_recv().unwrap().unwrap();
            pump.stop
        };
        let _stop = run(sink());
        let mut text = String::new();
        // Its end comes when all was read.
        File::open(&path).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "last words");
        // Removed before anybody has come.
        run(sink()).stop();
        let mut left = vec![0; 100];
        let reader = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
        while (&reader).read(&mut left).map_or(true, |len| len > 0) {}
    }

    #[test]
    fn a_full_disk_is_told() {
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let full = File::options().write(true).open("/dev/full").unwrap();
        let pump = pump_output("out", ours, full.into(), Arc::default(), false).unwrap();
        guest.write_all(b"x").unwrap();
        assert_eq!(pump.end.blocking_recv().unwrap().unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    }

    #[test]
    fn input_arrives_whole_and_ends() {
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let (source, mut writer) = io::pipe().unwrap();
        let _pump = pump_input("in", ours, source.into()).unwrap();
        let data = pattern(2_000_000);
        let sent = data.clone();
        thread::spawn(move || writer.write_all(&sent).unwrap());
        let mut received = Vec::new();
        guest.read_to_end(&mut received).unwrap();
        assert!(received == data);
    }

    #[test]
    fn input_ends_when_the_container_closes_it_or_the_pump_is_dropped() {
        let (ours, guest) = UnixStream::pair().unwrap();
        let (source, writer) = io::pipe().unwrap();
        let _pump = pump_input("in", ours, source.into()).unwrap();
        drop(guest);
        wait_for_reader_to_go(writer);
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let (source, mut writer) = io::pipe().unwrap();
        let pump = pump_input("in", ours, source.into()).unwrap();
        // The container does not read: the thread waits in its write.
        thread::spawn({
            let mut writer = writer.try_clone().unwrap();
            move || while writer.write_all(&[0; 65536]).is_ok() {}
        });
        thread::sleep(Duration::from_millis(50));
        drop(pump);
        let _ = guest.read_to_end(&mut Vec::new()).unwrap();
        assert!(writer.write_all(&[0; 1 << 20]).is_err());
    }

    #[test]
    fn input_that_is_to_end_is_moved_first() {
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let (source, mut writer) = io::pipe().unwrap();
        let data = pattern(60_000);
        writer.write_all(&data).unwrap();
        let pump = pump_input("in", ours, source.into()).unwrap();
        pump.end();
        let mut received = Vec::new();
        guest.read_to_end(&mut received).unwrap();
        assert!(received == data, "{} of {} bytes", received.len(), data.len());
        drop((pump, writer));
    }

    fn wait_for_reader_to_go(mut writer: io::PipeWriter) {
        // A pipe without a reader tells so by an error condition.
        let mut fds = [PollFd::new(&writer, PollFlags::empty())];
        let timeout = rustix::event::Timespec { tv_sec: 10, tv_nsec: 0 };
        assert_eq!(poll(&mut fds, Some(&timeout)).unwrap(), 1, "the reader stays");
        assert!(writer.write_all(b"x").is_err());
    }

    #[test]
    fn dev_null_is_not_carried() {
        let null = File::options().read(true).open("/dev/null").unwrap();
        assert!(unless_null(null.as_fd()).unwrap().is_none());
        let zero = File::options().read(true).open("/dev/zero").unwrap();
        assert!(unless_null(zero.as_fd()).unwrap().is_some());
    }
}
