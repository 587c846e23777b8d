//! `katavm run` as an ordinary user who may open `/dev/kvm`, on a bundle of their own, without root anywhere.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Signal, geteuid, kill_process};
use serde_json::json;

use super::leftovers::Traces;
use super::process::Started;
use super::run::bundle;
use super::{Context, Table, Verdict};

/// The table.
pub const CASES: Table = ("user", &[("runs_a_bundle_of_their_own_without_root", own_bundle)]);

/// Somebody whom no password file knows.
const USER: u32 = 61_234;
const LIMIT: Duration = Duration::from_secs(240);
/// The device.
const KVM: &str = "/dev/kvm";

/// `/dev/kvm` as it was, when this is dropped.
pub(super) struct KvmAccess {
    before: Option<(u32, u32)>,
    group: u32,
}

impl KvmAccess {
    /// The group that may open it; in the lab it gets one if it has none.
    pub(super) fn grant() -> Result<Option<Self>> {
        let device = fs::metadata(KVM)?;
        if device.gid() != 0 && device.mode() & 0o060 == 0o060 {
            return Ok(Some(Self { before: None, group: device.gid() }));
        }
        if std::env::var_os("KATAVM_LAB").is_none() {
            return Ok(None);
        }
        let access = Self { before: Some((device.gid(), device.mode() & 0o7777)), group: 61_235 };
        chown(KVM, None, Some(access.group))?;
        fs::set_permissions(KVM, fs::Permissions::from_mode(0o660))?;
        Ok(Some(access))
    }

    /// That group.
    pub(super) fn group(&self) -> u32 {
        self.group
    }
}

impl Drop for KvmAccess {
    fn drop(&mut self) {
        if let Some((group, mode)) = self.before {
            let restored =
                chown(KVM, None, Some(group)).and_then(|()| fs::set_permissions(KVM, fs::Permissions::from_mode(mode)));
            restored.unwrap_or_else(|error| println!("cannot give {KVM} its group and mode back: {error}"));
        }
    }
}

/// What of a file's owner can be had, and what cannot.
const SCRIPT: &str = "id -u; stat -c '%u %a' /mine; cat /mine; echo changed >> /mine; \
                      mkdir -m 2750 /new; echo x > /new/file; stat -c '%u %g' /new/file; \
                      chown 33:44 /new/file 2>&1; chown 0:0 /new/file 2>&1; mknod /new/null c 1 3 2>&1; \
                      cat /secret 2>&1; stat -c '%u %g' /new/file; chmod 4711 /new/file; \
                      mkfifo /new/pipe && ln /new/file /new/link && ls /new | tr '\\n' ' '; exit 7";

fn own_bundle(context: &Context) -> Result<Verdict> {
    if !geteuid().is_root() {
        return Ok(Verdict::Skipped("it takes root to become somebody else".into()));
    }
    let Some(access) = KvmAccess::grant()? else {
        return Ok(Verdict::Skipped(format!("{KVM} has no group but root's, and this is no lab")));
    };
    let home = prepare(context)?;
    let state = home.join("run/katavm");
    let before = Traces::with_state(&home, &state);

    let katavm = as_user(&home, access.group);
    let run = Started::spawn(katavm().args(["run", "--id", "mine"]).arg(home.join("bundle")))?.finish(LIMIT)?;
    context.note("stdout", run.stdout.clone());
    context.note("stderr", run.stderr.clone());
    run.expect(7, &[])?;
    ensure!(run.stderr.is_empty(), "it complains:\n{}", run.stderr);
    // Root in the guest, and on the host whoever runs katavm: that is who owns the files.
    let mine = format!("{USER} {USER}");
    let expected = [
        "0",
        &format!("{USER} 640"),
        "mine",
        &mine,
        "chown: /new/file: Operation not permitted",
        "chown: /new/file: Operation not permitted",
        "mknod: /new/null: Operation not permitted",
        "cat: can't open '/secret': Permission denied",
        &mine,
        "file link pipe ",
    ];
    let lines: Vec<_> = run.stdout.lines().collect();
    ensure!(lines == expected, "{lines:#?} instead of {expected:#?}");
    before.expect_nothing_new()?;

    let rootfs = home.join("bundle/rootfs");
    ensure!(fs::read_to_string(rootfs.join("mine"))? == "mine\nchanged\n", "the file was not changed");
    for (name, mode) in [("new", 0o2750), ("new/file", 0o4711)] {
        let file = fs::metadata(rootfs.join(name))?;
        ensure!((file.uid(), file.gid()) == (USER, USER), "{name} belongs to {}:{}", file.uid(), file.gid());
        ensure!(file.mode() & 0o7777 == mode, "{name} has mode {:o}", file.mode());
    }

    // While it runs, none of its processes is anybody else's, and a kill leaves nothing behind here either.
    let config =
        fs::read_to_string(home.join("bundle/config.json"))?.replace("exit 7", "echo up; cat /dev/zero > /dev/null");
    fs::write(home.join("bundle/config.json"), config)?;
    fs::remove_dir_all(rootfs.join("new"))?;
    let run = Started::spawn(katavm().args(["run", "--id", "mine"]).arg(home.join("bundle")))?;
    run.read_until("up", LIMIT)?;
    let watcher = run.watcher().context("no watcher")?;
    for pid in [run.id(), watcher.as_raw_nonzero().get().cast_unsigned()] {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let ids = format!("{USER}\t{USER}\t{USER}\t{USER}");
        ensure!(field("Uid:") == Some(&ids) && field("Gid:") == Some(&ids), "{status}");
        for set in ["CapPrm:", "CapEff:", "CapInh:", "CapAmb:"] {
            ensure!(field(set) == Some("0000000000000000"), "{status}");
        }
    }
    kill_process(watcher, Signal::KILL)?;
    run.signal(Signal::KILL);
    run.finish(LIMIT)?;
    Started::spawn(katavm().arg("gc"))?.finish(LIMIT)?.expect(0, &[])?;
    before.expect_nothing_new()?;
    Ok(Verdict::Passed)
}

/// A folder that belongs to the user: the bundle, a runtime folder, and what of katavm they could not reach otherwise.
fn prepare(context: &Context) -> Result<PathBuf> {
    let home = context.scratch().join("home");
    let rootfs = bundle(context, &["sh", "-c", SCRIPT], |config| {
        let all = json!(["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_MKNOD"]);
        config["process"]["capabilities"] = json!({"bounding": all, "effective": all, "permitted": all});
    })?;
    fs::create_dir_all(home.join("bundle"))?;
    for part in ["rootfs", "config.json"] {
        fs::rename(rootfs.join(part), home.join("bundle").join(part))?;
    }
    let rootfs = home.join("bundle/rootfs");
    for applet in ["mknod", "chmod", "mkfifo", "ln", "tr"] {
        std::os::unix::fs::symlink("busybox", rootfs.join("bin").join(applet))?;
    }
    fs::write(rootfs.join("mine"), "mine\n")?;
    fs::set_permissions(rootfs.join("mine"), fs::Permissions::from_mode(0o640))?;
    fs::create_dir_all(home.join("run"))?;
    fs::create_dir_all(home.join("image"))?;
    for file in ["vmlinux", "initramfs"] {
        fs::copy(context.image(file)?, home.join("image").join(file))?;
    }
    fs::copy(installed()?, home.join("katavm"))?;
    give(&home, USER)?;
    fs::set_permissions(context.scratch(), fs::Permissions::from_mode(0o755))?;
    // Root's own, which the user cannot read.
    fs::write(rootfs.join("secret"), "secret")?;
    fs::set_permissions(rootfs.join("secret"), fs::Permissions::from_mode(0o600))?;
    Ok(home)
}

/// The program that is tried.
pub(super) fn installed() -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let program = std::env::split_paths(&path).map(|folder| folder.join("katavm")).find(|file| file.is_file());
    program.context("no katavm in PATH")
}

/// Makes everything in a folder a user's.
pub(super) fn give(path: &Path, user: u32) -> Result<()> {
    std::os::unix::fs::lchown(path, Some(user), Some(user))?;
    if path.symlink_metadata()?.is_dir() {
        for entry in fs::read_dir(path)? {
            give(&entry?.path(), user)?;
        }
    }
    Ok(())
}

/// Commands of the user: no capability, not even to be gained, and the one group.
fn as_user(home: &Path, kvm: u32) -> impl Fn() -> Command {
    let home = home.to_path_buf();
    move || {
        let mut command = Command::new("setpriv");
        command
            .args([format!("--reuid={USER}"), format!("--regid={USER}"), format!("--groups={kvm}")])
            .args(["--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all", "--no-new-privs"])
            .arg(home.join("katavm"))
            .env("KATAVM_GUEST_IMAGE", home.join("image"))
            .env("XDG_RUNTIME_DIR", home.join("run"))
            .env("HOME", &home)
            .current_dir("/");
        command
    }
}
