//! Signals that are sent to this process, most of them meant for a container.
//!
//! They are blocked in every thread and read from a descriptor (signalfd(2)), so none interrupts anything.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// What is passed on, as runc does: everything but what cannot be caught (SIGKILL, SIGSTOP), what tells this process
/// about itself (SIGCHLD, SIGPIPE, SIGURG, and the faults SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS), job
/// control, and SIGRTMIN, which kicks vCPUs. Real-time signals above that one are passed on as well.
const FORWARDED: [i32; 16] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGABRT,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGALRM,
    libc::SIGTERM,
    libc::SIGSTKFLT,
    libc::SIGCONT,
    libc::SIGXCPU,
    libc::SIGXFSZ,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGIO,
    libc::SIGPWR,
];

/// Why signals cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("cannot receive signals: {0}")]
pub struct SignalsError(#[from] io::Error);

impl From<SignalsError> for io::Error {
    fn from(error: SignalsError) -> Self {
        Self::new(error.0.kind(), error)
    }
}

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// SIGWINCH: the terminal has another size.
    Resized,
    /// To be passed on, by its number.
    Forward(i32),
}

impl Received {
    fn of(number: u32) -> Self {
        let number = i32::try_from(number).unwrap_or_default();
        if number == libc::SIGWINCH { Self::Resized } else { Self::Forward(number) }
    }

    /// The number, if by custom the signal ends a process that nobody waits for: before the container runs, and
    /// after it has ended, it ends katavm.
    #[must_use]
    pub fn ends(self) -> Option<i32> {
        match self {
            Self::Forward(signal @ (libc::SIGHUP | libc::SIGINT | libc::SIGQUIT | libc::SIGTERM)) => Some(signal),
            _ => None,
        }
    }
}

/// Signals that wait to be taken.
#[derive(Debug)]
pub struct Signals {
    fd: SignalFd,
}

impl Signals {
    /// Blocks those that are meant for a container, or tell of its terminal, in the calling thread and in all threads that it
    /// makes from now on.
    ///
    /// # Errors
    /// Those of sigprocmask(2) and signalfd(2).
    pub fn block() -> Result<Self, SignalsError> {
        Self::block_all(&mask())
    }

    /// The same with those of `mask`.
    ///
    /// # Errors
    /// Those of sigprocmask(2) and signalfd(2).
    pub fn block_all(mask: &SigSet) -> Result<Self, SignalsError> {
        sigprocmask(SigmaskHow::SIG_BLOCK, Some(mask), None).map_err(io::Error::from)?;
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        let fd = SignalFd::with_flags(mask, flags).map_err(io::Error::from)?;
        Ok(Self { fd })
    }

    /// The next one that has arrived already.
    ///
    /// # Errors
    /// Those of reading the descriptor.
    pub fn take(&self) -> io::Result<Option<Received>> {
        Ok(self.fd.read_signal()?.map(|info| Received::of(info.ssi_signo)))
    }

    /// Makes them awaitable on the current tokio runtime.
    ///
    /// # Errors
    /// Those of epoll_ctl(2).
    pub fn listen(self) -> Result<Listening, SignalsError> {
        // SAFETY: the descriptor inside is the same open one until it is dropped, and `AsyncFd` owns it from here on.
        let fd = unsafe { AsyncFd::register_with_interest(self, Interest::READABLE) };
        let fd = fd.map_err(io::Error::from)?;
        Ok(Listening { fd })
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// Signals that can be awaited.
pub struct Listening {
    fd: AsyncFd<Signals>,
}

impl Listening {
    /// The next one. Nothing is lost when the future is dropped.
    ///
    /// # Errors
    /// Those of reading the descriptor.
    pub async fn next(&self) -> io::Result<Received> {
        loop {
            let mut guard = self.fd.readable().await?;
            let read = guard.try_io(|signals| signals.get_ref().take()?.ok_or(io::ErrorKind::WouldBlock.into()));
            if let Ok(received) = read {
                return received;
            }
        }
    }
}

fn mask() -> SigSet {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set it is given.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: it was just initialised.
    let mut set: libc::sigset_t = unsafe { set.assume_init() };
    let realtime = libc::SIGRTMIN() + 1..=libc::SIGRTMAX();
    for number in FORWARDED.into_iter().chain([libc::SIGWINCH]).chain(realtime) {
        // SAFETY: the set is initialised, and sigaddset refuses numbers that are none.
        unsafe { libc::sigaddset(&raw mut set, number) };
    }
    // SAFETY: a set that the C library made.
    unsafe { SigSet::from_sigset_t_unchecked(set) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_arrive_in_the_order_of_their_kind() {
        // A thread's own mask and a signal to that thread: the test harness is left alone.
        std::thread::spawn(|| {
            let signals = Signals::block().unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let send = |number| {
                // SAFETY: pthread_kill(3) to the calling thread, which blocks the signal.
                assert_eq!(unsafe { libc::pthread_kill(libc::pthread_self(), number) }, 0);
            };
            send(libc::SIGTERM);
            runtime.block_on(async {
                let signals = signals.listen().unwrap();
                assert_eq!(signals.next().await.unwrap(), Received::Forward(libc::SIGTERM));
                send(libc::SIGWINCH);
                assert_eq!(signals.next().await.unwrap(), Received::Resized);
                send(libc::SIGRTMIN() + 3);
                assert_eq!(signals.next().await.unwrap(), Received::Forward(libc::SIGRTMIN() + 3));
            });
        })
        .join()
        .unwrap();
    }

    #[test]
    fn what_kicks_a_vcpu_or_tells_of_a_fault_is_left_alone() {
        let mask = mask();
        for number in [libc::SIGCHLD, libc::SIGPIPE, libc::SIGURG, libc::SIGSEGV, libc::SIGTSTP, libc::SIGRTMIN()] {
            // SAFETY: sigismember only reads the set.
            assert_eq!(unsafe { libc::sigismember(mask.as_ref(), number) }, 0, "{number}");
        }
    }

    #[test]
    fn a_container_that_does_not_run_cannot_take_an_interrupt() {
        assert_eq!(Received::Forward(libc::SIGINT).ends(), Some(libc::SIGINT));
        assert_eq!(Received::Forward(libc::SIGUSR1).ends(), None);
        assert_eq!(Received::Resized.ends(), None);
    }
}
