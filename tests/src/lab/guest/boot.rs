//! From the kernel's first process to a Debian system.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::unistd::{chdir, chroot, execv};

use super::files::{mount_on, write};
use super::{AS_UNIT, HOME};
use crate::lab::initrd::{JOB, MODULES};
use crate::lab::job::{Access, Job, Share};

/// Under which folder the real root is put together.
const NEW: &str = "/new";
const NONE: MsFlags = MsFlags::empty();
const PLAIN: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);

/// Sets the machine up; with systemd it does not return.
pub fn run() -> Result<()> {
    mount_on(Path::new("/dev"), "devtmpfs", "dev", MsFlags::MS_NOSUID, "mode=0755")?;
    let job: Job = serde_json::from_slice(&fs::read(JOB)?).context("cannot read the job")?;
    load_modules()?;
    mount_root()?;
    mount_kernel_file_systems()?;
    for (number, share) in job.shares.iter().enumerate() {
        mount_share(number, share)?;
    }
    move_in(&job)?;
    if job.systemd {
        match start_systemd()? {}
    }
    set_up_by_hand()
}

fn load_modules() -> Result<()> {
    let mut paths: Vec<PathBuf> =
        fs::read_dir(MODULES)?.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?;
    paths.sort();
    for path in paths {
        let file = File::open(&path)?;
        finit_module(&file, &CString::default(), ModuleInitFlags::empty())
            .with_context(|| format!("cannot load {}", path.display()))?;
        // The initial RAM disk's memory stays in use otherwise.
        fs::remove_file(&path)?;
    }
    Ok(())
}

/// The read-only image with an overlay in memory.
fn mount_root() -> Result<()> {
    mount_on(Path::new("/lower"), "erofs", "/dev/vda", MsFlags::MS_RDONLY, "")?;
    mount_on(Path::new("/upper"), "tmpfs", "upper", NONE, "size=75%,mode=0755")?;
    fs::create_dir_all("/upper/data")?;
    fs::create_dir_all("/upper/work")?;
    mount_on(Path::new(NEW), "overlay", "root", NONE, "lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work")
}

fn mount_kernel_file_systems() -> Result<()> {
    let new = Path::new(NEW);
    mount_on(&new.join("dev"), "devtmpfs", "dev", MsFlags::MS_NOSUID, "mode=0755")?;
    mount_on(&new.join("proc"), "proc", "proc", PLAIN, "")?;
    mount_on(&new.join("sys"), "sysfs", "sysfs", PLAIN, "")?;
    mount_on(&new.join("run"), "tmpfs", "run", PLAIN, "mode=0755")?;
    mount_on(&new.join("tmp"), "tmpfs", "tmp", PLAIN, "mode=1777")?;
    mount_on(&new.join("run/lock"), "tmpfs", "lock", PLAIN, "mode=1777")?;
    mount_on(&new.join("dev/mqueue"), "mqueue", "mqueue", PLAIN, "")?;
    mount_on(&new.join("dev/hugepages"), "hugetlbfs", "hugetlbfs", PLAIN, "")?;
    for (folder, kind) in [("debug", "debugfs"), ("tracing", "tracefs"), ("security", "securityfs")] {
        mount_on(&new.join("sys/kernel").join(folder), kind, kind, PLAIN, "")?;
    }
    mount_on(&new.join("sys/fs/bpf"), "bpf", "bpf", PLAIN, "mode=0700")?;
    // Engines put overlays here, and an overlay cannot lie on an overlay.
    for state in ["var/lib/containerd", "var/lib/containers", "var/lib/katavm"] {
        mount_on(&new.join(state), "tmpfs", "state", NONE, "mode=0711")?;
    }
    Ok(())
}

fn mount_share(number: usize, share: &Share) -> Result<()> {
    let Ok(inside) = share.path.strip_prefix("/") else { bail!("{} is not an absolute path", share.path.display()) };
    let target = Path::new(NEW).join(inside);
    let tag = format!("share{number}");
    let (place, flags, cache) = match share.access {
        Access::ReadOnly => (target.clone(), MsFlags::MS_RDONLY, "loose"),
        Access::Scratch => (Path::new("/lower-shares").join(&tag), MsFlags::MS_RDONLY, "loose"),
        // Written through at once; only mapped files stay in the page cache.
        Access::Writable => (target.clone(), NONE, "mmap"),
    };
    mount_on(&place, "9p", &tag, flags, &format!("trans=virtio,version=9p2000.L,msize=512000,cache={cache}"))?;
    if share.access == Access::Scratch {
        let (upper, work) = (format!("/upper/{tag}"), format!("/upper/{tag}-work"));
        fs::create_dir_all(&upper)?;
        fs::create_dir_all(&work)?;
        let options = format!("lowerdir={},upperdir={upper},workdir={work}", place.display());
        mount_on(&target, "overlay", &tag, NONE, &options)?;
    }
    Ok(())
}

/// Makes the real root "/", with this program and the job in it.
fn move_in(job: &Job) -> Result<()> {
    let home = Path::new(NEW).join(HOME.trim_start_matches('/'));
    fs::create_dir_all(&home)?;
    fs::copy("/init", home.join("init")).context("cannot copy this program")?;
    fs::set_permissions(home.join("init"), fs::Permissions::from_mode(0o755))?;
    write(&home.join("job.json"), serde_json::to_vec(job)?)?;
    fs::remove_file("/init")?;
    chdir(NEW)?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).context("cannot move the root")?;
    chroot(".")?;
    chdir("/")?;
    Ok(())
}

fn start_systemd() -> Result<Infallible> {
    let unit = format!(
        "[Unit]\nDescription=The lab's command\nAfter=multi-user.target\n\
         [Service]\nExecStart={HOME}/init {AS_UNIT}\nStandardInput=null\nKillMode=none\nTasksMax=infinity\nDelegate=yes\n"
    );
    write(Path::new("/run/systemd/system/katavm-lab.service"), unit)?;
    let wants = Path::new("/run/systemd/system/multi-user.target.wants");
    fs::create_dir_all(wants)?;
    std::os::unix::fs::symlink("../katavm-lab.service", wants.join("katavm-lab.service"))?;
    let arguments = [c"/usr/lib/systemd/systemd", c"--log-target=console", c"--show-status=false"];
    execv(arguments[0], &arguments).context("cannot start systemd")
}

/// What systemd would have done and containers need.
fn set_up_by_hand() -> Result<()> {
    mount_on(Path::new("/dev/pts"), "devpts", "devpts", MsFlags::MS_NOSUID, "mode=0620,gid=5,ptmxmode=0666")?;
    mount_on(Path::new("/dev/shm"), "tmpfs", "shm", PLAIN, "mode=1777")?;
    let cgroups = Path::new("/sys/fs/cgroup");
    mount_on(cgroups, "cgroup2", "cgroup2", PLAIN, "nsdelegate,memory_recursiveprot")?;
    let controllers = fs::read_to_string(cgroups.join("cgroup.controllers"))?;
    let all: Vec<String> = controllers.split_whitespace().map(|name| format!("+{name}")).collect();
    write(&cgroups.join("cgroup.subtree_control"), all.join(" "))?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SHARED, None::<&str>)?;
    for (link, target) in [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")] {
        std::os::unix::fs::symlink(target, Path::new("/dev").join(link))?;
    }
    for folder in ["run/user/0", "var/tmp"] {
        fs::create_dir_all(Path::new("/").join(folder))?;
    }
    nix::unistd::sethostname("katavm-lab")?;
    bring_up_loopback()
}

/// `ip link set lo up`, without the time that starting `ip` takes.
fn bring_up_loopback() -> Result<()> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    use std::os::fd::AsRawFd;

    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: an all-zero ifreq is a valid value of it: plain integers and byte arrays.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = i16::try_from(libc::IFF_UP | libc::IFF_RUNNING).unwrap_or_default();
    // SAFETY: SIOCSIFFLAGS reads one ifreq from the pointer, which is valid for it.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) } < 0 {
        return Err(std::io::Error::last_os_error()).context("cannot bring up the loopback interface");
    }
    Ok(())
}
