//! Counting a monitor's system calls with strace.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};

/// `command` under strace, all its processes and threads, with a line per call in `log`.
pub fn traced(command: &Command, log: &Path) -> Command {
    let mut strace = Command::new("strace");
    strace.args(["-f", "-s", "64", "-o"]).arg(log).arg("--").arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => strace.env(name, value),
            None => strace.env_remove(name),
        };
    }
    strace
}

/// How many calls `log` has before the first line with `words`, or all in all.
///
/// # Errors
/// When there is no such line.
pub fn count(log: &Path, until: Option<&str>) -> Result<u64> {
    let text = fs::read(log).with_context(|| format!("strace left no {}", log.display()))?;
    let text = String::from_utf8_lossy(&text);
    let text = match until {
        Some(words) => {
            let end = text.find(words).with_context(|| format!("{words:?} is not in strace's log"))?;
            &text[..end]
        }
        None => &text,
    };
    Ok(text.lines().filter(|line| begins_call(line)).count() as u64)
}

/// `123 openat(...` is one; `123 <... openat resumed>`, `123 --- SIGCHLD` and `123 +++ exited` are not.
fn begins_call(line: &str) -> bool {
    let call = line.split_once(' ').map_or("", |(_, rest)| rest.trim_start());
    call.starts_with(|first: char| first.is_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_counted_once_and_up_to_the_words() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = "12 execve(\"a\") = 0\n12 read(3,  <unfinished ...>\n13 write(4, \"x\") = 1\n\
                    12 <... read resumed>\"x\") = 1\n13 --- SIGCHLD {} ---\n13 ioctl(5) = ?\n13 +++ exited with 0 +++\n";
        fs::write(file.path(), text).unwrap();
        assert_eq!(count(file.path(), None).unwrap(), 4);
        assert_eq!(count(file.path(), Some("resumed")).unwrap(), 3);
        assert!(count(file.path(), Some("nowhere")).is_err());
    }
}
