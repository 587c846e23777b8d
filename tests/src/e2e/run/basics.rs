//! What a run is to begin with: a guest of its own, the process as `config.json` has it, its exit code.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::process::Stdio;

use anyhow::{Result, anyhow, ensure};
use rustix::process::{Signal, kill_process};
use serde_json::json;

use super::super::{Context, Table, Verdict};
use super::bundle::bundle;
use super::katavm::{Running, command, expect, katavm, run};

/// The table.
pub const CASES: Table = (
    "run",
    &[
        ("the_guest_kernel_and_exit_code_7", kernel_and_code),
        ("sigkill_is_137", killed),
        ("a_segmentation_fault_is_139", faulted),
        ("signals_are_passed_on", forwarded),
        ("user_cwd_environment_hostname_and_exit_code_0", process),
        ("a_read_only_root_stays_as_it_is", read_only),
        ("check_says_that_guests_run", check),
    ],
);

fn kernel_and_code(context: &Context) -> Result<Verdict> {
    let bundle = bundle(context, &["sh", "-c", "uname -r; exit 7"], |_| ())?;
    let args = [OsStr::new("run"), OsStr::new("--timings=json"), bundle.as_os_str()];
    let output = katavm(context, &args, b"")?;
    expect(&output, 7, &format!("{}\n", context.kernel_release()?), "kvm_exits")
}

/// SIGKILL reaches a process that is not the first of a pid namespace, so it has none of its own here.
fn killed(context: &Context) -> Result<Verdict> {
    let bundle = bundle(context, &["sh", "-c", "kill -9 $$"], |config| {
        if let Some(namespaces) = config["linux"]["namespaces"].as_array_mut() {
            namespaces.retain(|namespace| namespace["type"] != "pid");
        }
    })?;
    expect(&run(context, &bundle, b"")?, 137, "", "")
}

/// A fault ends the first process of a pid namespace as well: here its stack runs out.
fn faulted(context: &Context) -> Result<Verdict> {
    let bundle = bundle(context, &["sh", "-c", "f() { f; }; f"], |config| {
        config["process"]["rlimits"] = json!([{"type": "RLIMIT_STACK", "soft": 1 << 20, "hard": 1 << 20}]);
    })?;
    expect(&run(context, &bundle, b"")?, 139, "", "")
}

fn forwarded(context: &Context) -> Result<Verdict> {
    let script = "trap 'echo one' USR1; trap 'echo end; exit 3' TERM; echo ready; \
                  while :; do sleep 1000 & wait $!; kill $!; done";
    let bundle = bundle(context, &["sh", "-c", script], |_| ())?;
    let mut command = command();
    let mut katavm = Running::start(command.arg("run").arg(bundle).stdin(Stdio::null()).stdout(Stdio::piped()))?;
    let mut said = BufReader::new(katavm.stdout()?).lines();
    let mut heard = |word: &str| match said.next() {
        Some(Ok(line)) if line == word => Ok(()),
        other => Err(anyhow!("{other:?} instead of {word:?}")),
    };
    heard("ready")?;
    kill_process(katavm.pid(), Signal::USR1)?;
    heard("one")?;
    kill_process(katavm.pid(), Signal::TERM)?;
    heard("end")?;
    let status = katavm.wait()?;
    ensure!(status.code() == Some(3), "{status}");
    Ok(Verdict::Passed)
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

fn check(context: &Context) -> Result<Verdict> {
    let output = katavm(context, &["check"], b"")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(Verdict::Passed)
}
