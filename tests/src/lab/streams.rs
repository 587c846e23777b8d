//! Where a job's standard streams come from and go to.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};

/// The streams outside. Read and written by threads of their own.
pub struct Streams {
    /// The job's stdin.
    pub stdin: Box<dyn Read + Send>,
    /// Gets the job's stdout.
    pub stdout: Box<dyn Write + Send>,
    /// Gets the job's stderr.
    pub stderr: Box<dyn Write + Send>,
}

impl Streams {
    /// This process's own, unbuffered.
    ///
    /// # Errors
    /// When a descriptor cannot be duplicated.
    pub fn inherit() -> io::Result<Self> {
        let own = |fd: std::os::fd::BorrowedFd<'_>| -> io::Result<Box<File>> {
            Ok(Box::new(fd.try_clone_to_owned()?.into()))
        };
        Ok(Self {
            stdin: own(io::stdin().as_fd())?,
            stdout: own(io::stdout().as_fd())?,
            stderr: own(io::stderr().as_fd())?,
        })
    }

    /// Bytes for stdin, and what comes back.
    #[must_use]
    pub fn captured(stdin: Vec<u8>) -> (Self, Captured, Captured) {
        let (stdout, stderr) = (Captured::default(), Captured::default());
        let streams = Self {
            stdin: Box::new(io::Cursor::new(stdin)),
            stdout: Box::new(stdout.clone()),
            stderr: Box::new(stderr.clone()),
        };
        (streams, stdout, stderr)
    }
}

impl std::fmt::Debug for Streams {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Streams")
    }
}

/// Output kept in memory.
#[derive(Debug, Clone, Default)]
pub struct Captured(Arc<Mutex<Vec<u8>>>);

impl Captured {
    /// Takes what has come so far.
    #[must_use]
    pub fn take(&self) -> Vec<u8> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Write for Captured {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
