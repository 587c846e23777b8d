//! State structs are no decoration: a guest under load is serialised, torn down, and rebuilt from the bytes, in this
//! process and in another one.

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use anyhow::{Context as _, Result, ensure};
use katavm_vmm::ExitReason;

use super::agent::rootfs;
use super::guest::{Conversation, Guest, Running};
use super::rebuild::{self, Elsewhere, Saved};
use super::{Context, Table, Verdict};

/// The table.
pub const CASES: Table = (
    "snapshot",
    &[
        ("a_busy_guest_is_rebuilt_from_bytes", here),
        ("a_busy_guest_is_rebuilt_in_another_process", elsewhere),
        ("a_running_guest_is_not_saved", running),
    ],
);

/// Writes files, reads them back, and tells each checksum, until the host says that it is enough.
const WORK: &str = "i=0; while [ ! -e /stop ]; do i=$((i+1)); head -c 100000 /dev/urandom > /f$i; \
                    a=$(sha256sum < /f$i); b=$(cat /f$i | sha256sum); [ \"$a\" = \"$b\" ] || exit 9; echo $i $a; done; exit 5";

/// Bytes that go into a container and come back: each of them counts.
struct Echo {
    running: Running,
    sent: Vec<u8>,
    back: Arc<AtomicUsize>,
    collector: thread::JoinHandle<std::io::Result<Vec<u8>>>,
    feeder: thread::JoinHandle<std::io::Result<()>>,
}

/// Bytes for an [`Echo`].
const ECHO: usize = 16 << 20;

impl Echo {
    fn start(guest: &Guest, root: &Path) -> Result<Self> {
        let (running, mut stdin) = guest.start_with_input("echo", root, &["/bin/cat"])?;
        let sent: Vec<u8> = (0..ECHO as u32 / 4).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        let data = sent.clone();
        let feeder = thread::spawn(move || {
            stdin.write_all(&data)?;
            stdin.shutdown(Shutdown::Write)
        });
        let back = Arc::new(AtomicUsize::new(0));
        let (mut stdout, count) = (running.output()?, Arc::clone(&back));
        let collector = thread::spawn(move || {
            let (mut all, mut piece) = (Vec::new(), vec![0; 64 << 10]);
            loop {
                let len = stdout.read(&mut piece)?;
                if len == 0 {
                    return Ok(all);
                }
                all.extend_from_slice(&piece[..len]);
                count.store(all.len(), Ordering::Relaxed);
            }
        });
        Ok(Self { running, sent, back, collector, feeder })
    }

    /// Waits until so much is back, or both streams have ended.
    fn wait_for(&self, bytes: usize) {
        while self.back.load(Ordering::Relaxed) < bytes && !self.collector.is_finished() {
            // No event tells of a counter.
            thread::sleep(std::time::Duration::from_millis(5));
        }
    }

    /// Bytes on their way, or not sent yet.
    fn missing(&self) -> usize {
        self.sent.len() - self.back.load(Ordering::Relaxed)
    }

    fn judge(self, agent: &impl Conversation) -> Result<()> {
        let joined = |_| anyhow::anyhow!("a thread panicked");
        self.feeder.join().map_err(joined)?.context("feeding it")?;
        let back = self.collector.join().map_err(joined)?.context("reading from it")?;
        ensure!(back == self.sent, "{} of {} bytes came back, or other ones", back.len(), self.sent.len());
        ensure!(agent.exit(&self.running)?.status == 0, "it failed");
        Ok(())
    }
}

/// Both loads in one guest, on root file systems of their own.
struct Busy {
    roots: [(&'static str, PathBuf); 2],
    files: Running,
    echo: Echo,
}

impl Busy {
    fn start(context: &Context, guest: &Guest) -> Result<Self> {
        guest.sandbox()?;
        let (echo_root, files_root) = (rootfs(context)?, context.scratch().join("files"));
        let copied = Command::new("cp").arg("-a").args([&echo_root, &files_root]).status()?;
        ensure!(copied.success(), "cp failed");
        let mut files = guest.start("files", &files_root, &["/bin/sh", "-c", WORK])?;
        files.read_until(b"1 ")?;
        let echo = Echo::start(guest, &echo_root)?;
        Ok(Self { roots: [("echo", echo_root), ("files", files_root)], files, echo })
    }

    fn exports(&self) -> Vec<(&str, &Path)> {
        self.roots.iter().map(|(name, root)| (*name, root.as_path())).collect()
    }

    /// Waits for both to end, and for everything to be right.
    fn judge(mut self, agent: &impl Conversation) -> Result<()> {
        self.echo.judge(agent)?;
        self.files.read_more()?;
        fs::write(self.roots[1].1.join("stop"), "")?;
        let stdout = self.files.rest()?;
        let exit = agent.exit(&self.files)?;
        ensure!(exit.status == 5, "status {}; output:\n{}", exit.status, String::from_utf8_lossy(&stdout));
        let lines: Vec<&str> = std::str::from_utf8(&stdout)?.lines().collect();
        ensure!(lines.len() > 2, "{} lines", lines.len());
        for (line, number) in lines.iter().zip(1..) {
            let sum = line.strip_prefix(&format!("{number} ")).context("a line is missing")?;
            let sum = sum.split_whitespace().next().context("no checksum")?;
            let host = Command::new("sha256sum").arg(self.roots[1].1.join(format!("f{number}"))).output()?.stdout;
            ensure!(String::from_utf8_lossy(&host).starts_with(sum), "file {number} differs");
        }
        Ok(())
    }
}

/// Twice, each time in the middle of everything.
fn here(context: &Context) -> Result<Verdict> {
    let mut guest = Guest::boot(context, |_| ())?;
    let mut busy = Busy::start(context, &guest)?;
    for part in 1..=2 {
        busy.echo.wait_for(part * ECHO / 4);
        guest = rebuild::here(context, guest, &busy.exports(), || Ok(Vec::new()))?;
        ensure!(busy.echo.missing() > 0, "no stream was busy any more");
        busy.files.read_more()?;
    }
    busy.judge(&guest)?;
    guest.end()?;
    Ok(Verdict::Passed)
}

/// The machine moves, and the host's ends of its streams stay: the other process gets the device's ends.
fn elsewhere(context: &Context) -> Result<Verdict> {
    let guest = Guest::boot(context, |_| ())?;
    let busy = Busy::start(context, &guest)?;
    busy.echo.wait_for(ECHO / 5);
    let saved = Saved::take(context, guest)?;
    ensure!(busy.echo.missing() > 0, "no stream was busy any more");
    let moved = Elsewhere::start(saved, &busy.exports())?;
    busy.judge(&moved)?;
    let (reason, exits) = moved.end()?;
    // As in `Guest::end`: the lab's emulated SVM refuses the agent's I/O port after a restore.
    let expected = [ExitReason::Orderly, ExitReason::Reset].iter().any(|expected| reason == format!("{expected:?}"));
    ensure!(expected, "ended because {reason}");
    ensure!(exits > 100, "KVM counted {exits} exits there: no guest ran");
    Ok(Verdict::Passed)
}

fn running(context: &Context) -> Result<Verdict> {
    let guest = Guest::boot(context, |_| ())?;
    let error = guest.vm.save().err().context("it was saved")?;
    ensure!(error.to_string().contains("paused first"), "{error}");
    guest.end()?;
    Ok(Verdict::Passed)
}
