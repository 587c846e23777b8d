//! What a lab is asked to do.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A folder of the machine outside that the lab sees at the same path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// Its path, outside and inside.
    pub path: PathBuf,
    /// Whether the lab may write to it.
    pub access: Access,
}

/// What the lab may do with a folder from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// Read it.
    ReadOnly,
    /// Write as well, into memory: forgotten with the machine.
    Scratch,
    /// Write to it.
    Writable,
}

/// A command and its surroundings; this is also what travels into the lab.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Environment; nothing else is set.
    pub env: Vec<(String, String)>,
    /// Working folder.
    pub cwd: PathBuf,
    /// Folders from outside, outer ones before those inside them.
    pub shares: Vec<Share>,
    /// Give the command a terminal of this many rows and columns; its output then all comes on stdout.
    pub terminal: Option<(u16, u16)>,
    /// Boot systemd, and run the command as a unit of it.
    pub systemd: bool,
    /// Tell the outside every few seconds that the machine lives.
    pub heartbeat: bool,
}

impl Job {
    /// Adds or replaces a variable of the command's environment.
    pub fn set_env(&mut self, name: &str, value: &str) {
        self.env.retain(|(old, _)| old != name);
        self.env.push((name.into(), value.into()));
    }

    /// Shows another folder, unless one of the shown folders holds it already with at least this access.
    pub fn share(&mut self, path: &Path, access: Access) {
        let covered = self.shares.iter().any(|share| path.starts_with(&share.path) && share.access >= access);
        if !covered {
            self.shares.push(Share { path: path.into(), access });
            self.shares.sort_by_key(|share| share.path.components().count());
        }
    }
}

/// The machine for a job.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Memory in MiB.
    pub memory_mib: u32,
    /// CPUs; the counting lab always has one.
    pub cpus: u32,
    /// The clock counts executed instructions, 1 ns each.
    pub counting: bool,
    /// The time that the job may take, boot included.
    pub limit: Duration,
    /// Where the machine's console goes as it comes; its tail is kept in any case.
    pub console: Option<PathBuf>,
}

impl Machine {
    /// The CPUs that it gets.
    #[must_use]
    pub fn cpu_count(&self) -> u32 {
        if self.counting { 1 } else { self.cpus }
    }
}

impl Default for Machine {
    fn default() -> Self {
        Self { memory_mib: 8192, cpus: 2, counting: false, limit: Duration::from_secs(600), console: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job() -> Job {
        Job {
            argv: vec!["true".into()],
            env: vec![("A".into(), "1".into())],
            cwd: "/".into(),
            shares: Vec::new(),
            terminal: None,
            systemd: false,
            heartbeat: true,
        }
    }

    #[test]
    fn outer_shares_come_first_and_cover_inner_ones() {
        let mut job = job();
        job.share(Path::new("/src/out"), Access::Writable);
        job.share(Path::new("/src"), Access::ReadOnly);
        job.share(Path::new("/src/target/lab"), Access::ReadOnly);
        let paths: Vec<_> = job.shares.iter().map(|share| share.path.to_str().unwrap_or_default()).collect();
        assert_eq!(paths, ["/src", "/src/out"]);
    }

    #[test]
    fn a_read_only_share_does_not_cover_a_writable_one() {
        let mut job = job();
        job.share(Path::new("/src"), Access::ReadOnly);
        job.share(Path::new("/src/out"), Access::Writable);
        assert_eq!(job.shares.len(), 2);
    }

    #[test]
    fn a_variable_is_replaced() {
        let mut job = job();
        job.set_env("A", "2");
        assert_eq!(job.env, [("A".to_string(), "2".to_string())]);
    }
}
