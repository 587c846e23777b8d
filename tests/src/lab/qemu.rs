//! The machine: QEMU's command line.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use super::artefacts::Artefacts;
use super::job::{Access, Job, Machine};
use super::wire::PORTS;

/// A started QEMU. Killed when dropped, and by the kernel when the thread that started it ends.
pub struct Qemu {
    child: Child,
    /// Our ends of the ports, in the order of [`PORTS`].
    pub ports: Vec<UnixStream>,
    /// What the machine's serial console prints.
    pub console: UnixStream,
    /// Its monitor, which speaks QMP.
    pub monitor: UnixStream,
}

impl Qemu {
    /// Starts the machine. The calling thread must outlive it.
    pub fn start(artefacts: &Artefacts, job: &Job, machine: &Machine, initrd: OwnedFd) -> Result<Self> {
        let (console, console_end) = UnixStream::pair()?;
        let (monitor, monitor_end) = UnixStream::pair()?;
        let pairs = PORTS.iter().map(|_| UnixStream::pair()).collect::<std::io::Result<Vec<_>>>()?;
        let (ports, ends): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
        for end in ends.iter().chain([&console_end, &monitor_end]) {
            fcntl(end, FcntlArg::F_SETFD(FdFlag::empty()))?;
        }
        let qemu = artefacts.qemu();
        // By its own loader and libraries: QEMU is Debian 13's, this machine may be older.
        let mut command = Command::new(qemu.join("lib/ld-linux-x86-64.so.2"));
        command
            .args(["--argv0", "katavm-lab-qemu", "--library-path"])
            .arg(qemu.join("lib"))
            .arg(qemu.join("bin/qemu-system-x86_64"))
            .arg("-L")
            .arg(qemu.join("share"))
            .args(machine_arguments(machine))
            .args(disk_arguments(&artefacts.root()))
            .args(share_arguments(job))
            .args(port_arguments(console_end.as_raw_fd(), &ends.iter().map(AsRawFd::as_raw_fd).collect::<Vec<_>>()))
            .args(monitor_arguments(monitor_end.as_raw_fd()))
            .arg("-kernel")
            .arg(artefacts.kernel())
            .args([
                "-initrd",
                &format!("/proc/self/fd/{}", initrd.as_raw_fd()),
                "-append",
                &kernel_command_line(machine),
            ])
            .stdin(Stdio::null());
        // What QEMU itself says goes with the machine's console.
        let log: OwnedFd = console_end.try_clone()?.into();
        command.stdout(File::from(log.try_clone()?)).stderr(File::from(log));
        command.process_group(0);
        let parent = std::process::id();
        // SAFETY: between fork and exec only prctl and getppid are called, which are async-signal-safe.
        unsafe {
            command.pre_exec(move || die_with(parent));
        }
        let child = command.spawn().context("cannot start QEMU")?;
        Ok(Self { child, ports, console, monitor })
    }

    /// Ends the machine at once.
    pub fn kill(&mut self) {
        // It may have ended already, then there is nothing to kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Has the kernel kill this process when its parent ends (`prctl(PR_SET_PDEATHSIG)`).
fn die_with(parent: u32) -> std::io::Result<()> {
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
    // SAFETY: getppid cannot fail and touches no memory.
    let now = unsafe { libc::getppid() };
    if u32::try_from(now) == Ok(parent) { Ok(()) } else { Err(std::io::ErrorKind::NotConnected.into()) }
}

fn machine_arguments(machine: &Machine) -> Vec<OsString> {
    let memory = format!("{}M", machine.memory_mib);
    let mut arguments: Vec<String> =
        ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"].map(String::from).into();
    arguments.extend(["-M".into(), "q35,usb=off,sata=off,smbus=off,vmport=off".into(), "-m".into(), memory]);
    // Five-level page tables only make each emulated walk longer.
    arguments.extend(["-cpu".into(), "max,+svm,+npt,-la57".into()]);
    // All CPUs on one thread, in turns: with a thread for each, QEMU loses interrupts and runs stale code (docs/lab.md).
    arguments.extend(["-accel".into(), "tcg,thread=single,tb-size=1024".into()]);
    arguments.extend(["-smp".into(), machine.cpu_count().to_string()]);
    if machine.counting {
        arguments.extend(["-icount".into(), "shift=0,sleep=off".into()]);
    }
    arguments.into_iter().map(OsString::from).collect()
}

fn disk_arguments(root: &Path) -> Vec<OsString> {
    let drive = format!("file={},format=raw,if=none,id=root,readonly=on,aio=threads,cache=writeback", escaped(root));
    ["-object", "iothread,id=disks", "-drive", &drive, "-device", "virtio-blk-pci,drive=root,iothread=disks"]
        .map(OsString::from)
        .into()
}

fn share_arguments(job: &Job) -> Vec<OsString> {
    let mut arguments = Vec::new();
    for (number, share) in job.shares.iter().enumerate() {
        let mode = if share.access == Access::Writable { "" } else { ",readonly=on" };
        let path = escaped(&share.path);
        arguments.push("-fsdev".to_string());
        arguments.push(format!("local,id=share{number},path={path},security_model=none,multidevs=remap{mode}"));
        arguments.push("-device".to_string());
        arguments.push(format!("virtio-9p-pci,fsdev=share{number},mount_tag=share{number}"));
    }
    arguments.into_iter().map(OsString::from).collect()
}

fn port_arguments(console: i32, ports: &[i32]) -> Vec<OsString> {
    let mut arguments: Vec<String> =
        vec!["-chardev".into(), format!("socket,id=console,fd={console}"), "-serial".into(), "chardev:console".into()];
    arguments.extend(["-device".into(), "virtio-serial-pci,max_ports=8".into()]);
    for (name, fd) in PORTS.iter().zip(ports) {
        arguments.extend(["-chardev".into(), format!("socket,id={name},fd={fd}")]);
        arguments.extend(["-device".into(), format!("virtserialport,chardev={name},name={name}")]);
    }
    arguments.into_iter().map(OsString::from).collect()
}

fn monitor_arguments(fd: i32) -> [String; 4] {
    ["-chardev".into(), format!("socket,id=monitor,fd={fd}"), "-mon".into(), "chardev=monitor,mode=control".into()]
}

/// In QEMU's options a comma in a value is doubled.
fn escaped(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

fn kernel_command_line(machine: &Machine) -> String {
    let mut line = String::from(
        // A kernel in trouble ends at once (QEMU exits, see -no-reboot) and says why on the console.
        "console=ttyS0 quiet panic=-1 oops=panic \
         mitigations=off lsm=landlock,yama,bpf audit=0 cgroup_no_v1=all \
         tsc=reliable no_timer_check lpj=10000000 clk_ignore_unused pd_ignore_unused 8250.nr_uarts=1",
    );
    if machine.counting {
        // An idle machine with a counting clock would print soft lockups of the warp between two timers.
        line.push_str(" nowatchdog");
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(arguments: Vec<OsString>) -> String {
        arguments.into_iter().map(|argument| argument.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn the_counting_machine_has_one_cpu_and_counts() {
        let counting = text(machine_arguments(&Machine { counting: true, cpus: 4, ..Machine::default() }));
        assert!(counting.contains("-smp 1 -icount shift=0,sleep=off"), "{counting}");
        assert!(counting.contains("thread=single"));
        let usual = text(machine_arguments(&Machine { cpus: 4, ..Machine::default() }));
        assert!(usual.contains("thread=single,tb-size=1024 -smp 4") && !usual.contains("icount"), "{usual}");
    }

    #[test]
    fn a_comma_in_a_path_is_doubled() {
        assert_eq!(escaped(Path::new("/a,b")), "/a,,b");
    }
}
