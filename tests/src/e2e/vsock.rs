//! A thousand vsock connections of a real guest at once.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use katavm_devices::vsock::VsockListener;
use rustix::process::{Resource, Rlimit, setrlimit};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::guest::{Guest, Running};
use super::run::debian;
use super::{Context, Table, Verdict};

/// For `katavm-e2e --long`.
pub const LONG: Table = (
    "vsock",
    &[
        ("a_thousand_connections_lose_nothing", echoes),
        ("a_thousand_streams_get_the_same", fairness),
        ("a_crowd_is_refused_and_harms_nobody", crowd),
    ],
);

/// What runs in the container.
const PROGRAM: &str = include_str!("vsock.py");
const PORT: u32 = 4711;
const COUNT: usize = 1000;
/// Of so many connections one is closed at once by the host (1), and one is not read before all others have ended (2).
const EVERY: usize = 100;
/// Bytes that go to the host and back.
const LENGTH: usize = 32 << 10;
/// More than a connection and its socket have room for.
const LONG_LENGTH: usize = 1 << 20;
/// Bytes that all streams together carry.
const TOTAL: u64 = 64 << 20;
const PATIENCE: Duration = Duration::from_secs(120);
/// Connections of a guest, those of its agent included (`docs/vsock.md`).
const MOST: u64 = 4096;
/// Of a thread that reads or writes one stream.
const STACK: usize = 128 << 10;

/// A guest in which the program does `mode` with the host's port and `numbers`, and who listens there.
fn start(context: &Context, debian: &Path, mode: &str, numbers: &[usize]) -> Result<(Guest, VsockListener, Running)> {
    // Two ends of each connection are this process' own.
    let limit = Rlimit { current: Some(4 * MOST), maximum: Some(4 * MOST) };
    setrlimit(Resource::Nofile, limit).context("cannot have many files open")?;
    let guest = Guest::boot(context, |config| config.memory_mib = 512)?;
    guest.sandbox()?;
    let listener = guest.sockets.listen(PORT)?;
    let numbers: Vec<_> = numbers.iter().map(usize::to_string).collect();
    let port = PORT.to_string();
    let mut args = vec!["/usr/bin/python3", "-c", PROGRAM, mode, &port];
    args.extend(numbers.iter().map(String::as_str));
    let running = guest.start_privileged("many", &debian.join("rootfs"), &args)?;
    Ok((guest, listener, running))
}

/// What the program has told at its good end.
fn told<T: DeserializeOwned>(running: Running, guest: &Guest) -> Result<T> {
    let (output, exit) = running.wait(guest)?;
    ensure!(exit.status == 0, "status {}", exit.status);
    serde_json::from_slice(&output).context("no report")
}

/// The next connection, and its index.
fn accept(listener: &VsockListener) -> Result<(UnixStream, usize)> {
    let mut stream = listener.accept(Some(PATIENCE))?;
    let mut index = [0; 4];
    stream.read_exact(&mut index)?;
    Ok((stream, u32::from_be_bytes(index) as usize))
}

fn serve(work: impl FnOnce() -> Result<()> + Send + 'static) -> Result<JoinHandle<Result<()>>> {
    Ok(thread::Builder::new().stack_size(STACK).spawn(work)?)
}

fn join(threads: Vec<JoinHandle<Result<()>>>) -> Result<()> {
    threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?)
}

/// Reads all that comes, then sends it back.
fn echo(mut stream: UnixStream, index: usize) -> Result<()> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    let length = if index % EVERY == 2 { LONG_LENGTH } else { LENGTH };
    ensure!(bytes.len() == length, "{} bytes of {length} came on connection {index}", bytes.len());
    stream.write_all(&bytes)?;
    Ok(stream.shutdown(Shutdown::Write)?)
}

fn echoes(context: &Context) -> Result<Verdict> {
    let Some(debian) = debian::bundle() else { return Ok(debian::no_bundle()) };
    let numbers = [COUNT, LENGTH, LONG_LENGTH, EVERY];
    let (guest, listener, running) = start(context, &debian, "echo", &numbers)?;
    let (mut at_once, mut stalled) = (Vec::new(), Vec::new());
    for _ in 0..COUNT {
        let (stream, index) = accept(&listener)?;
        match index % EVERY {
            1 => drop(stream),
            2 => stalled.push((stream, index)),
            _ => at_once.push(serve(move || echo(stream, index))?),
        }
    }
    join(at_once)?;
    // They were in nobody's way.
    let stalled = stalled.into_iter().map(|(stream, index)| serve(move || echo(stream, index)));
    join(stalled.collect::<Result<_>>()?)?;
    let outcomes: BTreeMap<String, Vec<usize>> = told(running, &guest)?;
    let (broken, whole): (Vec<_>, Vec<_>) = (0..COUNT).partition(|index| index % EVERY == 1);
    let expected = BTreeMap::from([("broken".to_owned(), broken), ("whole".to_owned(), whole)]);
    ensure!(outcomes == expected, "{outcomes:?}");
    guest.end()?;
    Ok(Verdict::Passed)
}

/// How many bytes streams had got when all of them together had enough.
#[derive(Debug, Deserialize)]
struct Got {
    least: u64,
    most: u64,
}

fn fairness(context: &Context) -> Result<Verdict> {
    let Some(debian) = debian::bundle() else { return Ok(debian::no_bundle()) };
    let (guest, listener, running) = start(context, &debian, "sink", &[COUNT, TOTAL as usize])?;
    let together = Arc::new(Barrier::new(COUNT));
    let mut threads = Vec::new();
    for _ in 0..COUNT {
        let (mut stream, _) = accept(&listener)?;
        let together = Arc::clone(&together);
        threads.push(serve(move || {
            together.wait();
            let piece = [7; 16 << 10];
            // Until the guest has had enough.
            while stream.write_all(&piece).is_ok() {}
            Ok(())
        })?);
    }
    let got: Got = told(running, &guest)?;
    join(threads)?;
    println!("  {} to {} KiB of each stream", got.least >> 10, got.most >> 10);
    let mean = TOTAL / COUNT as u64;
    ensure!(got.least >= mean / 2 && got.most <= mean * 2, "{got:?}, in the mean {mean}");
    guest.end()?;
    Ok(Verdict::Passed)
}

fn crowd(context: &Context) -> Result<Verdict> {
    const TRIED: u64 = 5000;
    let Some(debian) = debian::bundle() else { return Ok(debian::no_bundle()) };
    let (guest, listener, running) = start(context, &debian, "crowd", &[TRIED as usize])?;
    let over = Arc::new(AtomicBool::new(false));
    let accepting = thread::spawn({
        let over = Arc::clone(&over);
        move || {
            let mut open = Vec::new();
            loop {
                match listener.accept(Some(Duration::from_millis(100))) {
                    Ok(stream) => open.push(stream),
                    Err(_) if over.load(Ordering::Relaxed) => return open.len() as u64,
                    Err(_) => {}
                }
            }
        }
    });
    let found = told::<Value>(running, &guest);
    // The thread ends also where the program did not.
    over.store(true, Ordering::Relaxed);
    let accepted = accepting.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?;
    let found = found?;
    println!("  {found}");
    let opened = found["opened"].as_u64().context("no number")?;
    ensure!((MOST - 10..MOST).contains(&opened), "{found}");
    ensure!(found["refused"] == json!(TRIED - opened) && accepted == opened + 1, "{found}, {accepted} were accepted");
    guest.end()?;
    Ok(Verdict::Passed)
}
