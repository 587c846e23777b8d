//! What a sandbox could leave behind on the host: one look at everything, to be compared with a look before.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::context::is_lab;

/// How long what is being cleaned up may take, on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);
/// The runtime's own files in a state root, which stay.
const KEPT: [&str; 3] = [".lock", ".kvm-works", ".containerd"];
/// Names of processes of a sandbox.
const PROCESSES: [&str; 6] = ["katavm", "katavm-watcher", "katavm-sandbox", "katavm-standin", "passt", "passt.avx2"];

/// What there is at one moment.
pub struct Traces {
    bundle: PathBuf,
    state: PathBuf,
    found: BTreeSet<String>,
}

impl Traces {
    /// Looks at the host, at root's state folder, and at who uses `bundle`.
    pub fn of(bundle: &Path) -> Self {
        Self::with_state(bundle, Path::new("/run/katavm"))
    }

    /// The same with another state folder.
    pub fn with_state(bundle: &Path, state: &Path) -> Self {
        let mut traces = Self { bundle: bundle.into(), state: state.into(), found: BTreeSet::new() };
        traces.look();
        traces
    }

    /// Waits until there is nothing that was not there before; whose clean-up it is, is the caller's matter.
    ///
    /// # Errors
    /// What stays.
    pub fn expect_nothing_new(&self) -> Result<()> {
        let start = Instant::now();
        loop {
            let left = self.new_ones();
            if left.is_empty() {
                return Ok(());
            }
            ensure!(start.elapsed() < LIMIT, "left behind:\n  {}", left.join("\n  "));
            // Processes of others, mounts, groups and sockets: there is no one event for all of them.
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Asks that nothing of katavm is there now that was not before: an engine's own things may stay.
    ///
    /// # Errors
    /// What is there.
    pub fn expect_nothing_of_katavm(&self) -> Result<()> {
        let left: Vec<_> = self.new_ones().into_iter().filter(|trace| trace.contains("katavm")).collect();
        ensure!(left.is_empty(), "left behind: {left:?}");
        Ok(())
    }

    /// What is there now and was not before.
    pub fn new_ones(&self) -> Vec<String> {
        Self::with_state(&self.bundle, &self.state).found.difference(&self.found).cloned().collect()
    }

    fn look(&mut self) {
        self.processes();
        self.mounts();
        self.groups();
        self.names("state", &self.state.clone(), |name| !KEPT.contains(&name));
        self.sockets();
        self.names("network interface", Path::new("/sys/class/net"), |_| true);
        self.names("virtual machine", Path::new("/sys/kernel/debug/kvm"), |name| name.contains('-'));
        self.names("shared memory", Path::new("/dev/shm"), |_| true);
        if is_lab() {
            // Elsewhere others make files there all the time. This program's own scratch folders aside.
            self.names("temporary file", Path::new("/tmp"), |name| !name.starts_with("katavm-e2e-"));
        }
    }

    fn add(&mut self, kind: &str, what: impl std::fmt::Display) {
        self.found.insert(format!("{kind} {what}"));
    }

    fn names(&mut self, kind: &str, folder: &Path, counts: impl Fn(&str) -> bool) {
        for name in listing(folder).iter().filter(|name| counts(name)) {
            self.add(kind, folder.join(name).display());
        }
    }

    /// Processes of sandboxes, ended ones that nobody has reaped included, and what any process has open of the bundle.
    fn processes(&mut self) {
        for pid in listing(Path::new("/proc")).iter().filter(|name| name.bytes().all(|byte| byte.is_ascii_digit())) {
            let process = Path::new("/proc").join(pid);
            let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
            if PROCESSES.contains(&name.trim()) {
                self.add("process", format_args!("{pid} {}", name.trim()));
            }
            let descriptors = listing(&process.join("fd")).into_iter().map(|fd| format!("fd/{fd}"));
            for link in descriptors.chain(["cwd".into(), "root".into()]) {
                if let Ok(target) = fs::read_link(process.join(&link))
                    && target.starts_with(&self.bundle)
                {
                    self.add("open file", format_args!("{} of process {pid} {}", target.display(), name.trim()));
                }
            }
        }
    }

    /// Mounts that this process sees, and mount namespaces that somebody holds.
    fn mounts(&mut self) {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        for line in mounts.lines() {
            let point = line.split_ascii_whitespace().nth(4).unwrap_or_default();
            if is_lab() || point.contains("katavm") || Path::new(point).starts_with(&self.bundle) {
                self.add("mount", line);
            }
        }
    }

    fn groups(&mut self) {
        let mut folders = vec![PathBuf::from("/sys/fs/cgroup")];
        while let Some(folder) = folders.pop() {
            let entries = fs::read_dir(&folder).map(|entries| entries.flatten().collect::<Vec<_>>());
            let below = entries.unwrap_or_default().into_iter();
            folders.extend(below.filter(|e| e.file_type().is_ok_and(|kind| kind.is_dir())).map(|e| e.path()));
            if is_lab() || folder.to_string_lossy().contains("katavm") {
                self.add("cgroup", folder.display());
            }
        }
    }

    /// Unix sockets with a name, in a file system or abstract (proc_net(5), the eighth column).
    fn sockets(&mut self) {
        let sockets = fs::read_to_string("/proc/net/unix").unwrap_or_default();
        let names = sockets.lines().skip(1).filter_map(|line| line.split_ascii_whitespace().nth(7));
        for name in names.filter(|name| is_lab() || name.contains("katavm")) {
            self.add("socket", name);
        }
    }
}

/// Names in a folder; none where it is not, or not any more.
pub fn listing(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).map(|entries| entries.flatten().collect::<Vec<_>>()).unwrap_or_default();
    entries.iter().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}
