//! A sub-reaper with real processes. Alone in a program of its own, as this is a matter of the whole process.

use std::io::Read as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use katavm_runtime::host;

fn until(what: &str, done: impl Fn() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn has_ended(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z "))
}

#[test]
fn orphans_are_reaped_and_children_left_to_who_made_them() {
    host::adopt_orphans().unwrap();
    let mut made = host::spawn(Command::new("sh").args(["-c", "exit 3"])).unwrap();
    let leaves = "sleep 0.3 & echo $!; sleep 1000 >/dev/null & echo $!";
    let mut parent = host::spawn(Command::new("sh").args(["-c", leaves]).stdout(Stdio::piped())).unwrap();
    let mut left = String::new();
    parent.stdout.take().unwrap().read_to_string(&mut left).unwrap();
    let left: Vec<u32> = left.lines().map(|pid| pid.parse().unwrap()).collect();
    until("the children end", || has_ended(made.id()) && has_ended(parent.id()));
    let is_there = |pid: u32| Path::new(&format!("/proc/{pid}")).exists();
    until("the orphan ends", || has_ended(left[0]));
    host::reap_orphans().unwrap();
    assert_eq!(left.iter().map(|pid| is_there(*pid)).collect::<Vec<_>>(), [false, true]);
    host::kill(left[1]).unwrap();
    until("the other is reaped", || {
        host::reap_orphans().unwrap();
        !is_there(left[1])
    });
    assert_eq!((made.wait().unwrap().code(), parent.wait().unwrap().code()), (Some(3), Some(0)));
}
