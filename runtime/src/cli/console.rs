//! Pseudo-terminals of the host whose master goes to an engine by `--console-socket`.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, bail};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, ptsname, unlockpt};

/// A terminal: the master for the engine, the slave for the container.
pub struct Console {
    socket: UnixStream,
    master: OwnedFd,
    /// What stands for the container's own terminal.
    pub slave: OwnedFd,
}

/// Checks that a terminal and a socket come together, as runc does, and opens one.
///
/// # Errors
/// When they do not, or the socket cannot be connected to.
pub fn open(socket: Option<&Path>, terminal: bool) -> anyhow::Result<Option<Console>> {
    match (socket, terminal) {
        (None, false) => Ok(None),
        (None, true) => bail!("cannot allocate tty if katavm will detach without setting console socket"),
        (Some(_), false) => bail!("cannot use console socket if katavm will not detach or allocate tty"),
        (Some(path), true) => {
            let socket = UnixStream::connect(path)
                .with_context(|| format!("cannot connect to the console socket {}", path.display()))?;
            Ok(Some(Console::over(socket).context("cannot open a pseudo-terminal")?))
        }
    }
}

impl Console {
    fn over(socket: UnixStream) -> rustix::io::Result<Self> {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let slave = ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        Ok(Self { socket, master, slave })
    }

    /// Sends the master away, with its name as runc sends it.
    ///
    /// # Errors
    /// Those of sendmsg(2).
    pub fn send(self) -> anyhow::Result<()> {
        let name = ptsname(&self.master, Vec::new()).context("cannot name the pseudo-terminal")?;
        let fds = [self.master.as_fd()];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        let bytes = [std::io::IoSlice::new(name.to_bytes())];
        let sent = sendmsg(&self.socket, &bytes, &mut ancillary, SendFlags::NOSIGNAL);
        sent.context("cannot send the terminal to the console socket")?;
        Ok(())
    }
}
