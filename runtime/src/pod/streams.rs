//! The connections of a process' streams.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use katavm_protocol::agent::{StreamHello, StreamKind, StreamReply};
use katavm_protocol::{frame, ports};
use tokio::sync::oneshot;

use super::{Io, PodError};
use crate::process::stdio::{InputPump, OutputEnd, OutputPump, OutputStop, pump_input, pump_output};
use crate::sandbox::vm::Dial;
use crate::sandbox::{DIAL_PATIENCE, Sandbox, blocking};

/// The streams that are connected.
#[derive(Debug, Default)]
pub struct Streams {
    input: Option<InputPump>,
    outputs: Vec<(&'static str, oneshot::Receiver<OutputEnd>)>,
    stops: Vec<OutputStop>,
}

impl Streams {
    /// Connects all streams of a process that has not been started. The bytes that it writes are counted in `moved` when
    /// they have arrived.
    ///
    /// # Errors
    /// Which of them cannot be had.
    pub async fn connect(
        sandbox: &Sandbox,
        container_id: &str,
        exec_id: &str,
        io: &Io,
        moved: &Arc<AtomicU64>,
    ) -> Result<Self, PodError> {
        let connect = |kind, name| async move {
            let hello = StreamHello {
                container_id: container_id.into(),
                exec_id: exec_id.into(),
                kind: StreamKind::into(kind),
                ..Default::default()
            };
            let dial = sandbox.dialler();
            let connected = blocking(move || greet(&*dial, &hello)).await;
            connected.map_err(|error| PodError::Stream { stream: name, error })
        };
        let failed = |stream| move |error| PodError::Stream { stream, error };
        let copy = |fd: &OwnedFd| fd.try_clone();
        let (mut streams, stdio) = (Self::default(), &io.stdio);
        if io.has_terminal {
            let name = "terminal";
            let stream = connect(StreamKind::STREAM_KIND_TERMINAL, name).await?;
            let sink = io.terminal_sink().map_err(failed(name))?;
            if let Some(source) = &stdio.stdin {
                let pump = stream.try_clone().and_then(|stream| pump_input(name, stream, copy(source)?));
                streams.input = Some(pump.map_err(failed(name))?);
            }
            streams.add(name, pump_output(name, stream, sink, Arc::clone(moved), io.lingers).map_err(failed(name))?);
            return Ok(streams);
        }
        let outputs = [
            (&stdio.stdout, StreamKind::STREAM_KIND_STDOUT, "standard output"),
            (&stdio.stderr, StreamKind::STREAM_KIND_STDERR, "standard error"),
        ];
        for (sink, kind, name) in outputs {
            if let Some(sink) = sink {
                let stream = connect(kind, name).await?;
                let pump = copy(sink).and_then(|sink| pump_output(name, stream, sink, Arc::clone(moved), io.lingers));
                streams.add(name, pump.map_err(failed(name))?);
            }
        }
        if let Some(source) = &stdio.stdin {
            let name = "standard input";
            let stream = connect(StreamKind::STREAM_KIND_STDIN, name).await?;
            let pump = copy(source).and_then(|source| pump_input(name, stream, source));
            streams.input = Some(pump.map_err(failed(name))?);
        }
        Ok(streams)
    }

    /// Ends the process' standard input when what is on its way to it has arrived.
    pub fn end_input(&self) {
        self.input.iter().for_each(InputPump::end);
    }

    /// Ends the process' standard input.
    pub fn close_input(&mut self) {
        self.input = None;
    }

    fn add(&mut self, name: &'static str, pump: OutputPump) {
        self.outputs.push((name, pump.end));
        self.stops.push(pump.stop);
    }

    /// What ends the streams out of the container, whether all has arrived or not.
    pub fn take_stops(&mut self) -> Vec<OutputStop> {
        std::mem::take(&mut self.stops)
    }

    /// Returns when everything that the container has written has arrived.
    pub async fn drained(&mut self) {
        while let Some((name, end)) = self.outputs.last_mut() {
            // A thread that died has nothing more to write.
            if let Ok(Err(error)) = end.await {
                log::warn!("writing the container's {name}: {error}");
            }
            self.outputs.pop();
        }
    }
}

/// Opens a connection to the stream port and says which stream it is for.
fn greet(dial: &dyn Dial, hello: &StreamHello) -> io::Result<UnixStream> {
    let mut stream = dial.dial(ports::STREAM, DIAL_PATIENCE)?;
    stream.set_read_timeout(Some(DIAL_PATIENCE))?;
    frame::write(&mut stream, hello)?;
    let reply: StreamReply = frame::read(&mut stream)?;
    stream.set_read_timeout(None)?;
    if reply.error.is_empty() { Ok(stream) } else { Err(io::Error::other(reply.error)) }
}
