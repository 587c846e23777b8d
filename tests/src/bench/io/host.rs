//! What the host has ready: a disk, files, a tap, and somebody to talk to.

use std::fs::{self, File};
use std::net::TcpListener;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept, bind, listen, socket};

use super::exchange::{self, PORT};
use super::kinds::Kind;
use super::worker::connect::HOST;
use super::worker::{disk, files};

/// The disk's file.
pub const DISK: &str = "disk";
/// The folder whose files are shared.
pub const FILES: &str = "shared";
/// The tap, which the monitors open by this name.
pub const TAP: &str = "katavm-io";

/// What is there for the guests of one kind, and goes with this.
pub struct Host {
    has_tap: bool,
}

impl Host {
    /// Makes it all in the folder `scratch`.
    ///
    /// # Errors
    /// When something cannot be made.
    pub fn new(kind: Kind, scratch: &Path) -> Result<Self> {
        let host = Self { has_tap: kind == Kind::Network };
        match kind {
            // No holes: all of it is there.
            Kind::Disk => fs::write(scratch.join(DISK), vec![0x5a; disk::DISK])?,
            Kind::Files => files::fill(&scratch.join(FILES).join(files::FOLDER))?,
            Kind::Network => {
                ip(&["tuntap", "add", TAP, "mode", "tap", "vnet_hdr"])?;
                fs::write(format!("/proc/sys/net/ipv6/conf/{TAP}/disable_ipv6"), "1")?;
                ip(&["addr", "add", &format!("{HOST}/30"), "dev", TAP])?;
                ip(&["link", "set", TAP, "up"])?;
                let listener = TcpListener::bind((HOST, u16::try_from(PORT)?))?;
                exchange::serve(move || {
                    let (stream, _) = listener.accept().ok()?;
                    stream.set_nodelay(true).ok()?;
                    Some(File::from(OwnedFd::from(stream)))
                })?;
            }
            Kind::Vsock => {
                // Of monitors whose guests are the host kernel's own peers.
                run("modprobe", &["vhost_vsock"])?;
                let listener = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
                bind(listener.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, PORT))?;
                listen(&listener, Backlog::new(64)?)?;
                exchange::serve(move || {
                    let stream = accept(listener.as_raw_fd()).ok()?;
                    // SAFETY: accept(2) gave a new descriptor, which nobody else has.
                    Some(unsafe { std::os::fd::FromRawFd::from_raw_fd(stream) })
                })?;
            }
        }
        Ok(host)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if self.has_tap {
            let _ = ip(&["link", "del", TAP]);
        }
    }
}

fn ip(args: &[&str]) -> Result<()> {
    run("ip", args)
}

fn run(program: &str, args: &[&str]) -> Result<()> {
    let output = Command::new(program).args(args).output().with_context(|| format!("cannot run {program}"))?;
    ensure!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
