//! The watcher with real processes: this program runs itself as a sandbox process, and kills it.
//!
//! Without the test harness, because a process that forks must have one thread.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use katavm_runtime::state::StateRoot;
use katavm_runtime::watcher;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, role, root] = arguments.as_slice()
        && role == "sandbox"
    {
        return sandbox(Path::new(root));
    }
    let tests: [(&str, fn()); 4] = [
        ("an_orderly_end_leaves_nothing", an_orderly_end_leaves_nothing),
        ("a_killed_sandbox_is_cleaned_up", a_killed_sandbox_is_cleaned_up),
        ("a_killed_watcher_is_not_missed", a_killed_watcher_is_not_missed),
        ("after_both_are_killed_the_next_command_sweeps", after_both_are_killed_the_next_command_sweeps),
    ];
    for (name, test) in tests {
        test();
        println!("test watcher::{name} ... ok");
    }
    ExitCode::SUCCESS
}

/// The sandbox process: says who its watcher is, and ends when its standard input does.
fn sandbox(root: &Path) -> ExitCode {
    let root = StateRoot::open(root.into()).unwrap();
    let _inherited: Vec<fs::File> = (0..10).map(|_| fs::File::open("/dev/null").unwrap()).collect();
    let watcher = watcher::start(&root).unwrap();
    let state = root.claim(&"c1".parse().unwrap()).unwrap();
    println!("{}", children(std::process::id()).first().unwrap());
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
    drop(state);
    drop(watcher);
    assert!(children(std::process::id()).is_empty());
    ExitCode::from(7)
}

struct Case {
    _dir: tempfile::TempDir,
    root: PathBuf,
    sandbox: Child,
    watcher: i32,
}

impl Case {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        let mut sandbox = Command::new(std::env::current_exe().unwrap())
            .arg("sandbox")
            // Relative, as a user may give it: the watcher is elsewhere when it cleans up.
            .arg("root")
            .current_dir(dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(sandbox.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let case = Self { _dir: dir, root, sandbox, watcher: line.trim().parse().unwrap() };
        assert!(case.state().exists());
        case
    }

    fn state(&self) -> PathBuf {
        self.root.join("c1")
    }

    fn kill(pid: i32) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    }

    fn kill_sandbox(&mut self) {
        self.sandbox.kill().unwrap();
        self.sandbox.wait().unwrap();
    }

    fn watcher_is_gone(&self) -> bool {
        // A zombie that nobody has reaped yet holds nothing any more.
        fs::read_to_string(format!("/proc/{}/stat", self.watcher)).map_or(true, |stat| stat.contains(") Z "))
    }
}

fn children(pid: u32) -> Vec<i32> {
    let list = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    list.split_ascii_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

fn eventually(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn an_orderly_end_leaves_nothing() {
    let mut case = Case::start();
    drop(case.sandbox.stdin.take());
    assert_eq!(case.sandbox.wait().unwrap().code(), Some(7));
    assert!(!case.state().exists());
    assert!(case.watcher_is_gone());
}

fn a_killed_sandbox_is_cleaned_up() {
    let mut case = Case::start();
    let watcher = nix::unistd::Pid::from_raw(case.watcher);
    // It belongs to nobody's job: a hang-up or an interrupt of the terminal does not reach it, not even in the moment
    // when it begins.
    for signal in [nix::sys::signal::Signal::SIGTERM, nix::sys::signal::Signal::SIGHUP] {
        nix::sys::signal::kill(watcher, signal).unwrap();
    }
    // It does not hold what the sandbox process has inherited.
    let held = || fs::read_dir(format!("/proc/{watcher}/fd")).unwrap().count();
    eventually("the watcher holds too much", || held() <= 6);
    case.kill_sandbox();
    eventually("the state stays", || !case.state().exists());
    eventually("the watcher stays", || case.watcher_is_gone());
}

fn a_killed_watcher_is_not_missed() {
    let mut case = Case::start();
    Case::kill(case.watcher);
    drop(case.sandbox.stdin.take());
    assert_eq!(case.sandbox.wait().unwrap().code(), Some(7));
    assert!(!case.state().exists());
}

fn after_both_are_killed_the_next_command_sweeps() {
    let mut case = Case::start();
    Case::kill(case.watcher);
    eventually("the watcher stays", || case.watcher_is_gone());
    case.kill_sandbox();
    assert!(case.state().exists());
    let swept = StateRoot::open(case.root.clone()).unwrap().sweep().unwrap();
    assert_eq!(swept, ["c1".parse().unwrap()]);
    assert!(!case.state().exists());
}
