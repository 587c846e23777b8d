//! `katavm run` on a real bundle, as a person at a shell uses it.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::agent::rootfs;
use super::{Context, Row, Verdict};

/// The table.
pub const CASES: (&str, &[Row]) = (
    "run",
    &[
        ("the_guest_kernel_and_the_exit_code", kernel_and_code),
        ("stdin_arrives_whole", stdin),
        ("stdout_and_stderr_are_apart", streams_apart),
        ("a_signal_is_128_plus_its_number", killed),
        ("user_cwd_environment_hostname", process),
        ("a_read_only_root_stays_as_it_is", read_only),
        ("a_program_that_is_not_there", no_program),
        ("a_bundle_that_is_not_there", no_bundle),
        ("json_that_is_broken", broken_json),
        ("a_root_that_is_not_there", no_root),
        ("a_kernel_that_is_not_there", no_kernel),
        ("check_says_that_guests_run", check),
        ("nothing_is_left", nothing_left),
    ],
);

/// A bundle of busybox with `args`, after `change` of its configuration.
pub(super) fn bundle(context: &Context, args: &[&str], change: impl FnOnce(&mut Value)) -> Result<PathBuf> {
    rootfs(context)?;
    let all = json!(["CAP_CHOWN", "CAP_KILL", "CAP_DAC_OVERRIDE", "CAP_SETUID", "CAP_SETGID"]);
    let mut config = json!({
        "ociVersion": "1.2.0",
        "process": {
            "args": args, "cwd": "/", "user": {"uid": 0, "gid": 0}, "env": ["PATH=/bin"],
            "capabilities": {"bounding": all, "effective": all, "permitted": all},
        },
        "root": {"path": "rootfs"},
        "hostname": "case",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
        ],
        "linux": {"namespaces": [
            {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}, {"type": "cgroup"},
        ]},
    });
    change(&mut config);
    fs::write(context.scratch().join("config.json"), config.to_string())?;
    Ok(context.scratch().to_path_buf())
}

/// Runs `katavm` with `args` and `input` on its stdin.
fn katavm<S: AsRef<OsStr>>(context: &Context, args: &[S], input: &[u8]) -> Result<Output> {
    let mut command = Command::new("katavm");
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().context("cannot run katavm: is it in PATH?")?;
    let mut stdin = child.stdin.take().context("no stdin")?;
    let output = thread::scope(|scope| {
        // The other end may close early: that is for the case to judge by the result.
        scope.spawn(move || stdin.write_all(input));
        child.wait_with_output()
    })?;
    context.note("stdout", output.stdout.clone());
    context.note("stderr", output.stderr.clone());
    Ok(output)
}

fn run(context: &Context, bundle: &Path, input: &[u8]) -> Result<Output> {
    katavm(context, &[OsStr::new("run"), bundle.as_os_str()], input)
}

/// Asks for an exit code and both outputs.
fn expect(output: &Output, code: i32, stdout: &str, stderr: &str) -> Result<Verdict> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    ensure!(output.status.code() == Some(code), "{} instead of {code}; stderr:\n{err}", output.status);
    ensure!(out == stdout, "stdout {out:?} instead of {stdout:?}; stderr:\n{err}");
    ensure!(err.contains(stderr), "stderr {err:?} does not say {stderr:?}");
    Ok(Verdict::Passed)
}

/// Says that something was refused: nothing on stdout, exit code 1, and words that help.
fn refused(output: &Output, words: &[&str]) -> Result<Verdict> {
    for word in words {
        expect(output, 1, "", word)?;
    }
    Ok(Verdict::Passed)
}

fn kernel_and_code(context: &Context) -> Result<Verdict> {
    let bundle = bundle(context, &["sh", "-c", "uname -r; exit 7"], |_| ())?;
    let args = [OsStr::new("run"), OsStr::new("--timings=json"), bundle.as_os_str()];
    let output = katavm(context, &args, b"")?;
    expect(&output, 7, &format!("{}\n", context.kernel_release()?), "kvm_exits")
}

fn stdin(context: &Context) -> Result<Verdict> {
    let input: Vec<u8> = (1..=300_000).flat_map(|number: u32| format!("{number}\n").into_bytes()).collect();
    let output = run(context, &bundle(context, &["cat"], |_| ())?, &input)?;
    ensure!(output.status.success(), "{}", output.status);
    ensure!(output.stdout == input, "{} bytes came back of {}", output.stdout.len(), input.len());
    Ok(Verdict::Passed)
}

fn streams_apart(context: &Context) -> Result<Verdict> {
    let output = run(context, &bundle(context, &["sh", "-c", "echo out; echo err >&2"], |_| ())?, b"")?;
    expect(&output, 0, "out\n", "err\n")
}

fn killed(context: &Context) -> Result<Verdict> {
    // PID 1 of a namespace does not hear its own SIGKILL: a child is killed, and its status handed on.
    let script = "sh -c 'kill -9 $$'; exit $?";
    let output = run(context, &bundle(context, &["sh", "-c", script], |_| ())?, b"")?;
    expect(&output, 137, "", "")
}

fn process(context: &Context) -> Result<Verdict> {
    let script = "id -u; id -g; echo $WHO; pwd; cat /proc/sys/kernel/hostname";
    let bundle = bundle(context, &["sh", "-c", script], |config| {
        config["process"]["user"] = json!({"uid": 1234, "gid": 5678});
        config["process"]["env"] = json!(["PATH=/bin", "WHO=me"]);
        config["process"]["cwd"] = json!("/tmp");
    })?;
    expect(&run(context, &bundle, b"")?, 0, "1234\n5678\nme\n/tmp\ncase\n", "")
}

fn read_only(context: &Context) -> Result<Verdict> {
    let bundle = bundle(context, &["sh", "-c", "echo x > /file"], |config| config["root"]["readonly"] = json!(true))?;
    let output = run(context, &bundle, b"")?;
    expect(&output, 1, "", "Read-only file system")?;
    ensure!(!bundle.join("rootfs/file").exists(), "the file was written");
    Ok(Verdict::Passed)
}

fn no_program(context: &Context) -> Result<Verdict> {
    let output = run(context, &bundle(context, &["nosuch"], |_| ())?, b"")?;
    refused(&output, &["exec: \"nosuch\": executable file not found in $PATH"])
}

fn no_bundle(context: &Context) -> Result<Verdict> {
    refused(&run(context, Path::new("/no/such/bundle"), b"")?, &["/no/such/bundle", "no such file or directory"])
}

fn broken_json(context: &Context) -> Result<Verdict> {
    let bundle = bundle(context, &["true"], |_| ())?;
    fs::write(bundle.join("config.json"), "{\n  \"ociVersion\": oops\n}")?;
    refused(&run(context, &bundle, b"")?, &["config.json", "2", "17"])
}

fn no_root(context: &Context) -> Result<Verdict> {
    let bundle = bundle(context, &["true"], |config| config["root"]["path"] = json!("nowhere"))?;
    refused(&run(context, &bundle, b"")?, &["nowhere"])
}

fn no_kernel(context: &Context) -> Result<Verdict> {
    let bundle = bundle(context, &["true"], |_| ())?;
    let args = [OsStr::new("run"), OsStr::new("--kernel"), OsStr::new("/no/kernel"), bundle.as_os_str()];
    refused(&katavm(context, &args, b"")?, &["/no/kernel"])
}

fn check(context: &Context) -> Result<Verdict> {
    let output = katavm(context, &["check"], b"")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(Verdict::Passed)
}

/// After all these runs, and one more.
fn nothing_left(context: &Context) -> Result<Verdict> {
    run(context, &bundle(context, &["sh", "-c", "echo"], |_| ())?, b"")?;
    let processes = Command::new("pgrep").args(["-x", "katavm"]).output()?.stdout;
    ensure!(processes.is_empty(), "processes are left: {}", String::from_utf8_lossy(&processes));
    let states: Vec<_> = fs::read_dir("/run/katavm").map(|entries| entries.flatten().collect()).unwrap_or_default();
    let states: Vec<_> = states.iter().filter(|entry| entry.path().is_dir()).map(fs::DirEntry::path).collect();
    ensure!(states.is_empty(), "state is left: {states:?}");
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let root = context.scratch().to_string_lossy().into_owned();
    ensure!(!mounts.contains(&root), "mounts are left:\n{mounts}");
    Ok(Verdict::Passed)
}
