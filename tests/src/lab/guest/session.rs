//! The job's command, run and reported from inside the lab.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::wait::{WaitStatus, wait};

use super::HOME;
use super::command::{self, Running};
use super::pumps::{self, Drain};
use crate::lab::job::{Access, Job};
use crate::lab::wire::{self, FromLab, PORTS, ToLab};

/// How often the machine says that it lives.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// Runs the job and reports its end. Never returns: the outside ends the machine.
pub fn run() -> ! {
    let result = try_run();
    match result {
        Ok(()) => wait_for_the_end(),
        Err(error) => fail(&error),
    }
}

/// Reports that the machine could not be set up.
pub fn fail(error: &anyhow::Error) -> ! {
    let reason = format!("{error:#}");
    println!("katavm-lab: {reason}");
    if let Ok(mut control) = open_port(PORTS[0]) {
        // Without a control port the console has said it.
        let _ = wire::send(&mut control, &FromLab::Failed { reason });
    }
    wait_for_the_end()
}

fn wait_for_the_end() -> ! {
    loop {
        thread::park();
    }
}

fn try_run() -> Result<()> {
    let job: Job =
        serde_json::from_slice(&fs::read(Path::new(HOME).join("job.json"))?).context("cannot read the job")?;
    if job.systemd {
        wait_for_systemd()?;
    }
    let control = Arc::new(Mutex::new(open_port(PORTS[0])?));
    let (stdin, stdout, stderr) = (open_port(PORTS[1])?, open_port(PORTS[2])?, open_port(PORTS[3])?);
    send(&control, &FromLab::Started { uptime_ms: uptime_ms() })?;
    if job.heartbeat {
        start_heartbeat(Arc::clone(&control))?;
    }
    let code = match command::start(&job) {
        Ok(running) => {
            let sizes = control.lock().unwrap_or_else(PoisonError::into_inner).try_clone()?;
            attend(running, [sizes, stdin, stdout, stderr], job.systemd)?
        }
        Err(error) => report_unstartable(&error, stdout, stderr)?,
    };
    for share in job.shares.iter().filter(|share| share.access == Access::Writable) {
        // What the command wrote must be outside before the machine is ended.
        nix::unistd::syncfs(File::open(&share.path)?).context("cannot write back the output folder")?;
    }
    send(&control, &FromLab::Exited { code })
}

/// As a shell says it: 127 for a command that is not there, 126 for one that cannot be run.
fn report_unstartable(error: &anyhow::Error, mut stdout: File, mut stderr: File) -> Result<i32> {
    wire::write_frame(&mut stderr, format!("katavm-lab: {error:#}\n").as_bytes())?;
    for port in [&mut stdout, &mut stderr] {
        wire::write_frame(port, &[])?;
    }
    let missing = error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|cause| cause.kind() == io::ErrorKind::NotFound);
    Ok(if missing { 127 } else { 126 })
}

fn attend(mut running: Running, [sizes, stdin, stdout, stderr]: [File; 4], systemd: bool) -> Result<i32> {
    let terminal = running.terminal.take();
    let on_terminal = terminal.is_some();
    if let Some(terminal) = terminal {
        follow_size(terminal, sizes)?;
    }
    pumps::feed(stdin, running.stdin, move |mut target| {
        if on_terminal {
            // Control-D: a terminal has no other end of file.
            let _ = target.write_all(&[4]);
        }
    })?;
    let mut drains = vec![Drain::start(running.stdout, stdout)?];
    match running.stderr {
        Some(source) => drains.push(Drain::start(source, stderr)?),
        None => wire::write_frame(&mut &stderr, &[])?,
    }
    let status = if systemd { running.child.wait()? } else { reap_until(running.child.id())? };
    drains.into_iter().for_each(Drain::finish);
    Ok(command::exit_code(status))
}

/// PID 1 also reaps what others left behind.
fn reap_until(pid: u32) -> Result<ExitStatus> {
    loop {
        match wait().context("cannot wait for the command")? {
            WaitStatus::Exited(ended, code) if ended.as_raw().cast_unsigned() == pid => {
                return Ok(ExitStatus::from_raw(code << 8));
            }
            WaitStatus::Signaled(ended, signal, _) if ended.as_raw().cast_unsigned() == pid => {
                return Ok(ExitStatus::from_raw(signal as i32));
            }
            _ => {}
        }
    }
}

/// Sizes come on the control port.
fn follow_size(terminal: File, mut control: File) -> Result<()> {
    thread::Builder::new().name("size".into()).spawn(move || {
        while let Ok(Some(ToLab::Resize { rows, columns })) = wire::receive(&mut control) {
            command::resize(&terminal, rows, columns);
        }
    })?;
    Ok(())
}

fn start_heartbeat(control: Arc<Mutex<File>>) -> Result<()> {
    thread::Builder::new().name("heartbeat".into()).spawn(move || {
        while send(&control, &FromLab::Alive).is_ok() {
            thread::sleep(HEARTBEAT);
        }
    })?;
    Ok(())
}

fn send(control: &Mutex<File>, message: &FromLab) -> Result<()> {
    wire::send(&mut *control.lock().unwrap_or_else(PoisonError::into_inner), message).context("cannot tell the outside")
}

/// Opens the virtio-serial port of this name (there is no udev to make links).
fn open_port(name: &str) -> Result<File> {
    let class = Path::new("/sys/class/virtio-ports");
    for entry in fs::read_dir(class).context("the machine has no virtio-serial ports")? {
        let entry = entry?;
        if fs::read_to_string(entry.path().join("name")).is_ok_and(|found| found.trim_end() == name) {
            let path = Path::new("/dev").join(entry.file_name());
            return File::options()
                .read(true)
                .write(true)
                .open(&path)
                .with_context(|| format!("cannot open {}", path.display()));
        }
    }
    anyhow::bail!("the machine has no port {name}")
}

fn uptime_ms() -> u64 {
    let uptime = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds: f64 = uptime.split_whitespace().next().and_then(|text| text.parse().ok()).unwrap_or_default();
    Duration::try_from_secs_f64(seconds).unwrap_or_default().as_millis().try_into().unwrap_or(u64::MAX)
}

/// Waits until all of systemd's own jobs are done, whatever their result.
fn wait_for_systemd() -> Result<()> {
    Command::new("systemctl")
        .args(["is-system-running", "--wait"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .context("cannot wait for systemd")?;
    Ok(())
}
