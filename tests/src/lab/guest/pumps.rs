//! Threads between the command's descriptors and the ports.

use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::thread::{self, JoinHandle};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::lab::wire::{self, read_frame};

/// How long, after the command ended, its output may pause before it counts as complete although some process
/// that it left behind still holds it open.
const PAUSE_MS: u16 = 1000;

/// Passes stdin on until its end; then `end` is told, who closes the command's side.
pub fn feed(mut port: File, mut target: File, end: impl FnOnce(File) + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name("stdin".into()).spawn(move || {
        if let Err(error) = pass_on(&mut port, &mut target) {
            // On the machine's console.
            println!("katavm-lab: stdin broke off: {error}");
        }
        end(target);
    })?;
    Ok(())
}

fn pass_on(port: &mut File, target: &mut File) -> io::Result<()> {
    let mut buffer = Vec::new();
    while read_frame(port, &mut buffer)? {
        if target.write_all(&buffer).is_err() {
            // The command reads no more: the outside must not block.
            while read_frame(port, &mut buffer)? {}
            break;
        }
    }
    Ok(())
}

/// Passes output on to its end.
pub struct Drain {
    thread: JoinHandle<()>,
    command_ended: PipeWriter,
}

impl Drain {
    /// Starts it.
    pub fn start(source: OwnedFd, port: File) -> io::Result<Self> {
        let (ended, command_ended) = io::pipe()?;
        let thread = thread::Builder::new().name("output".into()).spawn(move || {
            // If the port fails the machine is being ended: nobody is left to tell.
            let _ = drain(source.into(), port, &ended);
        })?;
        Ok(Self { thread, command_ended })
    }

    /// Waits for the rest after the command's end.
    pub fn finish(self) {
        drop(self.command_ended);
        // It cannot panic.
        let _ = self.thread.join();
    }
}

fn drain(mut source: File, mut port: File, ended: &PipeReader) -> io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    let mut command_runs = true;
    loop {
        if !readable(&source, command_runs.then_some(ended))? {
            if !command_runs {
                break;
            }
            command_runs = false;
            continue;
        }
        match source.read(&mut buffer) {
            Ok(0) => break,
            // A terminal whose last user closed it says EIO.
            Err(error) if error.raw_os_error() == Some(Errno::EIO as i32) => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(length) => wire::write_frame(&mut port, &buffer[..length])?,
            Err(error) => return Err(error),
        }
    }
    wire::write_frame(&mut port, &[])
}

/// Waits until the source has bytes or its end: true. False when the command ended, or after that, when nothing came for a while.
fn readable(source: &File, ended: Option<&PipeReader>) -> io::Result<bool> {
    let mut fds = vec![PollFd::new(source.as_fd(), PollFlags::POLLIN)];
    fds.extend(ended.map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLIN)));
    let timeout = if ended.is_some() { PollTimeout::NONE } else { PollTimeout::from(PAUSE_MS) };
    loop {
        match poll(&mut fds, timeout) {
            Ok(_) => return Ok(fds[0].any() == Some(true)),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
