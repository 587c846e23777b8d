//! A pseudo-terminal with `katavm` on it, and the hands and eyes of who sits before it.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;

use anyhow::{Context as _, Result, bail};
use nix::sys::termios::{SetArg, SpecialCharacterIndices, Termios, tcgetattr, tcsetattr};
use rustix::process::Pid;
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use super::super::Context;
use super::katavm::{LIMIT, Running};

/// A pseudo-terminal of 24 rows and 80 columns.
pub struct Pty {
    master: File,
    slave: OwnedFd,
}

impl Pty {
    /// A new one; its mode differs from every default, so that "restored" means this very mode.
    pub fn open() -> Result<Self> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let slave = ioctl_tiocgptpeer(&master, flags)?;
        let mut mode = tcgetattr(&slave)?;
        mode.control_chars[SpecialCharacterIndices::VERASE as usize] = 8;
        mode.control_chars[SpecialCharacterIndices::VMIN as usize] = 3;
        tcsetattr(&slave, SetArg::TCSANOW, &mode)?;
        let pty = Self { master: master.into(), slave };
        pty.resize(24, 80)?;
        Ok(pty)
    }

    /// The terminal's mode now.
    pub fn mode(&self) -> Result<Termios> {
        Ok(tcgetattr(&self.slave)?)
    }

    /// Gives the terminal another size, as a window that is drawn larger does.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        Ok(tcsetwinsize(&self.master, Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 })?)
    }
}

/// `katavm` on a pseudo-terminal.
pub struct Session<'a> {
    context: &'a Context,
    pty: Pty,
    katavm: Running,
    screen: Receiver<Vec<u8>>,
    /// Everything that came, and how much of it was looked at.
    seen: Vec<u8>,
    looked_at: usize,
}

/// How a session has ended.
pub struct Ended {
    /// The exit status of `katavm`.
    pub status: ExitStatus,
    /// All bytes that came to the terminal.
    pub screen: Vec<u8>,
    /// The terminal's mode afterwards.
    pub mode: Termios,
}

impl<'a> Session<'a> {
    /// Starts `katavm run OPTIONS BUNDLE` with the terminal as all three streams and as its controlling terminal.
    pub fn start(context: &'a Context, pty: Pty, options: &[&str], bundle: &Path) -> Result<Self> {
        let stream = || pty.slave.as_fd().try_clone_to_owned();
        let mut command = Command::new("setsid");
        command.args(["--ctty", "katavm", "run"]).args(options).arg(bundle);
        command.stdin(stream()?).stdout(stream()?).stderr(stream()?);
        let katavm = Running::start(&mut command)?;
        let mut master = pty.master.try_clone()?;
        let (sender, screen) = channel();
        thread::spawn(move || {
            let mut buffer = [0; 65536];
            // A master whose terminal nobody has open any more gives EIO: that is the end.
            while let Ok(len @ 1..) = master.read(&mut buffer) {
                if sender.send(buffer[..len].to_vec()).is_err() {
                    break;
                }
            }
        });
        Ok(Self { context, pty, katavm, screen, seen: Vec::new(), looked_at: 0 })
    }

    /// The terminal.
    pub fn pty(&self) -> &Pty {
        &self.pty
    }

    /// The process of `katavm`.
    pub fn pid(&self) -> Pid {
        self.katavm.pid()
    }

    /// Kills `katavm` without a chance to tidy up.
    pub fn kill(&mut self) -> Result<()> {
        self.katavm.kill()
    }

    /// Its children: the watcher and the stand-in.
    pub fn children(&self) -> Result<Vec<Pid>> {
        let pid = self.pid().as_raw_nonzero();
        let list = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
        Ok(list.split_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect())
    }

    /// Presses keys.
    pub fn press(&mut self, keys: impl AsRef<[u8]>) -> Result<()> {
        Ok(self.pty.master.write_all(keys.as_ref())?)
    }

    /// Waits until `words` have come behind what was looked at before.
    pub fn wait_for(&mut self, words: impl AsRef<[u8]>) -> Result<()> {
        let words = words.as_ref();
        loop {
            let rest = self.seen.get(self.looked_at..).unwrap_or_default();
            if let Some(at) = rest.windows(words.len()).position(|part| part == words) {
                self.looked_at += at + words.len();
                return Ok(());
            }
            match self.screen.recv_timeout(LIMIT) {
                Ok(bytes) => self.seen.extend(bytes),
                Err(RecvTimeoutError::Timeout) => bail!("{:?} did not come; {}", text(words), self.tell()),
                Err(RecvTimeoutError::Disconnected) => bail!("closed before {:?} came; {}", text(words), self.tell()),
            }
        }
    }

    /// Waits for the end of `katavm` and takes everything from the terminal that is still on its way.
    pub fn end(mut self) -> Result<Ended> {
        let status = self.katavm.wait().with_context(|| self.tell())?;
        let mode = self.pty.mode()?;
        let Self { context, pty: Pty { master: _master, slave }, screen, mut seen, .. } = self;
        drop(slave);
        loop {
            match screen.recv_timeout(LIMIT) {
                Ok(bytes) => seen.extend(bytes),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => bail!("somebody still has the terminal open"),
            }
        }
        context.note("screen", seen.clone());
        Ok(Ended { status, screen: seen, mode })
    }

    fn tell(&self) -> String {
        format!("the screen:\n{}", text(&self.seen))
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).escape_debug().to_string()
}
