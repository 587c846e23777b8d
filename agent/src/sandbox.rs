//! What a fresh guest is told about itself: name, clock, randomness, shared files.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;

use katavm_protocol::agent::CreateSandboxRequest;
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};

use crate::error::Error;

/// Where the host's shared directory is mounted.
pub const SHARED: &str = "/run/katavm/shared";

/// Applies the request.
///
/// # Errors
/// Which part could not be done.
pub fn create(request: &CreateSandboxRequest) -> Result<(), Error> {
    if request.realtime_ns != 0 {
        let seconds = i64::try_from(request.realtime_ns / 1_000_000_000).unwrap_or(i64::MAX);
        let time = TimeSpec::new(seconds, (request.realtime_ns % 1_000_000_000) as i64);
        clock_settime(ClockId::CLOCK_REALTIME, time)
            .map_err(|error| Error::io("cannot set the clock", error.into()))?;
    }
    if !request.entropy.is_empty() {
        add_entropy(&request.entropy).map_err(|error| Error::io("cannot add entropy", error))?;
    }
    if !request.hostname.is_empty() {
        nix::unistd::sethostname(&request.hostname).map_err(|error| match error {
            Errno::EINVAL => Error::Invalid(format!("host name {:?}: at most 64 bytes", request.hostname)),
            error => Error::io("cannot set the host name", error.into()),
        })?;
    }
    if request.shared_tag.is_empty() { Ok(()) } else { mount_shared(&request.shared_tag) }
}

/// Sets a parameter of the guest's kernel (sysctl(8)), by its name with dots or slashes.
///
/// # Errors
/// That there is none of this name, or that the kernel refuses the value.
pub fn set_sysctl(name: &str, value: &str) -> Result<(), Error> {
    // Whichever separator comes first is the separator, the other a character of a name (sysctl.d(5)).
    let dotted = name.find(['.', '/']).is_some_and(|at| name.as_bytes().get(at) == Some(&b'.'));
    let swap = |c| match c {
        '.' => '/',
        '/' => '.',
        other => other,
    };
    let path: String = if dotted { name.chars().map(swap).collect() } else { name.into() };
    if path.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err(Error::Invalid(format!("linux.sysctl: {name:?} is no name of a kernel parameter")));
    }
    std::fs::write(format!("/proc/sys/{path}"), value).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Error::Invalid(format!("linux.sysctl: the guest's kernel has no {name}")),
        _ => Error::io(format_args!("linux.sysctl: cannot set {name} to {value:?}"), error),
    })
}

fn mount_shared(tag: &str) -> Result<(), Error> {
    // Device nodes on it are the containers' own (their device rules bind); set-user-id files must work.
    mount(Some(tag), SHARED, Some("virtiofs"), MsFlags::empty(), None::<&str>).map_err(|error| match error {
        Errno::ENODEV => Error::Internal("the kernel lacks CONFIG_VIRTIO_FS".into()),
        Errno::EINVAL => Error::Invalid(format!("no virtio-fs device has the tag {tag:?}")),
        error => Error::io(format_args!("cannot mount the virtio-fs device {tag:?}"), error.into()),
    })
}

/// Credits `bytes` to the kernel's random pool and reseeds from it (random(4): RNDADDENTROPY, RNDRESEEDCRNG).
fn add_entropy(bytes: &[u8]) -> io::Result<()> {
    const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
    const RNDRESEEDCRNG: libc::Ioctl = 0x5207;
    let too_long = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let random = OpenOptions::new().write(true).open("/dev/urandom")?;
    // struct rand_pool_info: entropy_count in bits, buf_size in bytes, the bytes.
    let len = i32::try_from(bytes.len()).map_err(too_long)?;
    let bits = len.checked_mul(8).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut info = Vec::with_capacity(8 + bytes.len());
    info.extend(bits.to_ne_bytes());
    info.extend(len.to_ne_bytes());
    info.extend(bytes);
    // SAFETY: RNDADDENTROPY reads the header and the `buf_size` bytes after it, all of which are in `info`.
    Errno::result(unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, info.as_ptr()) })?;
    // SAFETY: RNDRESEEDCRNG takes no argument.
    Errno::result(unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) })?;
    Ok(())
}
