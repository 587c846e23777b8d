//! A case that stands still does not take the suite's time: it is ended, after a look at what everything waits for.

use std::fs;
use std::path::Path;
use std::process::exit;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::Result;

use super::context::kept;
use super::leftovers::listing;

/// How much of a command is told.
const COMMAND_LENGTH: usize = 120;

/// Watches a case until it is dropped.
pub struct Limit {
    _ended: Sender<()>,
}

/// Ends this program when the case `name` is not done after `limit`. What it started stays, as nobody knows what that does:
/// the other cases take another machine (`--after`).
///
/// # Errors
/// When there can be no further thread.
pub fn watch(name: &str, limit: Duration) -> Result<Limit> {
    let (_ended, end) = channel::<()>();
    let name = name.to_owned();
    thread::Builder::new().name("limit".into()).spawn(move || {
        if end.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
            tell(&name, limit);
            #[expect(clippy::exit, reason = "the thread of the case cannot be stopped in any other way")]
            exit(1);
        }
    })?;
    Ok(Limit { _ended })
}

fn tell(name: &str, limit: Duration) {
    println!("test {name} ... FAILED ({} s)\nit stood still; what threads wait for:", limit.as_secs());
    let threads = threads().join("\n");
    println!("{threads}");
    let folder = kept(name);
    let written = fs::create_dir_all(&folder).and_then(|()| fs::write(folder.join("threads"), &threads));
    match written {
        Ok(()) => println!("(kept in {})", folder.display()),
        Err(error) => println!("(not kept in {}: {error})", folder.display()),
    }
}

/// What threads wait for at a moment of the future, unless it is not wanted any more then.
pub struct Look {
    ended: Sender<()>,
    taken: JoinHandle<Option<String>>,
}

/// Looks after `time`.
///
/// # Errors
/// When there can be no further thread.
pub fn look(time: Duration) -> Result<Look> {
    let (ended, end) = channel::<()>();
    let late = move || {
        (end.recv_timeout(time) == Err(RecvTimeoutError::Timeout)).then(|| [threads(), commands()].concat().join("\n"))
    };
    Ok(Look { ended, taken: thread::Builder::new().name("look".into()).spawn(late)? })
}

impl Look {
    /// What was seen, if it has come to that.
    pub fn end(self) -> Option<String> {
        // Whoever looked already does not listen any more.
        let _ = self.ended.send(());
        self.taken.join().ok().flatten()
    }
}

/// How each process was started. Not for one that must not wait: the kernel may make it wait for the process.
fn commands() -> Vec<String> {
    let pids = listing(Path::new("/proc")).into_iter().filter(|name| name.parse::<u32>().is_ok());
    pids.filter_map(|pid| {
        let command =
            fs::read(Path::new("/proc").join(&pid).join("cmdline")).ok().filter(|command| !command.is_empty())?;
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        Some(format!("  {pid}: {}", command.chars().take(COMMAND_LENGTH).collect::<String>()))
    })
    .collect()
}

/// Process, thread, state and place in the kernel of each thread of ours and of the engines'. Some end in the meantime.
fn threads() -> Vec<String> {
    let mut lines = Vec::new();
    for pid in listing(Path::new("/proc")).iter().filter_map(|name| name.parse::<u32>().ok()) {
        let process = Path::new("/proc").join(pid.to_string());
        let text = |path: &Path| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        if fs::read_link(process.join("exe")).is_err() {
            // The kernel's own.
            continue;
        }
        let tasks = process.join("task");
        for thread in listing(&tasks).iter().map(|name| tasks.join(name)) {
            let stat = text(&thread.join("stat"));
            let state = stat.rsplit(')').next().and_then(|rest| rest.trim().chars().next()).unwrap_or('?');
            let stack = text(&thread.join("stack"));
            let stack: Vec<_> = stack.lines().filter_map(|line| line.split_whitespace().nth(1)).take(4).collect();
            let names = (text(&process.join("comm")), text(&thread.join("comm")));
            lines.push(format!("  {pid} {} {} {state} {}", names.0, names.1, stack.join(" < ")));
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_thread_is_seen() {
        let own = thread::Builder::new().name("seen".into()).spawn(threads).unwrap().join().unwrap();
        let pid = std::process::id().to_string();
        assert!(own.iter().any(|line| line.contains(&pid) && line.contains(" seen R")), "{own:#?}");
    }

    #[test]
    fn a_look_is_taken_late_or_not_at_all() {
        let late = look(Duration::ZERO).unwrap();
        while !late.taken.is_finished() {
            thread::yield_now();
        }
        assert!(late.end().unwrap().contains(&std::process::id().to_string()));
        assert_eq!(look(Duration::from_secs(3600)).unwrap().end(), None);
    }

    #[test]
    fn a_case_in_time_is_left_alone() {
        drop(watch("limit::in_time", Duration::from_secs(3600)).unwrap());
    }
}
