//! Terminals: taking over the master that the helper opened inside the container, and its size and owner.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};
use nix::unistd::{Gid, Uid, fchown};

/// The socket on which a helper hands over a terminal's master.
pub struct ConsoleSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl ConsoleSocket {
    /// Listens at `directory/console`.
    ///
    /// # Errors
    /// Those of bind(2).
    pub fn listen(directory: &Path) -> io::Result<Self> {
        let path = directory.join("console");
        let listener = UnixListener::bind(&path)?;
        // The helper has sent the master by the time that it ends, and is asked for it only then.
        listener.set_nonblocking(true)?;
        Ok(Self { listener, path })
    }

    /// Where the helper finds it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the master from the helper, which has ended, so this does not wait.
    ///
    /// # Errors
    /// Those of accept(2) and recvmsg(2); `InvalidData` when no descriptor came.
    pub fn master(&self) -> io::Result<OwnedFd> {
        let (connection, _) = self.listener.accept()?;
        let mut name = [0; 64];
        let mut parts = [IoSliceMut::new(&mut name)];
        let mut space = nix::cmsg_space!(RawFd);
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<UnixAddr>(connection.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = control
                && let Some(fd) = fds.first()
            {
                // SAFETY: the kernel just installed this descriptor for us, and nothing else owns it.
                return Ok(unsafe { OwnedFd::from_raw_fd(*fd) });
            }
        }
        Err(io::Error::new(io::ErrorKind::InvalidData, "the helper sent no terminal"))
    }
}

/// Sets a terminal's size in characters (ioctl_tty(2): TIOCSWINSZ); the foreground process group gets SIGWINCH.
///
/// # Errors
/// Those of the ioctl.
pub fn resize(master: &OwnedFd, rows: u32, columns: u32) -> io::Result<()> {
    let limit = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
    let size = libc::winsize { ws_row: limit(rows), ws_col: limit(columns), ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads a winsize, and `size` is one.
    Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &size) })?;
    Ok(())
}

/// Gives the terminal to the process' user, so that it can open it by name.
///
/// # Errors
/// Those of ioctl_tty(2): TIOCGPTPEER and of fchown(2).
pub fn set_owner(master: &OwnedFd, uid: u32) -> io::Result<()> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes open flags, not a pointer.
    let fd = Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) })?;
    // SAFETY: the ioctl just made this descriptor, and nothing else owns it.
    let slave = unsafe { OwnedFd::from_raw_fd(fd) };
    fchown(&slave, Some(Uid::from_raw(uid)), None::<Gid>)?;
    Ok(())
}
