//! Commands and streams.

use std::fs;

use anyhow::{Result, ensure};
use serde_json::json;

use super::node::until;
use super::{Context, Pod, Verdict, on_node};
use crate::cri::messages::{AttachRequest, ExecRequest};
use crate::cri::stream::{Output, Streams};

fn command(container: &str, script: &str) -> ExecRequest {
    let cmd = ["sh", "-c", script].map(str::to_owned).to_vec();
    ExecRequest { container_id: container.into(), cmd, stdout: true, stderr: true, ..Default::default() }
}

pub fn exec(context: &Context) -> Result<Verdict> {
    on_node(context, |node| {
        let pod = Pod::run(node, "exec", |_| ())?;
        let id = pod.idle("main")?;
        let run = |request: &ExecRequest| Ok::<_, anyhow::Error>(Streams::open(&node.cri.exec(request)?)?);
        let output = run(&command(&id, "echo out; echo err >&2; exit 5"))?.finish()?;
        let expected = Output { stdout: b"out\n".into(), stderr: b"err\n".into(), code: Some(5) };
        ensure!(output == expected, "{output:?}");
        let output = run(&command(&id, "yes 0123456789abcdef | head -n 400000"))?.finish()?;
        let whole = output.stdout == "0123456789abcdef\n".repeat(400_000).as_bytes();
        ensure!(whole && output.code == Some(0), "{} bytes, {:?}", output.stdout.len(), output.code);
        let mut asked = run(&ExecRequest { stdin: true, ..command(&id, "read line; echo got $line") })?;
        asked.write(b"a line\n")?;
        let output = asked.finish()?;
        ensure!(output.stdout == b"got a line\n" && output.code == Some(0), "{output:?}");
        let terminal = ExecRequest { stdin: true, tty: true, stderr: false, ..command(&id, "") };
        let mut shell = run(&ExecRequest { cmd: vec!["sh".into()], ..terminal })?;
        shell.resize(91, 37)?;
        shell.write(b"until stty size | grep 37; do sleep 0.1; done; tty; exit 4\n")?;
        let output = shell.finish()?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(text.contains("37 91\r\n/dev/pts/") && output.code == Some(4), "{output:?}");
        let timeout = node.cri.exec_sync(&id, &["sleep", "1000"], 1);
        ensure!(timeout.is_err_and(|error| error.to_string().contains("timeout")), "no timeout");
        until("a command that was timed out goes on", || Ok(!pod.sh(&id, "ps -o args")?.contains("sleep 1000\n")))?;
        let missing = node.cri.exec_sync(&id, &["nosuch"], 10);
        let words = "executable file not found in $PATH";
        ensure!(missing.as_ref().is_err_and(|error| error.to_string().contains(words)), "{missing:?}");
        pod.remove()
    })
}

pub fn attach(context: &Context) -> Result<Verdict> {
    on_node(context, |node| {
        let pod = Pod::run(node, "attach", |_| ())?;
        let id = pod.start("main", &["sh", "-c", "while read line; do echo got $line; done; echo end"], |config| {
            config["stdin"] = json!(true);
        })?;
        let request =
            AttachRequest { container_id: id.clone(), stdin: true, stdout: true, stderr: true, ..Default::default() };
        let mut attached = Streams::open(&node.cri.attach(&request)?)?;
        attached.write(b"one\n")?;
        attached.read_until("got one\n")?;
        drop(attached);
        // Whoever comes next finds it still there.
        let mut attached = Streams::open(&node.cri.attach(&request)?)?;
        attached.write(b"two\n")?;
        attached.read_until("got two\n")?;
        // containerd tells those who are attached and the log one after the other.
        let lines = ["stdout F got one", "stdout F got two"];
        until("what was told to those who are attached is not in the log", || Ok(pod.log("main")? == lines))?;
        let terminal = pod.start("terminal", &["sh"], |config| {
            config["stdin"] = json!(true);
            config["tty"] = json!(true);
        })?;
        let request = AttachRequest {
            container_id: terminal.clone(),
            stdin: true,
            stdout: true,
            tty: true,
            ..Default::default()
        };
        let mut attached = Streams::open(&node.cri.attach(&request)?)?;
        attached.resize(80, 33)?;
        attached.write(b"until stty size | grep 33; do sleep 0.1; done; exit 6\n")?;
        attached.read_until("33 80\r\n")?;
        ensure!(pod.ended(&terminal)?.exit_code == 6, "{:?}", pod.ended(&terminal)?);
        pod.remove()
    })
}

pub fn logs(context: &Context) -> Result<Verdict> {
    on_node(context, |node| {
        let pod = Pod::run(node, "logs", |_| ())?;
        let script = "n=0; until [ -e /end ]; do n=$((n + 1)); echo line $n; sleep 0.05; done; head -c 40000 /dev/zero | tr '\\0' x; echo";
        let id = pod.start("main", &["sh", "-c", script], |_| ())?;
        let count =
            |name: &str| Ok::<_, anyhow::Error>(if pod.log_file(name).exists() { pod.log(name)?.len() } else { 0 });
        until("nothing is logged", || Ok(count("main")? > 3))?;
        // As the kubelet rotates.
        fs::rename(pod.log_file("main"), pod.log_file("old"))?;
        node.cri.reopen_log(&id)?;
        until("nothing is logged after the rotation", || Ok(count("main")? > 3))?;
        pod.sh(&id, "touch /end")?;
        pod.ended(&id)?;
        let log = [pod.log("old")?, pod.log("main")?].concat();
        let (long, lines): (Vec<_>, Vec<_>) = log.iter().partition(|line| line.contains('x'));
        ensure!(lines.iter().enumerate().all(|(n, line)| **line == format!("stdout F line {}", n + 1)), "{lines:?}");
        // A line longer than 16 KiB is cut, and each part but the last is marked so.
        let tags: Vec<_> = long.iter().map(|line| &line[..9]).collect();
        ensure!(tags == ["stdout P ", "stdout P ", "stdout F "], "{tags:?}");
        let length: usize = long.iter().map(|line| line.len() - 9).sum();
        ensure!(length == 40000, "{length} bytes");
        pod.remove()
    })
}
