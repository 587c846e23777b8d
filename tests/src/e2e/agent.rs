//! The real agent in a real guest: ready, containers on a shared root file system, streams, the end.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use katavm_protocol::agent::CheckRequest;

use super::guest::Guest;
use super::{Context, Row, Verdict};

/// The table.
pub const CASES: (&str, &[Row]) = (
    "agent",
    &[
        ("is_ready_and_answers", ready),
        ("runs_a_container", container),
        ("a_container_writes_to_its_root_file_system", writes),
        ("a_hundred_mebibytes_of_output_arrive", output),
        ("a_foreign_port_is_refused", foreign_port),
    ],
);

const APPLETS: [&str; 17] = [
    "sh",
    "uname",
    "echo",
    "cat",
    "head",
    "ls",
    "id",
    "chown",
    "mkdir",
    "stat",
    "sha256sum",
    "true",
    "sleep",
    "kill",
    "stty",
    "vi",
    "yes",
];

/// The case's root file system of busybox.
pub(super) fn rootfs(context: &Context) -> Result<PathBuf> {
    let root = context.scratch().join("rootfs");
    if root.exists() {
        return Ok(root);
    }
    for folder in ["bin", "dev", "proc", "sys", "tmp", "etc"] {
        fs::create_dir_all(root.join(folder))?;
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).context("the lab needs busybox-static")?;
    for applet in APPLETS {
        symlink("busybox", root.join("bin").join(applet))?;
    }
    Ok(root)
}

/// The same with all of busybox.
pub(super) fn whole_rootfs(context: &Context) -> Result<PathBuf> {
    let root = rootfs(context)?;
    let bin = root.join("bin");
    // It complains of those that are there.
    Command::new(bin.join("busybox")).arg("--install").arg(&bin).output()?;
    ensure!(bin.join("tail").exists(), "busybox has not installed itself in {}", bin.display());
    Ok(root)
}

fn ready(context: &Context) -> Result<Verdict> {
    let guest = Guest::boot(context, |_| ())?;
    ensure!(guest.ready.kernel_release == context.kernel_release()?, "{}", guest.ready.kernel_release);
    let answer = guest.ask(guest.agent.check(Guest::soon(), &CheckRequest::default()))?;
    ensure!(answer.kernel_release == context.kernel_release()?, "{}", answer.kernel_release);
    ensure!(guest.vm.exits() > 100, "KVM counted {} exits: no guest ran", guest.vm.exits());
    guest.end()?;
    Ok(Verdict::Passed)
}

fn container(context: &Context) -> Result<Verdict> {
    let guest = Guest::boot(context, |_| ())?;
    guest.sandbox()?;
    let output = guest.run("c1", &rootfs(context)?, &["/bin/sh", "-c", "echo $$ $(uname -rn); exit 7"])?;
    let expected = format!("1 c1 {}\n", context.kernel_release()?);
    ensure!(output.stdout == expected.as_bytes(), "{:?}", String::from_utf8_lossy(&output.stdout));
    ensure!(output.exit.status == 7, "status {}", output.exit.status);
    guest.end()?;
    Ok(Verdict::Passed)
}

fn writes(context: &Context) -> Result<Verdict> {
    let guest = Guest::boot(context, |_| ())?;
    guest.sandbox()?;
    let root = rootfs(context)?;
    let script = "mkdir -m 2750 /new && echo hello > /new/file && chown 33:44 /new/file && stat -c '%u %g' /new/file";
    let output = guest.run("c1", &root, &["/bin/sh", "-c", script])?;
    ensure!(output.stdout == b"33 44\n" && output.exit.status == 0, "{:?}", String::from_utf8_lossy(&output.stdout));
    guest.end()?;
    ensure!(fs::read(root.join("new/file"))? == b"hello\n", "other contents");
    let (folder, file) = (fs::metadata(root.join("new"))?, fs::metadata(root.join("new/file"))?);
    ensure!((file.uid(), file.gid()) == (33, 44), "owner {}:{}", file.uid(), file.gid());
    ensure!(folder.permissions().mode() & 0o7777 == 0o2750, "mode {:o}", folder.permissions().mode());
    Ok(Verdict::Passed)
}

fn output(context: &Context) -> Result<Verdict> {
    let guest = Guest::boot(context, |_| ())?;
    guest.sandbox()?;
    let output = guest.run("c1", &rootfs(context)?, &["/bin/head", "-c", "104857600", "/dev/zero"]);
    let output = output?;
    ensure!(output.exit.status == 0, "status {}", output.exit.status);
    ensure!(output.stdout.len() == 100 << 20, "{} bytes", output.stdout.len());
    guest.end()?;
    Ok(Verdict::Passed)
}

fn foreign_port(context: &Context) -> Result<Verdict> {
    let guest = Guest::boot(context, |_| ())?;
    let error = guest.sockets.connect(4711, std::time::Duration::from_secs(60)).err().context("it was accepted")?;
    ensure!(error.kind() == std::io::ErrorKind::ConnectionRefused, "{error}");
    guest.end()?;
    Ok(Verdict::Passed)
}
