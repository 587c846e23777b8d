//! Hooks on the host (OCI runtime specification, "POSIX-platform Hooks"): programs of an engine that are told the
//! container's state on their standard input at fixed points of its life.
//!
//! `startContainer` hooks are the guest's business: the agent runs them.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use oci_spec::runtime::{Hook, Hooks};
use serde_json::Value;

use crate::host;

/// How much of what a failed hook has said goes into the error.
const TOLD: usize = 2048;

/// Why a hook failed.
#[derive(Debug, thiserror::Error)]
#[error("error running {point} hook #{index} ({path}): {reason}")]
pub struct HookError {
    /// Where in the container's life.
    point: Point,
    /// From 0.
    index: usize,
    /// The program.
    path: PathBuf,
    /// What happened.
    reason: String,
}

/// A point of a container's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// Deprecated name of the next.
    Prestart,
    /// The namespaces are there, the container is not.
    CreateRuntime,
    /// The same, in the namespaces of the container.
    CreateContainer,
    /// The process was started.
    Poststart,
    /// The container was deleted.
    Poststop,
}

impl std::fmt::Display for Point {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Prestart => "prestart",
            Self::CreateRuntime => "createRuntime",
            Self::CreateContainer => "createContainer",
            Self::Poststart => "poststart",
            Self::Poststop => "poststop",
        })
    }
}

fn at(hooks: &Hooks, point: Point) -> &[Hook] {
    let list = match point {
        Point::Prestart => hooks.prestart(),
        Point::CreateRuntime => hooks.create_runtime(),
        Point::CreateContainer => hooks.create_container(),
        Point::Poststart => hooks.poststart(),
        Point::Poststop => hooks.poststop(),
    };
    list.as_deref().unwrap_or_default()
}

/// Runs the hooks of a point, one after the other; the first that fails ends it.
///
/// `state` is the container's (with `pid`, whose namespaces `createContainer` hooks run in).
///
/// # Errors
/// Which hook failed.
pub fn run(hooks: Option<&Hooks>, point: Point, state: &Value) -> Result<(), HookError> {
    for (index, hook) in hooks.map(|hooks| at(hooks, point)).unwrap_or_default().iter().enumerate() {
        let failed = |reason| HookError { point, index, path: hook.path().clone(), reason };
        run_one(hook, point, state).map_err(failed)?;
    }
    Ok(())
}

/// Runs the hooks of all points before there is a container; after a failure those that follow its end.
///
/// # Errors
/// Which hook failed.
pub fn run_before(hooks: Option<&Hooks>, state: &Value) -> Result<(), HookError> {
    let points = [Point::Prestart, Point::CreateRuntime, Point::CreateContainer];
    let outcome = points.into_iter().try_for_each(|point| run(hooks, point, state));
    outcome.inspect_err(|_| run_all(hooks, Point::Poststop, state))
}

/// Runs them all, whether one fails or not; failures are warned of.
pub fn run_all(hooks: Option<&Hooks>, point: Point, state: &Value) {
    for (index, hook) in hooks.map(|hooks| at(hooks, point)).unwrap_or_default().iter().enumerate() {
        if let Err(reason) = run_one(hook, point, state) {
            log::warn!("{}", HookError { point, index, path: hook.path().clone(), reason });
        }
    }
}

fn run_one(hook: &Hook, point: Point, state: &Value) -> Result<(), String> {
    let text = |error: io::Error| error.to_string();
    // A file, not a pipe: a hook may leave something behind that holds its outputs open.
    let mut output = host::scratch_file().map_err(text)?;
    let mut child = start(hook, point, state, &output).map_err(text)?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that does not read it is in its right.
        let _ = stdin.write_all(state.to_string().as_bytes());
    }
    let status = wait(&mut child, hook.timeout()).map_err(text)?;
    let status = status.ok_or_else(|| format!("it took longer than {} s", hook.timeout().unwrap_or_default()))?;
    if status.success() {
        return Ok(());
    }
    let mut told = String::new();
    let _ = output.rewind().and_then(|()| output.take(TOLD as u64).read_to_string(&mut told));
    Err(format!("{}{}{}", describe(status), if told.is_empty() { "" } else { ", " }, told.trim_end()))
}

fn start(hook: &Hook, point: Point, state: &Value, output: &File) -> io::Result<Child> {
    let mut command = Command::new(hook.path());
    let mut args = hook.args().iter().flatten();
    if let Some(name) = args.next() {
        command.arg0(name);
    }
    command.args(args).env_clear();
    for variable in hook.env().iter().flatten() {
        let (name, value) = variable.split_once('=').unwrap_or((variable, ""));
        command.env(name, value);
    }
    command.stdin(Stdio::piped()).stdout(output.try_clone()?).stderr(output.try_clone()?);
    if point == Point::CreateContainer
        && let Some(pid) = state["pid"].as_u64().filter(|pid| *pid > 0)
    {
        host::run_in_namespaces_of(&mut command, pid)?;
    }
    host::spawn(&mut command)
}

/// Waits for the end of a hook; kills one that takes too long.
fn wait(child: &mut Child, timeout: Option<i64>) -> io::Result<Option<ExitStatus>> {
    let timeout = timeout.and_then(|seconds| u64::try_from(seconds).ok()).filter(|seconds| *seconds > 0);
    if let Some(seconds) = timeout
        && !host::wait_for_end(child.id(), Duration::from_secs(seconds))?
    {
        child.kill()?;
        child.wait()?;
        return Ok(None);
    }
    child.wait().map(Some)
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, signal) => format!("signal {}", signal.unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn hooks(script: &str, timeout: Option<i64>) -> Hooks {
        let hook = json!({ "path": "/bin/sh", "args": ["hook", "-c", script], "env": ["A=b"], "timeout": timeout });
        serde_json::from_value(json!({ "createRuntime": [{ "path": "/bin/true" }, hook] })).unwrap()
    }

    fn try_one(script: &str, timeout: Option<i64>) -> Result<(), String> {
        let state = json!({ "id": "c1", "pid": 0 });
        run(Some(&hooks(script, timeout)), Point::CreateRuntime, &state).map_err(|error| error.to_string())
    }

    #[test]
    fn a_hook_gets_state_arguments_and_its_own_environment_only() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("out");
        try_one(&format!("echo $0 $A ${{HOME:-none}} >{0}; cat >>{0}", file.display()), None).unwrap();
        assert_eq!(std::fs::read_to_string(file).unwrap(), "hook b none\n{\"id\":\"c1\",\"pid\":0}");
    }

    #[test]
    fn a_hook_takes_signals_though_this_process_reads_them_from_a_descriptor() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("out");
        let script = format!("grep SigBlk /proc/self/status >{}", file.display());
        // A thread has a mask of its own.
        let run = move || {
            let _signals = crate::process::signals::Signals::block().unwrap();
            try_one(&script, None).unwrap();
        };
        std::thread::spawn(run).join().unwrap();
        assert_eq!(std::fs::read_to_string(file).unwrap(), "SigBlk:\t0000000000000000\n");
    }

    #[test]
    fn a_failure_is_told_with_what_the_hook_said() {
        let error = try_one("echo no luck >&2; exit 3", None).unwrap_err();
        assert_eq!(error, "error running createRuntime hook #1 (/bin/sh): exit status 3, no luck");
        let error = try_one("kill -9 $$", None).unwrap_err();
        assert!(error.ends_with("signal 9"), "{error}");
        run(Some(&hooks("exit 3", None)), Point::Poststop, &json!({})).unwrap();
    }

    #[test]
    fn a_hook_that_takes_too_long_is_killed() {
        let error = try_one("sleep 1000", Some(1)).unwrap_err();
        assert!(error.ends_with("it took longer than 1 s"), "{error}");
    }

    #[test]
    fn what_a_hook_leaves_behind_is_not_waited_for() {
        try_one("sleep 1000 & echo $! >&2", Some(20)).unwrap();
    }
}
