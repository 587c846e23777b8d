//! The last steps of every process: its environment, its program, and the execution of it.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};

use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::{SFlag, fstat, makedev};
use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout, execve};
use oci_spec::runtime::{Process, Spec};

use super::lookup::{find, words};
use super::report::{self, Report};
use crate::error::Error;

/// The environment of a process: the last of equal names counts, and HOME is there.
pub fn environment(process: &Process, home: Option<String>) -> Vec<(String, String)> {
    let mut pairs: Vec<(String, String)> = Vec::new();
    for entry in process.env().iter().flatten() {
        let (name, value) = entry.split_once('=').unwrap_or((entry, ""));
        match pairs.iter_mut().find(|(known, _)| known == name) {
            Some((_, known)) => value.clone_into(known),
            None => pairs.push((name.to_owned(), value.to_owned())),
        }
    }
    if !pairs.iter().any(|(name, _)| name == "HOME") {
        pairs.push(("HOME".to_owned(), home.unwrap_or_else(|| "/".to_owned())));
    }
    pairs
}

/// The home directory of a user, by /etc/passwd of the container; "/" for one who is not in it.
pub fn home(uid: u32) -> String {
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    home_in(&passwd, uid).unwrap_or("/").to_owned()
}

fn home_in(passwd: &str, uid: u32) -> Option<&str> {
    let uid = uid.to_string();
    let line = passwd.lines().find(|line| line.split(':').nth(2) == Some(&uid))?;
    line.split(':').nth(5).filter(|home| !home.is_empty())
}

/// The program of a process.
///
/// # Errors
/// It is not there or may not be executed.
pub fn program(process: &Process) -> Result<CString, Error> {
    let name = process.args().as_deref().and_then(<[String]>::first).map_or("", String::as_str);
    let environment = environment(process, None);
    let path = environment.iter().find(|(name, _)| name == "PATH").map_or("", |(_, value)| value.as_str());
    find(name, path)
}

/// Makes those standard streams that are /dev/null fit for both directions: libcontainer opens the container's own
/// for reading alone, whatever stream it is for.
fn open_nulls_for_both() {
    let replace = |stream: BorrowedFd<'_>, onto: fn(&File) -> nix::Result<()>| {
        if is_read_only_null(stream)
            && let Ok(null) = OpenOptions::new().read(true).write(true).open("/dev/null")
        {
            // A container without the device, or whose seccomp profile forbids this, keeps the stream as it is.
            let _ = onto(&null);
        }
    };
    replace(io::stdin().as_fd(), |null| dup2_stdin(null));
    replace(io::stdout().as_fd(), |null| dup2_stdout(null));
    replace(io::stderr().as_fd(), |null| dup2_stderr(null));
}

fn is_read_only_null(stream: BorrowedFd<'_>) -> bool {
    let is_null = fstat(stream).is_ok_and(|stat| {
        SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) == SFlag::S_IFCHR
            && stat.st_rdev == makedev(1, 3)
    });
    let mode = fcntl(stream, FcntlArg::F_GETFL).map(|flags| OFlag::from_bits_truncate(flags) & OFlag::O_ACCMODE);
    is_null && mode == Ok(OFlag::O_RDONLY)
}

/// Executes the program of a process; returns only if that fails, and has told the process' standard error why.
pub fn execute(process: &Process, home: Option<String>) -> Error {
    let error = match try_execute(process, home) {
        Ok(never) => match never {},
        Err(error) => error,
    };
    // By now the container has been started: this is where its user looks.
    let _ = writeln!(std::io::stderr(), "{error}");
    error
}

fn try_execute(process: &Process, home: Option<String>) -> Result<std::convert::Infallible, Error> {
    let program = program(process)?;
    let text = |text: &str| CString::new(text).map_err(|_| Error::Invalid(format!("{text:?} holds a NUL byte")));
    let args = process.args().iter().flatten().map(|arg| text(arg)).collect::<Result<Vec<_>, _>>()?;
    let variables = environment(process, home);
    let variables = variables.iter().map(|(name, value)| text(&format!("{name}={value}")));
    let variables = variables.collect::<Result<Vec<_>, _>>()?;
    open_nulls_for_both();
    execve(&program, &args, &variables)
        .map_err(|errno| Error::Denied(format!("exec {}: {}", program.to_string_lossy(), words(Some(errno as i32)))))
}

/// How libcontainer executes the first process of a container.
#[derive(Clone)]
pub struct Program;

impl Executor for Program {
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let Some(process) = spec.process() else {
            return Err(ExecutorValidationError::ArgValidationError("no process".into()));
        };
        program(process).map(drop).map_err(|error| {
            let text = error.to_string();
            report::write(&Report::Failed { error });
            ExecutorValidationError::ArgValidationError(text)
        })
    }

    fn setup_envs(&self, envs: HashMap<String, String>) -> Result<(), libcontainer::workload::ExecutorSetEnvsError> {
        // libcontainer has looked up HOME; the rest is taken from the specification, in its order.
        if let Some(home) = envs.get("HOME") {
            // SAFETY: the helper and the processes that it makes have one thread.
            unsafe { std::env::set_var("HOME", home) };
        }
        Ok(())
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let process = spec.process().as_ref().ok_or(ExecutorError::InvalidArg)?;
        execute(process, std::env::var("HOME").ok());
        // SAFETY: _exit runs nothing of this process any more. Returning to libcontainer would end it with 255, but the
        // status of a program that cannot be executed is 1, as with runc.
        unsafe { libc::_exit(1) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_keeps_its_order_and_has_a_home() {
        let process: Process = serde_json::from_value(serde_json::json!({
            "cwd": "/", "user": {"uid": 0, "gid": 0}, "env": ["B=1", "A=2", "B=3", "EMPTY"]
        }))
        .unwrap();
        let pairs = environment(&process, Some("/root".into()));
        let text: Vec<_> = pairs.iter().map(|(name, value)| format!("{name}={value}")).collect();
        assert_eq!(text, ["B=3", "A=2", "EMPTY=", "HOME=/root"]);
    }

    #[test]
    fn a_null_device_that_cannot_be_written_is_found() {
        let open = |path: &str, write: bool| OpenOptions::new().read(true).write(write).open(path).unwrap();
        assert!(is_read_only_null(open("/dev/null", false).as_fd()));
        assert!(!is_read_only_null(open("/dev/null", true).as_fd()));
        assert!(!is_read_only_null(open("/dev/zero", false).as_fd()));
    }

    #[test]
    fn a_home_comes_from_passwd() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbroken\nwww:x:33:33::/var/www:/bin/sh\nnone:x:7:7:::\n";
        assert_eq!(home_in(passwd, 33), Some("/var/www"));
        assert_eq!(home_in(passwd, 7), None);
        assert_eq!(home_in(passwd, 1), None);
    }
}
