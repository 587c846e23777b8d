//! Making a process by a helper: spawn it, await its end, read its report.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use tokio::sync::oneshot;

use crate::error::Error;
use crate::helper::{Report, Task};
use crate::reaper::{Birth, Reaper};
use crate::streams::Pipes;

/// Runs a helper with the process' standard streams; the pid of the process that it made.
///
/// # Errors
/// What the helper reported; the process does not exist then.
pub async fn launch(
    reaper: &Reaper,
    birth: &Birth<'_>,
    directory: &Path,
    task: Task,
    pipes: Pipes,
) -> Result<i32, Error> {
    let stream = |end: Option<OwnedFd>| end.map_or_else(Stdio::null, Stdio::from);
    let child = Command::new("/proc/self/exe")
        .arg0(task.name())
        .arg(task.name())
        .arg(directory)
        .env_clear()
        // Where the initramfs has newuidmap and newgidmap.
        .env("PATH", "/bin")
        .stdin(stream(pipes.stdin))
        .stdout(stream(pipes.stdout))
        .stderr(stream(pipes.stderr))
        .spawn()
        .map_err(|error| Error::io("cannot execute the agent's helper", error))?;
    let pid = i32::try_from(child.id()).map_err(|_| Error::Internal("the helper's pid is out of range".into()))?;
    let (ended, end) = oneshot::channel();
    reaper.await_end(birth, pid, move |end| {
        // Nobody listens any more when the request was given up.
        let _ = ended.send(end);
    });
    let end = end.await.map_err(|_| Error::Internal("nobody reaped the helper".into()))?;
    match Report::read(directory) {
        Ok(Report::Made { pid }) if end.status == 0 => Ok(pid),
        Ok(Report::Failed { error }) => Err(error),
        Ok(Report::Made { .. } | Report::Logged(_)) | Err(_) => {
            let error = io::Error::other(format!("status {}", end.status));
            Err(Error::io("the agent's helper ended without a report", error))
        }
    }
}
