//! Bad input and bad surroundings: each ends with exit code 1 and one message that a person can act on.

use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Result, ensure};
use serde_json::json;

use super::super::{Context, Table, Verdict};
use super::bundle::bundle;
use super::katavm::{Running, command, expect, finish, katavm, refused, run};

/// A user whom nothing belongs to.
const USER: u32 = 65534;

/// The table.
pub const CASES: Table = (
    "errors",
    &[
        ("a_bundle_that_is_not_there", no_bundle),
        ("a_bundle_without_config_json", no_config),
        ("json_that_is_broken", broken_json),
        ("json_of_another_shape", wrong_json),
        ("a_root_that_is_not_there", no_root),
        ("a_root_that_is_no_folder", root_is_a_file),
        ("a_program_that_is_not_there", no_program),
        ("a_path_that_is_not_there", no_path),
        ("a_program_that_may_not_be_executed", not_executable),
        ("a_program_that_is_none", not_a_program),
        ("a_kernel_that_is_not_there", no_kernel),
        ("a_kernel_that_is_none", not_a_kernel),
        ("no_guest_image", no_image),
        ("memory_that_is_too_small", too_small),
        ("the_least_memory_is_enough", least_memory),
        ("an_id_that_is_in_use", id_in_use),
        ("no_dev_kvm", no_kvm),
        ("a_dev_kvm_that_is_none", null_kvm),
        ("a_user_without_access_to_dev_kvm", no_permission),
        ("nothing_is_left_of_any_run", nothing_left),
    ],
);

fn options(context: &Context, options: &[&str], bundle: &Path, words: &[&str]) -> Result<Verdict> {
    let args: Vec<_> = ["run"].iter().chain(options).map(OsStr::new).chain([bundle.as_os_str()]).collect();
    refused(&katavm(context, &args, b"")?, words)
}

fn no_bundle(context: &Context) -> Result<Verdict> {
    options(context, &[], Path::new("/no/such/bundle"), &["/no/such/bundle: no such file or directory"])
}

fn no_config(context: &Context) -> Result<Verdict> {
    options(context, &[], context.scratch(), &["config.json not found", "BUNDLE must be a folder"])
}

fn broken_json(context: &Context) -> Result<Verdict> {
    let bundle = bundle(context, &["true"], |_| ())?;
    fs::write(bundle.join("config.json"), "{\n  \"ociVersion\": oops\n}")?;
    options(context, &[], &bundle, &["/config.json: line 2, column 17: expected value"])?;
    fs::write(bundle.join("config.json"), "{\n  \"root\": {")?;
    options(context, &[], &bundle, &["/config.json: line 2, column 11: EOF while parsing an object"])
}

fn wrong_json(context: &Context) -> Result<Verdict> {
    let bundle = bundle(context, &["true"], |config| config["process"]["args"] = json!("true"))?;
    options(context, &[], &bundle, &["/config.json: line 1, column ", "invalid type: string \"true\""])?;
    let config = |context, change: fn(&mut serde_json::Value)| super::bundle::bundle(context, &["true"], change);
    config(context, |config| config["ociVersion"] = json!("3.0.0"))?;
    options(context, &[], &bundle, &["/config.json: ociVersion \"3.0.0\" is not supported"])?;
    config(context, |config| config["process"]["cwd"] = json!("tmp"))?;
    options(context, &[], &bundle, &["process.cwd \"tmp\" must be an absolute path"])
}

fn no_root(context: &Context) -> Result<Verdict> {
    let bundle = bundle(context, &["true"], |config| config["root"]["path"] = json!("nowhere"))?;
    options(context, &[], &bundle, &["invalid rootfs: stat /", "/nowhere: no such file or directory"])
}

fn root_is_a_file(context: &Context) -> Result<Verdict> {
    let bundle = bundle(context, &["true"], |config| config["root"]["path"] = json!("config.json"))?;
    options(context, &[], &bundle, &["invalid rootfs: stat /", "/config.json: not a directory"])
}

fn no_program(context: &Context) -> Result<Verdict> {
    let bundle = bundle(context, &["nosuch"], |_| ())?;
    options(context, &[], &bundle, &["exec: \"nosuch\": executable file not found in $PATH"])
}

fn no_path(context: &Context) -> Result<Verdict> {
    let bundle = bundle(context, &["/no/such"], |_| ())?;
    options(context, &[], &bundle, &["exec: \"/no/such\": stat /no/such: no such file or directory"])
}

fn not_executable(context: &Context) -> Result<Verdict> {
    let bundle = bundle(context, &["/bin/plain"], |_| ())?;
    fs::write(bundle.join("rootfs/bin/plain"), "#!/bin/sh\n")?;
    fs::set_permissions(bundle.join("rootfs/bin/plain"), Permissions::from_mode(0o644))?;
    options(context, &[], &bundle, &["exec: \"/bin/plain\": permission denied"])
}

/// It shows only when the container has been started: the message is the process' own, as with runc.
fn not_a_program(context: &Context) -> Result<Verdict> {
    let bundle = bundle(context, &["/bin/plain"], |_| ())?;
    fs::write(bundle.join("rootfs/bin/plain"), "\0\0\0\0")?;
    fs::set_permissions(bundle.join("rootfs/bin/plain"), Permissions::from_mode(0o755))?;
    let output = run(context, &bundle, b"")?;
    expect(&output, 1, "", "exec /bin/plain: exec format error\n")
}

fn no_kernel(context: &Context) -> Result<Verdict> {
    let bundle = bundle(context, &["true"], |_| ())?;
    options(context, &["--kernel", "/no/kernel"], &bundle, &["--kernel /no/kernel", "no such file"])
}

fn not_a_kernel(context: &Context) -> Result<Verdict> {
    let bundle = bundle(context, &["true"], |_| ())?;
    let words = ["is no kernel that katavm can boot", "(vmlinux) or a bzImage"];
    options(context, &["--kernel", "/etc/passwd"], &bundle, &words)?;
    options(context, &["--kernel", "/usr"], &bundle, &words)?;
    // The first half of a real one.
    let whole = fs::read(context.image("vmlinux")?)?;
    let half = context.scratch().join("half");
    fs::write(&half, whole.get(..whole.len() / 2).unwrap_or_default())?;
    options(context, &["--kernel", &half.to_string_lossy()], &bundle, &["cannot load the kernel", "/half"])
}

fn no_image(context: &Context) -> Result<Verdict> {
    let mut command = command();
    command.arg("run").arg(bundle(context, &["true"], |_| ())?).env("KATAVM_GUEST_IMAGE", context.scratch());
    refused(&finish(context, command, b"")?, &["no guest image found", "./just guest-image", "KATAVM_GUEST_IMAGE"])
}

fn too_small(context: &Context) -> Result<Verdict> {
    let bundle = bundle(context, &["true"], |_| ())?;
    options(context, &["--memory", "32M"], &bundle, &["memory too small: 32 MiB, at least 96 MiB are needed"])
}

/// The minimum that the message names is no empty promise.
fn least_memory(context: &Context) -> Result<Verdict> {
    let bundle = bundle(context, &["echo", "enough"], |_| ())?;
    let args = [OsStr::new("run"), OsStr::new("--memory=96M"), bundle.as_os_str()];
    expect(&katavm(context, &args, b"")?, 0, "enough\n", "")
}

fn id_in_use(context: &Context) -> Result<Verdict> {
    let id = format!("e2e-{}", std::process::id());
    let bundle = bundle(context, &["sh", "-c", "echo ready; cat"], |_| ())?;
    let mut command = command();
    command.args(["run", "--id", &id]).arg(&bundle).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut first = Running::start(&mut command)?;
    let mut said = BufReader::new(first.stdout()?).lines();
    ensure!(said.next().transpose()?.as_deref() == Some("ready"), "the first one did not start");
    options(context, &["--id", &id], &bundle, &[&format!("container with id {id} is already in use")])?;
    // The first one is none the worse, and afterwards the id is free.
    drop(first.stdin()?);
    let status = first.wait()?;
    ensure!(status.success(), "{status}");
    let args = [OsStr::new("run"), OsStr::new("--id"), OsStr::new(&id), bundle.as_os_str()];
    expect(&katavm(context, &args, b"")?, 0, "ready\n", "")
}

/// Runs `katavm` in a mount namespace of its own, after `setup`; it finds the case's folder in `$1`.
fn apart(context: &Context, setup: &str, args: &[&OsStr]) -> Result<std::process::Output> {
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-euc"]).arg(format!("{setup}\nshift\nexec katavm \"$@\"")).arg("sh");
    command.arg(context.scratch()).args(args);
    finish(context, command, b"")
}

/// Whether this is root, who alone may hide a device from a process.
fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// What `run` and `check` say in surroundings that `setup` makes.
fn kvm(context: &Context, setup: &str, words: &[&str]) -> Result<Verdict> {
    if !is_root() {
        return Ok(Verdict::Skipped("only root can hide a device in a mount namespace".into()));
    }
    let bundle = bundle(context, &["true"], |_| ())?;
    let state = context.scratch().join("state");
    // With the usual state, in which this boot's good probe is remembered, and with a new one.
    let run = [OsStr::new("run"), bundle.as_os_str()];
    refused(&apart(context, setup, &run)?, words)?;
    refused(&apart(context, setup, &[&[OsStr::new("--root"), state.as_os_str()], &run[..]].concat())?, words)?;
    let check = apart(context, setup, &[OsStr::new("check")])?;
    let said = String::from_utf8_lossy(&check.stdout);
    ensure!(check.status.code() == Some(1), "check: {}: {said}", check.status);
    for word in words {
        ensure!(said.contains(word), "check says {said:?}, not {word:?}");
    }
    Ok(Verdict::Passed)
}

fn no_kvm(context: &Context) -> Result<Verdict> {
    // A /dev that has all that a program may expect but this one.
    let setup = "mkdir -p \"$1/dev\"; for node in null zero full random urandom tty; do \
                 touch \"$1/dev/$node\"; mount --bind \"/dev/$node\" \"$1/dev/$node\"; done; \
                 mount --rbind \"$1/dev\" /dev";
    kvm(context, setup, &["/dev/kvm does not exist", "kvm_intel or kvm_amd"])
}

fn null_kvm(context: &Context) -> Result<Verdict> {
    kvm(context, "mount --bind /dev/null /dev/kvm", &["/dev/kvm is not the KVM device", "ls -l /dev/kvm", "10, 232"])
}

/// What an ordinary user gets who lacks a permission: for KVM, for the root file system, for the guest image.
fn no_permission(context: &Context) -> Result<Verdict> {
    if !is_root() {
        return Ok(Verdict::Skipped("only root can become another user".into()));
    }
    let mode = fs::metadata("/dev/kvm")?.permissions().mode();
    if mode & 0o006 != 0 {
        return Ok(Verdict::Skipped(format!("everybody may open /dev/kvm here (mode {mode:o})")));
    }
    let bundle = bundle(context, &["true"], |_| ())?;
    let mode = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode));
    mode(&bundle, 0o755)?;
    // An image of the user's own, as the suite's may lie where nobody else comes.
    let (image, runtime) = (context.scratch().join("image"), context.scratch().join("runtime"));
    for folder in [&image, &runtime] {
        fs::create_dir(folder)?;
    }
    for file in ["vmlinux", "initramfs"] {
        fs::copy(context.image(file)?, image.join(file))?;
    }
    chown(&runtime, Some(USER), Some(USER))?;
    let as_user = |words: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args([format!("--reuid={USER}"), format!("--regid={USER}"), "--clear-groups".into()]);
        command.args(["katavm", "run"]).arg(&bundle);
        command.env("KATAVM_GUEST_IMAGE", &image).env("XDG_RUNTIME_DIR", &runtime);
        refused(&finish(context, command, b"")?, words)
    };
    mode(&runtime, 0o500)?;
    as_user(&["cannot make the state directory /", "/runtime/katavm: permission denied", "--root"])?;
    mode(&runtime, 0o700)?;
    as_user(&["no permission to open /dev/kvm", "group that owns it (usually kvm)"])?;
    mode(&bundle.join("rootfs"), 0o700)?;
    as_user(&["invalid rootfs: open /", "/rootfs: permission denied"])?;
    mode(&bundle.join("rootfs"), 0o755)?;
    mode(&image, 0o700)?;
    as_user(&["no guest image found", "/image (permission denied)", "KATAVM_GUEST_IMAGE"])
}

/// After all these runs, and one more.
fn nothing_left(context: &Context) -> Result<Verdict> {
    run(context, &bundle(context, &["sh", "-c", "echo"], |_| ())?, b"")?;
    let processes = Command::new("pgrep").args(["-x", "katavm(-watcher)?"]).output()?.stdout;
    ensure!(processes.is_empty(), "processes are left: {}", String::from_utf8_lossy(&processes));
    let states: Vec<_> = fs::read_dir("/run/katavm").map(|entries| entries.flatten().collect()).unwrap_or_default();
    let states: Vec<_> = states.iter().filter(|entry| entry.path().is_dir()).map(fs::DirEntry::path).collect();
    ensure!(states.is_empty(), "state is left: {states:?}");
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let root = context.scratch().to_string_lossy().into_owned();
    ensure!(!mounts.contains(&root), "mounts are left:\n{mounts}");
    Ok(Verdict::Passed)
}
