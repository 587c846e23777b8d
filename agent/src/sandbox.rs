//! What a fresh guest is told about itself: name, randomness, shared files.

use std::fs::{DirBuilder, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use katavm_protocol::agent::{CreateSandboxRequest, Tmpfs};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use oci_spec::runtime::Spec;

use crate::error::Error;

/// Where the host's shared directory is mounted.
pub const SHARED: &str = "/run/katavm/shared";

/// Where file systems in memory are that containers share.
const TMPFS: &str = "/run/katavm/tmpfs";

/// Applies the request.
///
/// # Errors
/// Which part could not be done.
pub fn create(request: &CreateSandboxRequest) -> Result<(), Error> {
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

/// Makes a file system in memory that everybody may write to, unless it is there.
///
/// # Errors
/// Why it cannot be mounted.
pub fn make_tmpfs(tmpfs: &Tmpfs) -> Result<(), Error> {
    if tmpfs.name.is_empty() || tmpfs.name.contains(['/', '.']) {
        return Err(Error::Invalid(format!("{:?} is no name of a tmpfs", tmpfs.name)));
    }
    let path = Path::new(TMPFS).join(&tmpfs.name);
    let made = DirBuilder::new().recursive(true).mode(0o711).create(TMPFS).and_then(|()| std::fs::create_dir(&path));
    match made {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        made => made.map_err(|error| Error::io(format_args!("cannot make {}", path.display()), error))?,
    }
    let (flags, options) = (MsFlags::MS_NOSUID | MsFlags::MS_NODEV, format!("mode=1777,size={}", tmpfs.size));
    mount(Some("shm"), &path, Some("tmpfs"), flags, Some(options.as_str())).map_err(|error| {
        // Otherwise the directory would be taken for it.
        let _ = std::fs::remove_dir(&path);
        Error::io(format_args!("cannot mount a tmpfs of {} bytes", tmpfs.size), error.into())
    })
}

/// Has the kernel mount the shared directories that a container is made of, here and not in the mount namespace of the
/// container: there each container would have a file system of its own, and a socket or a lock of one would not be that of
/// the other. In a container's own user namespace the kernel would not mount at all.
pub fn mount_shared_sources(spec: &Spec) {
    let root = spec.root().iter().map(|root| root.path().as_path());
    let sources = spec.mounts().iter().flatten().filter_map(|mount| mount.source().as_deref());
    for source in sources.chain(root).filter(|source| source.starts_with(SHARED)) {
        // A file is no directory; whatever else is wrong is told when it is mounted.
        let _ = OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW).open(source);
    }
}

/// Unmounts entries of the shared directory that the host has taken away. The kernel has mounted them by itself.
pub fn unmount_shared(names: &[String]) {
    for name in names.iter().filter(|name| !name.contains('/')) {
        // A file was not mounted, and a look at the missing name may have been enough.
        let _ = umount2(format!("{SHARED}/{name}").as_str(), MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
    }
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
