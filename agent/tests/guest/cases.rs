//! What is tried.

use std::io::{Read, Write};
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::time::{Duration, Instant};

use futures::FutureExt;
use katavm_protocol::agent::event::What;
use katavm_protocol::agent::{
    AdjustClockRequest, CheckRequest, CreateSandboxRequest, Empty, ResizeTerminalRequest, SignalRequest, Stdio,
    StreamKind,
};
use serde_json::{Value, json};
use ttrpc::Code;

use super::client::{
    Agent, Outcome, Streams, all_streams, connect, container, ids, process, read_all, removal, soon, spec, write_all,
};

macro_rules! cases {
    ($agent:expr, $filter:expr, $($name:ident),* $(,)?) => {
        $(if $filter.is_empty() || $filter.split(",").any(|part| stringify!($name).contains(part)) { case($agent, stringify!($name), $name($agent)).await; })*
    };
}

pub async fn run(agent: &Agent, filter: &str) {
    cases!(
        agent,
        filter,
        check,
        clock,
        sandbox,
        exit_status,
        isolation,
        environment,
        stdin_to_stdout,
        much_output,
        late_streams,
        stalled_output,
        both_outputs,
        failures,
        nothing_left,
        working_directory,
        signals,
        wait_often,
        execs,
        exec_failures,
        exec_ends_with_container,
        terminal,
        exec_terminal,
        user,
        user_terminal,
        pause,
        statistics,
        limits,
        out_of_memory,
        seccomp,
        seccomp_no_new_privileges,
        capabilities,
        null_streams,
        ids_in_use,
        events,
        hostile_links,
        orphans,
        rlimits,
        read_only,
        kill_all,
        devices,
        sequence,
    );
}

async fn case(agent: &Agent, name: &str, body: impl Future<Output = ()>) {
    let start = Instant::now();
    let result = AssertUnwindSafe(tokio::time::timeout(Duration::from_secs(90), body)).catch_unwind().await;
    let word = match result {
        Ok(Ok(())) => "ok",
        Ok(Err(_)) => "FAILED (time)",
        Err(_) => "FAILED",
    };
    println!("{word} {name} {} ms", start.elapsed().as_millis());
    if word != "ok" {
        // What a failed case has left must not fail the next.
        let _ = agent.client.remove_container(soon(), &removal("c1")).await;
    }
}

fn with(mut spec: Value, path: &str, value: Value) -> Value {
    let (above, key) = path.rsplit_once('/').expect("a JSON pointer");
    spec.pointer_mut(above).expect("a JSON pointer")[key] = value;
    spec
}

fn sh(script: &str) -> Value {
    spec(&["sh", "-c", script])
}

fn status(error: ttrpc::Error) -> (Code, String) {
    match error {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message),
        other => panic!("no status: {other}"),
    }
}

async fn check(agent: &Agent) {
    let reply = agent.client.check(soon(), &CheckRequest::new()).await.unwrap();
    assert_eq!(reply.version, env!("CARGO_PKG_VERSION"));
    assert_eq!(reply.kernel_release, std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap().trim());
}

async fn clock(agent: &Agent) {
    const HOUR_NS: i64 = 3_600_000_000_000;
    let now = async || agent.client.check(soon(), &CheckRequest::new()).await.unwrap().realtime_ns as i64;
    let adjust = async |offset_ns| {
        let request = AdjustClockRequest { offset_ns, ..Default::default() };
        agent.client.adjust_clock(soon(), &request).await
    };
    let before = now().await;
    adjust(HOUR_NS).await.unwrap();
    // A little is made up later.
    adjust(-50_000_000).await.unwrap();
    let gone = now().await - before - HOUR_NS;
    assert!((0..60_000_000_000).contains(&gone), "{gone}");
    adjust(-HOUR_NS).await.unwrap();
    let gone = now().await - before;
    assert!((0..60_000_000_000).contains(&gone), "{gone}");
    let (code, text) = status(adjust(i64::MIN).await.unwrap_err());
    assert!(text.contains("cannot adjust the clock"), "{code:?} {text}");
}

async fn sandbox(agent: &Agent) {
    let request = CreateSandboxRequest { hostname: "pod".into(), entropy: vec![7; 64], ..Default::default() };
    agent.client.create_sandbox(soon(), &request).await.unwrap();
    assert_eq!(std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap().trim(), "pod");
    let lost = CreateSandboxRequest { shared_tag: "nothing".into(), ..Default::default() };
    let (code, text) = status(agent.client.create_sandbox(soon(), &lost).await.unwrap_err());
    assert!(text.contains("nothing") || text.contains("CONFIG_VIRTIO_FS"), "{code:?} {text}");
}

async fn exit_status(agent: &Agent) {
    let outcome = agent.run("c1", &sh("echo hello; echo oops >&2; exit 7")).await;
    assert_eq!(outcome, Outcome { status: 7, stdout: "hello\n".into(), stderr: "oops\n".into() });
}

async fn isolation(agent: &Agent) {
    let script = "echo $$; hostname; ls /; ls /run/katavm 2>&1; cat /proc/1/comm; cat /proc/self/cgroup; \
                  ls /proc/self/fd | wc -l; cat /proc/keys | wc -c; echo 1 > /proc/sys/kernel/panic";
    let outcome = agent.run("c1", &sh(script)).await;
    let lines: Vec<_> = outcome.stdout.lines().collect();
    assert_eq!(&lines[..2], ["1", "box"], "{outcome:?}");
    assert!(!lines.contains(&"agent") && !lines.contains(&"rootfs") && lines.contains(&"bin"), "{outcome:?}");
    assert!(outcome.stdout.contains("/run/katavm: No such file"), "{outcome:?}");
    assert!(lines.contains(&"sh") && lines.contains(&"0::/"), "{outcome:?}");
    // 0, 1, 2 and the one that ls reads the directory by.
    assert_eq!(&lines[lines.len() - 2..], ["4", "0"], "{outcome:?}");
    assert!(outcome.stderr.contains("Read-only file system"), "{outcome:?}");
}

async fn environment(agent: &Agent) {
    let mut spec = spec(&["env"]);
    spec["process"]["env"] = json!(["PATH=/bin", "A=1", "B=x=y", "A=2"]);
    let outcome = agent.run("c1", &spec).await;
    assert_eq!(outcome.stdout, "PATH=/bin\nA=2\nB=x=y\nHOME=/root\n");
}

async fn stdin_to_stdout(agent: &Agent) {
    agent.create("c1", &spec(&["cat"]), all_streams()).await.unwrap();
    let streams = Streams::connect("c1", "");
    agent.start("c1").await;
    let data: Vec<u8> = (0..20_000_000u32).map(|n| (n % 253) as u8).collect();
    let (written, read) = (write_all(streams.stdin, data.clone()), read_all(streams.stdout));
    assert_eq!(agent.wait("c1", "").await.status, 0);
    written.await;
    let read = read.await;
    assert!(read == data, "{} of {} bytes came back", read.len(), data.len());
    agent.remove("c1").await;
}

async fn much_output(agent: &Agent) {
    let start = Instant::now();
    let outcome_len = 256 << 20;
    let spec = sh("dd if=/dev/zero bs=1M count=256 2> /dev/null");
    agent.create("c1", &spec, Stdio { stdout: true, ..Default::default() }).await.unwrap();
    let mut stdout = connect("c1", "", StreamKind::STREAM_KIND_STDOUT).unwrap();
    agent.start("c1").await;
    let len = tokio::task::spawn_blocking(move || std::io::copy(&mut stdout, &mut std::io::sink()).unwrap());
    assert_eq!(len.await.unwrap(), outcome_len);
    println!("# {} MiB/s", 256_000 / start.elapsed().as_millis());
    assert_eq!(agent.wait("c1", "").await.status, 0);
    agent.remove("c1").await;
}

async fn stalled_output(agent: &Agent) {
    agent.create("c1", &sh("cat /dev/zero"), all_streams()).await.unwrap();
    let mut streams = Streams::connect("c1", "");
    agent.start("c1").await;
    tokio::time::sleep(Duration::from_millis(700)).await;
    // The host does not read on, and yet the process can be killed.
    signal(agent, "c1", "", 9).await.unwrap();
    assert_eq!(agent.wait("c1", "").await.status, 137);
    agent.remove("c1").await;
    let rest = std::io::copy(&mut streams.stdout, &mut std::io::sink()).unwrap();
    assert!(rest > 65536, "{rest}");
}

async fn late_streams(agent: &Agent) {
    agent.create("c1", &sh("echo early"), Stdio { stdout: true, ..Default::default() }).await.unwrap();
    agent.start("c1").await;
    assert_eq!(agent.wait("c1", "").await.status, 0);
    let stdout = connect("c1", "", StreamKind::STREAM_KIND_STDOUT).unwrap();
    assert_eq!(read_all(stdout).await, b"early\n");
    assert!(connect("c1", "", StreamKind::STREAM_KIND_STDOUT).unwrap_err().contains("connected before"));
    assert!(connect("c1", "", StreamKind::STREAM_KIND_STDERR).is_err());
    assert!(connect("c2", "", StreamKind::STREAM_KIND_STDOUT).unwrap_err().contains("no container"));
    agent.remove("c1").await;
}

async fn both_outputs(agent: &Agent) {
    let script = "i=0; while [ $i -lt 200 ]; do echo out $i; echo err $i >&2; i=$((i+1)); done";
    let outcome = agent.run("c1", &sh(script)).await;
    assert_eq!(outcome.stdout.lines().last(), Some("out 199"));
    assert_eq!(outcome.stderr.lines().count(), 200);
}

async fn failure(agent: &Agent, spec: &Value) -> (Code, String) {
    status(agent.create("bad", spec, all_streams()).await.unwrap_err())
}

async fn failures(agent: &Agent) {
    let table = [
        (spec(&["foo"]), Code::NOT_FOUND, "exec: \"foo\": executable file not found in $PATH"),
        (spec(&["/foo"]), Code::NOT_FOUND, "exec: \"/foo\": stat /foo: no such file or directory"),
        (spec(&["/etc/plain"]), Code::PERMISSION_DENIED, "exec: \"/etc/plain\": permission denied"),
        (spec(&["/etc"]), Code::PERMISSION_DENIED, "exec: \"/etc\": is a directory"),
        (spec(&[]), Code::INVALID_ARGUMENT, "process.args is empty"),
        (
            with(sh("true"), "/process/cwd", "/etc/passwd".into()),
            Code::NOT_FOUND,
            "chdir to cwd (\"/etc/passwd\") set in config.json failed: not a directory",
        ),
        (with(sh("true"), "/root/path", "/nowhere".into()), Code::NOT_FOUND, "rootfs (\"/nowhere\") does not exist"),
    ];
    for (spec, code, text) in table {
        let (found_code, found_text) = failure(agent, &spec).await;
        assert_eq!((found_code, found_text.as_str()), (code, text));
    }
    let mount = json!([{"destination": "/mnt", "type": "bind", "source": "/missing", "options": ["bind"]}]);
    let (_, text) = failure(agent, &with(sh("true"), "/mounts", mount)).await;
    println!("# a bind mount's missing source: {text}");
    assert!(text.contains("/missing"), "{text}");
    let (code, text) = status(agent.create("../x", &sh("true"), all_streams()).await.unwrap_err());
    assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
}

async fn nothing_left(agent: &Agent) {
    let mounts = || std::fs::read_to_string("/proc/1/mounts").unwrap().lines().count();
    let before = mounts();
    failure(agent, &spec(&["foo"])).await;
    assert!(!Path::new("/sys/fs/cgroup/katavm/bad").exists());
    assert!(!Path::new("/run/katavm/containers/bad").exists());
    assert_eq!(agent.run("bad", &sh("exit 3")).await.status, 3);
    assert!(!Path::new("/sys/fs/cgroup/katavm/bad").exists());
    assert!(!Path::new("/run/katavm/containers/bad").exists());
    assert_eq!(mounts(), before);
    let (code, _) = status(agent.client.wait(soon(), &ids("bad", "")).await.unwrap_err());
    assert_eq!(code, Code::NOT_FOUND);
}

async fn working_directory(agent: &Agent) {
    let outcome = agent.run("c1", &with(spec(&["pwd"]), "/process/cwd", "/made/for/it".into())).await;
    assert_eq!((outcome.status, outcome.stdout.as_str()), (0, "/made/for/it\n"));
    assert!(Path::new("/rootfs/made/for/it").is_dir());
    let outcome = agent.run("c1", &with(spec(&["pwd"]), "/process/cwd", "/absolute/below".into())).await;
    assert_eq!(outcome.status, 0);
    assert!(Path::new("/rootfs/etc/below").is_dir() && !Path::new("/etc/below").exists());
}

async fn signal(agent: &Agent, id: &str, exec: &str, signal: u32) -> ttrpc::Result<Empty> {
    let request =
        SignalRequest { container_id: id.into(), exec_id: exec.into(), signal, all: false, ..Default::default() };
    agent.client.signal(soon(), &request).await
}

async fn signals(agent: &Agent) {
    agent
        .create("c1", &sh("trap 'echo got; exit 9' USR1; echo ready; while :; do sleep 0.05; done"), all_streams())
        .await
        .unwrap();
    let mut streams = Streams::connect("c1", "");
    agent.start("c1").await;
    let mut line = [0; 6];
    streams.stdout.read_exact(&mut line).unwrap();
    signal(agent, "c1", "", 10).await.unwrap();
    assert_eq!(agent.wait("c1", "").await.status, 9);
    assert_eq!(status(signal(agent, "c1", "", 9).await.unwrap_err()).0, Code::NOT_FOUND);
    agent.remove("c1").await;
    agent.create("c1", &sh("sleep 1000"), all_streams()).await.unwrap();
    // Before it is started, too.
    signal(agent, "c1", "", 9).await.unwrap();
    assert_eq!(agent.wait("c1", "").await.status, 137);
    let (code, text) = status(agent.client.start_container(soon(), &container("c1")).await.unwrap_err());
    assert_eq!(code, Code::FAILED_PRECONDITION, "{text}");
    agent.remove("c1").await;
}

async fn wait_often(agent: &Agent) {
    agent.create("c1", &sh("sleep 0.3; kill -SEGV $$; exit 5"), Stdio::new()).await.unwrap();
    agent.start("c1").await;
    let (one, two) = tokio::join!(agent.wait("c1", ""), agent.wait("c1", ""));
    assert_eq!(one, two);
    assert_eq!(agent.wait("c1", "").await, one);
    assert!(one.at_ns > 1_000_000_000 && !one.oom_killed);
    agent.remove("c1").await;
}

async fn execs(agent: &Agent) {
    agent.create("c1", &sh("mkdir -p /tmp/x; sleep 1000"), Stdio::new()).await.unwrap();
    let (code, _) = status(agent.create_exec("c1", "e0", &process(&["true"]), Stdio::new()).await.unwrap_err());
    assert_eq!(code, Code::FAILED_PRECONDITION);
    agent.start("c1").await;
    let script =
        "hostname; test -d /proc/1 && echo one; cat /proc/self/cgroup; ls /proc/self/fd | wc -l; pwd; cat; exit 4";
    let outcome =
        agent.exec("c1", "e1", &with(json!({"p": process(&["sh", "-c", script])}), "/p/cwd", "/tmp".into())["p"]).await;
    assert_eq!(outcome, Outcome { status: 4, stdout: "box\none\n0::/\n4\n/tmp\n".into(), stderr: String::new() });
    let mut user = process(&["sh", "-c", "id -u; id -g; id -G; echo $HOME; grep CapEff /proc/self/status; umask"]);
    user["user"] = json!({"uid": 1000, "gid": 1000, "additionalGids": [5, 6], "umask": 0o77});
    let outcome = agent.exec("c1", "e2", &user).await;
    assert_eq!(outcome.stdout, "1000\n1000\n1000 5 6\n/home/user\nCapEff:\t0000000000000000\n0077\n", "{outcome:?}");
    let mut root = process(&["sh", "-c", "grep CapEff /proc/self/status"]);
    root["capabilities"] = json!({"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"]});
    assert_eq!(agent.exec("c1", "e3", &root).await.stdout, "CapEff:\t0000000000000020\n");
    agent.remove("c1").await;
}

async fn exec_failures(agent: &Agent) {
    agent.create("c1", &sh("sleep 1000"), Stdio::new()).await.unwrap();
    agent.start("c1").await;
    let mut lost = process(&["pwd"]);
    lost["cwd"] = "/lost".into();
    let table = [
        (process(&["foo"]), Code::NOT_FOUND, "exec: \"foo\": executable file not found in $PATH"),
        (process(&["/etc/plain"]), Code::PERMISSION_DENIED, "exec: \"/etc/plain\": permission denied"),
        (lost, Code::NOT_FOUND, "chdir to cwd (\"/lost\") set in config.json failed: no such file or directory"),
    ];
    for (process, code, text) in table {
        let found = status(agent.create_exec("c1", "e1", &process, all_streams()).await.unwrap_err());
        assert_eq!((found.0, found.1.as_str()), (code, text));
    }
    // A file that the kernel cannot execute shows only at the start.
    let outcome = agent.exec("c1", "e1", &process(&["/etc/broken"])).await;
    assert_eq!(outcome.stderr, "exec /etc/broken: exec format error\n");
    assert_eq!(outcome.status, 127);
    assert_eq!(agent.client.list_processes(soon(), &container("c1")).await.unwrap().processes.len(), 1);
    agent.remove("c1").await;
}

async fn exec_ends_with_container(agent: &Agent) {
    let mut events = agent.client.events(soon(), &Empty::new()).await.unwrap();
    agent.create("c1", &spec(&["cat"]), Stdio { stdin: true, ..Default::default() }).await.unwrap();
    agent.start("c1").await;
    agent.create_exec("c1", "e1", &process(&["sleep", "1000"]), Stdio::new()).await.unwrap();
    agent.client.start_exec(soon(), &ids("c1", "e1")).await.unwrap();
    agent.create_exec("c1", "e2", &process(&["sleep", "1000"]), Stdio::new()).await.unwrap();
    agent.client.close_stdin(soon(), &ids("c1", "")).await.unwrap();
    assert_eq!(agent.wait("c1", "").await.status, 0);
    assert_eq!(agent.wait("c1", "e1").await.status, 137);
    assert_eq!(agent.wait("c1", "e2").await.status, 137);
    let mut seen = Vec::new();
    while seen.len() < 3 {
        let event = events.recv().await.unwrap().unwrap();
        let Some(What::Exit(exit)) = event.what else { panic!("{event}") };
        seen.push((event.exec_id, exit.status));
    }
    assert_eq!(seen.last().unwrap(), &(String::new(), 0), "{seen:?}");
    agent.remove("c1").await;
}

fn read_until(stream: &mut std::os::unix::net::UnixStream, end: &str) -> String {
    let mut text = String::new();
    let mut buffer = [0; 1024];
    while !text.contains(end) {
        let len = stream.read(&mut buffer).unwrap();
        assert_ne!(len, 0, "the terminal ended: {text:?}");
        text += &String::from_utf8_lossy(&buffer[..len]);
    }
    text
}

async fn drive_terminal(agent: &Agent, exec: &str, mut stream: std::os::unix::net::UnixStream) {
    let text = read_until(&mut stream, "40 100");
    assert!(text.contains("/dev/pts/") || text.contains("/dev/console"), "{text:?}");
    let request = ResizeTerminalRequest {
        container_id: "c1".into(),
        exec_id: exec.into(),
        rows: 50,
        columns: 132,
        ..Default::default()
    };
    agent.client.resize_terminal(soon(), &request).await.unwrap();
    stream.write_all(b"stty size\n").unwrap();
    read_until(&mut stream, "50 132");
    stream.write_all(b"sleep 1000\n").unwrap();
    std::thread::sleep(Duration::from_millis(300));
    stream.write_all(b"\x03").unwrap();
    stream.write_all(b"echo inter''rupted; exit 6\n").unwrap();
    read_until(&mut stream, "interrupted");
    assert_eq!(agent.wait("c1", exec).await.status, 6);
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
}

const SIZED: (u32, u32) = (40, 100);

async fn terminal(agent: &Agent) {
    let spec = with(sh("tty; stty size; exec sh"), "/process/terminal", true.into());
    let stdio = Stdio { stdin: true, stdout: true, rows: SIZED.0, columns: SIZED.1, ..Default::default() };
    agent.create("c1", &spec, stdio).await.unwrap();
    let stream = connect("c1", "", StreamKind::STREAM_KIND_TERMINAL).unwrap();
    agent.start("c1").await;
    drive_terminal(agent, "", stream).await;
    agent.remove("c1").await;
}

async fn exec_terminal(agent: &Agent) {
    agent.create("c1", &sh("sleep 1000"), Stdio::new()).await.unwrap();
    agent.start("c1").await;
    let mut process = process(&["sh", "-c", "tty; stty size; exec sh"]);
    process["terminal"] = true.into();
    let stdio = Stdio { stdin: true, stdout: true, rows: SIZED.0, columns: SIZED.1, ..Default::default() };
    agent.create_exec("c1", "e1", &process, stdio).await.unwrap();
    let stream = connect("c1", "e1", StreamKind::STREAM_KIND_TERMINAL).unwrap();
    agent.client.start_exec(soon(), &ids("c1", "e1")).await.unwrap();
    drive_terminal(agent, "e1", stream).await;
    agent.remove("c1").await;
}

async fn user(agent: &Agent) {
    let script =
        "id -u; echo again > /dev/stdout; echo wrong > /dev/stderr; cat /dev/stdin; grep CapEff /proc/self/status";
    let spec = with(sh(script), "/process/user", json!({"uid": 1000, "gid": 1000}));
    let outcome = agent.run("c1", &spec).await;
    let stdout = "1000\nagain\nCapEff:\t0000000000000000\n";
    assert_eq!(outcome, Outcome { status: 0, stdout: stdout.into(), stderr: "wrong\n".into() });
}

async fn user_terminal(agent: &Agent) {
    let spec =
        with(sh("echo named > $(tty) && echo open > /dev/tty"), "/process/user", json!({"uid": 1000, "gid": 1000}));
    let spec = with(spec, "/process/terminal", true.into());
    agent.create("c1", &spec, Stdio { stdin: true, stdout: true, ..Default::default() }).await.unwrap();
    let stream = connect("c1", "", StreamKind::STREAM_KIND_TERMINAL).unwrap();
    agent.start("c1").await;
    let text = String::from_utf8(read_all(stream).await).unwrap();
    assert_eq!((agent.wait("c1", "").await.status, text.as_str()), (0, "named\r\nopen\r\n"));
    agent.remove("c1").await;
}

async fn pause(agent: &Agent) {
    agent.create("c1", &sh("while :; do echo tick; sleep 0.02; done"), all_streams()).await.unwrap();
    let mut stdout = Streams::connect("c1", "").stdout;
    agent.start("c1").await;
    let mut buffer = [0; 65536];
    assert_ne!(stdout.read(&mut buffer).unwrap(), 0);
    agent.client.pause(soon(), &container("c1")).await.unwrap();
    stdout.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    while stdout.read(&mut buffer).is_ok() {}
    agent.client.resume(soon(), &container("c1")).await.unwrap();
    stdout.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    assert_ne!(stdout.read(&mut buffer).unwrap(), 0);
    agent.client.pause(soon(), &container("c1")).await.unwrap();
    // A frozen one can be removed as well.
    agent.remove("c1").await;
}

async fn statistics(agent: &Agent) {
    let spec = with(
        sh("i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; sleep 1000"),
        "/linux/resources",
        json!({
            "pids": {"limit": 64}, "memory": {"limit": 67_108_864}
        }),
    );
    agent.create("c1", &spec, Stdio::new()).await.unwrap();
    agent.start("c1").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let stats = agent.client.stats(soon(), &container("c1")).await.unwrap();
    assert!(
        stats.cpu_usage_usec > 1000 && stats.memory_current > 4096 && stats.memory_peak >= stats.memory_current,
        "{stats}"
    );
    assert_eq!((stats.memory_max, stats.pids_max), (67_108_864, 64));
    assert!(stats.pids_current >= 1 && stats.memory_stat.contains_key("anon"), "{stats}");
    agent.remove("c1").await;
}

async fn limits(agent: &Agent) {
    let spec = with(
        sh("for i in 1 2 3 4 5 6 7 8 9; do sleep 5 & done; wait; echo done"),
        "/linux/resources",
        json!({
            "pids": {"limit": 5}, "cpu": {"quota": 20000, "period": 100_000, "shares": 512}
        }),
    );
    let outcome = agent.run("c1", &spec).await;
    assert!(outcome.stderr.contains("fork"), "{outcome:?}");
}

async fn out_of_memory(agent: &Agent) {
    let mut events = agent.client.events(soon(), &Empty::new()).await.unwrap();
    let spec = with(
        spec(&["tail", "/dev/zero"]),
        "/linux/resources",
        json!({"memory": {"limit": 16_777_216, "swap": 16_777_216}}),
    );
    agent.create("c1", &spec, Stdio::new()).await.unwrap();
    agent.start("c1").await;
    let exit = agent.wait("c1", "").await;
    assert_eq!((exit.status, exit.oom_killed), (137, true));
    let mut seen = Vec::new();
    for _ in 0..2 {
        seen.push(match events.recv().await.unwrap().unwrap().what.unwrap() {
            What::Oom(oom) => {
                assert_eq!((oom.kills, exit.oom_kills), (1, 1));
                "oom"
            }
            What::Exit(_) => "exit",
            _ => "?",
        });
    }
    assert_eq!(seen, ["oom", "exit"]);
    agent.remove("c1").await;
}

async fn with_profile(agent: &Agent, no_new_privileges: Value) {
    let profile = json!({
        "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{"names": ["mkdir", "mkdirat", "no_such_call"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]
    });
    let script = "grep -E '^(Seccomp|NoNewPrivs):' /proc/self/status; mkdir /tmp/denied; sleep 1000";
    let spec = with(sh(script), "/linux/seccomp", profile);
    let spec = with(spec, "/process/noNewPrivileges", no_new_privileges.clone());
    agent.create("c1", &spec, all_streams()).await.unwrap();
    let Streams { mut stdout, mut stderr, .. } = Streams::connect("c1", "");
    agent.start("c1").await;
    let flag = u8::from(no_new_privileges == json!(true));
    assert_eq!(read_until(&mut stdout, "Seccomp:\t2\n"), format!("NoNewPrivs:\t{flag}\nSeccomp:\t2\n"));
    read_until(&mut stderr, "not supported");
    let mut again = process(&["sh", "-c", "grep Seccomp: /proc/self/status; mkdir /tmp/denied"]);
    again["noNewPrivileges"] = no_new_privileges;
    let outcome = agent.exec("c1", "e1", &again).await;
    assert_eq!((outcome.status, outcome.stdout.as_str()), (1, "Seccomp:\t2\n"), "{outcome:?}");
    assert!(outcome.stderr.contains("not supported"), "{outcome:?}");
    agent.remove("c1").await;
}

async fn seccomp(agent: &Agent) {
    with_profile(agent, Value::Null).await;
    with_profile(agent, json!(false)).await;
}

async fn seccomp_no_new_privileges(agent: &Agent) {
    with_profile(agent, json!(true)).await;
}

async fn capabilities(agent: &Agent) {
    let script = "grep -E '^Cap(Eff|Bnd)' /proc/self/status";
    let outcome = agent.run("c1", &sh(script)).await;
    assert_eq!(outcome.stdout, "CapEff:\t00000000080000eb\nCapBnd:\t00000000080000eb\n");
    let outcome = agent.run("c1", &with(sh(script), "/process/capabilities", Value::Null)).await;
    assert_eq!(outcome.stdout, "CapEff:\t0000000000000000\nCapBnd:\t0000000000000000\n");
}

async fn null_streams(agent: &Agent) {
    agent.create("c1", &sh("cat; echo lost; readlink /proc/self/fd/1 > /tmp/fd"), Stdio::new()).await.unwrap();
    agent.start("c1").await;
    assert_eq!(agent.wait("c1", "").await.status, 0);
    assert_eq!(std::fs::read_to_string("/rootfs/tmp/fd").unwrap(), "/tmp/fd\n");
    agent.remove("c1").await;
}

async fn ids_in_use(agent: &Agent) {
    agent.create("c1", &sh("sleep 1000"), Stdio::new()).await.unwrap();
    let (code, _) = status(agent.create("c1", &sh("true"), Stdio::new()).await.unwrap_err());
    assert_eq!(code, Code::ALREADY_EXISTS);
    agent.start("c1").await;
    let (code, text) = status(agent.client.start_container(soon(), &container("c1")).await.unwrap_err());
    assert_eq!(code, Code::FAILED_PRECONDITION, "{text}");
    agent.create_exec("c1", "e1", &process(&["true"]), Stdio::new()).await.unwrap();
    let (code, _) = status(agent.create_exec("c1", "e1", &process(&["true"]), Stdio::new()).await.unwrap_err());
    assert_eq!(code, Code::ALREADY_EXISTS);
    agent.remove("c1").await;
    let (code, _) = status(agent.client.remove_container(soon(), &removal("c1")).await.unwrap_err());
    assert_eq!(code, Code::NOT_FOUND);
}

async fn events(agent: &Agent) {
    let mut one = agent.client.events(soon(), &Empty::new()).await.unwrap();
    let mut two = agent.client.events(soon(), &Empty::new()).await.unwrap();
    for status in [0, 1, 2] {
        assert_eq!(agent.run(&format!("c{status}"), &sh(&format!("exit {status}"))).await.status, status);
    }
    for events in [&mut one, &mut two] {
        for expected in [0, 1, 2] {
            let event = events.recv().await.unwrap().unwrap();
            let Some(What::Exit(exit)) = &event.what else { panic!("{event}") };
            assert_eq!((event.container_id.as_str(), exit.status), (format!("c{expected}").as_str(), expected));
        }
    }
}

async fn hostile_links(agent: &Agent) {
    // A root file system whose mount points are links that lead out of it.
    let root = Path::new("/hostile");
    std::fs::create_dir_all(root.join("bin")).unwrap();
    std::fs::copy("/rootfs/bin/busybox", root.join("bin/busybox")).unwrap();
    for name in ["sh", "true"] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(name)).unwrap();
    }
    std::fs::create_dir_all("/outside").unwrap();
    for name in ["dev", "sys", "data"] {
        std::os::unix::fs::symlink("../../../outside", root.join(name)).unwrap();
    }
    let spec = with(sh("true"), "/root/path", "/hostile".into());
    let spec = with(spec, "/process/cwd", "/data/deep".into());
    let created = agent.create("c1", &spec, Stdio::new()).await;
    println!("# links as mount points: {:?}", created.as_ref().map_err(ToString::to_string));
    if created.is_ok() {
        agent.remove("c1").await;
    }
    assert_eq!(std::fs::read_dir("/outside").unwrap().count(), 0);
}

async fn orphans(agent: &Agent) {
    let zombies = || {
        let entries = std::fs::read_dir("/proc").unwrap().flatten();
        entries
            .filter(|entry| {
                let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
                stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('Z'))
            })
            .count()
    };
    agent.run("c1", &sh("(sleep 0.1 &); (sleep 1000 &); true")).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(zombies(), 0);
}

async fn rlimits(agent: &Agent) {
    let outcome = agent.run("c1", &sh("ulimit -n; ulimit -Hn")).await;
    assert_eq!(outcome.stdout, "1024\n524288\n");
    let limits = json!([{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 99}]);
    let outcome = agent.run("c1", &with(sh("ulimit -n; ulimit -Hn"), "/process/rlimits", limits)).await;
    assert_eq!(outcome.stdout, "77\n99\n");
}

async fn read_only(agent: &Agent) {
    let outcome = agent.run("c1", &with(sh("echo x > /file; echo $?"), "/root/readonly", true.into())).await;
    assert!(outcome.stdout == "1\n" && outcome.stderr.contains("Read-only"), "{outcome:?}");
}

async fn kill_all(agent: &Agent) {
    agent
        .create("c1", &sh("trap 'exit 3' TERM; sleep 1000 & sleep 1000 & echo up; wait"), all_streams())
        .await
        .unwrap();
    let mut stdout = Streams::connect("c1", "").stdout;
    agent.start("c1").await;
    read_until(&mut stdout, "up");
    let request = |signal| SignalRequest { container_id: "c1".into(), signal, all: true, ..Default::default() };
    assert_eq!(status(agent.client.signal(soon(), &request(99)).await.unwrap_err()).0, Code::INVALID_ARGUMENT);
    assert_eq!(agent.client.list_processes(soon(), &container("c1")).await.unwrap().processes.len(), 3);
    agent.client.signal(soon(), &request(15)).await.unwrap();
    assert_eq!(agent.wait("c1", "").await.status, 3);
    assert!(agent.client.list_processes(soon(), &container("c1")).await.unwrap().processes.is_empty());
    agent.remove("c1").await;
}

async fn devices(agent: &Agent) {
    let script = "cd /tmp; mknod mem c 1 1; mknod serial c 4 64; mknod zero c 1 5; head -c 2 zero | wc -c; \
                  echo '# by the serial port' > serial && echo written; head -c 1 mem; head -c 1 serial; rm mem serial zero";
    let rules = json!({"devices": [
        {"allow": false, "access": "rwm"}, {"allow": true, "type": "c", "major": 4, "minor": 64, "access": "w"}
    ]});
    let outcome = agent.run("c1", &with(sh(script), "/linux/resources", rules)).await;
    assert_eq!(outcome.stdout, "2\nwritten\n", "{outcome:?}");
    assert_eq!(outcome.stderr.matches("Operation not permitted").count(), 2, "{outcome:?}");
    agent.create("c1", &sh("sleep 1000"), Stdio::new()).await.unwrap();
    agent.start("c1").await;
    let script = "cd /tmp; mknod serial c 4 64; echo x > serial; rm serial";
    let outcome = agent.exec("c1", "e1", &process(&["sh", "-c", script])).await;
    assert!(outcome.stderr.contains("Operation not permitted"), "{outcome:?}");
    agent.remove("c1").await;
}

async fn sequence(agent: &Agent) {
    let start = Instant::now();
    for _ in 0..10 {
        assert_eq!(agent.run("c1", &spec(&["true"])).await.status, 0);
    }
    println!("# {} ms for a container's whole life", start.elapsed().as_millis() / 10);
}
