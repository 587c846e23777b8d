//! Streams of container processes: each on a connection of its own, moved by threads that block.
//!
//! Until the host connects a stream, its bytes wait in the pipe (or the terminal), and the process waits with them.

pub mod console;
mod ends;
mod pump;

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;

use katavm_protocol::agent::{StreamHello, StreamReply};
use katavm_protocol::frame;

pub use ends::{Ends, Pipes};

use crate::container::Containers;
use crate::transport::Listener;

/// Serves the stream port for as long as the guest lives.
///
/// # Errors
/// That no thread could be made.
pub fn serve(listener: Listener, containers: Arc<Containers>) -> io::Result<()> {
    spawn("streams", move || {
        loop {
            match listener.accept() {
                Ok(connection) => {
                    let containers = Arc::clone(&containers);
                    if let Err(error) = spawn("stream", move || attach(connection, &containers)) {
                        crate::error!("no thread for a stream: {error}");
                    }
                }
                Err(error) => {
                    crate::error!("the stream port failed: {error}");
                    return;
                }
            }
        }
    })
}

/// One connection, from its hello to the end of its stream.
fn attach(mut connection: UnixStream, containers: &Containers) {
    let hello: StreamHello = match frame::read(&mut connection) {
        Ok(hello) => hello,
        Err(error) => return crate::debug!("a stream connection without a hello: {error}"),
    };
    let end = containers
        .process(&hello.container_id, &hello.exec_id)
        .and_then(|process| process.ends.connect(hello.kind.enum_value_or_default(), &connection));
    let error = end.as_ref().err().map(ToString::to_string).unwrap_or_default();
    let replied = frame::write(&mut connection, &StreamReply { error, ..Default::default() });
    if let (Ok(end), Ok(())) = (end, replied) {
        pump::run(end, connection);
    }
}

/// A thread with a small stack: what runs on it keeps its buffers on the heap.
fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name.to_owned()).stack_size(64 * 1024).spawn(body).map(drop)
}
