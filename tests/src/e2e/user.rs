//! `katavm run` as an ordinary user who may open `/dev/kvm`, on a bundle of their own, without root anywhere.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Signal, geteuid, kill_process};
use serde_json::json;

use super::context::is_lab;
use super::leftovers::Traces;
use super::process::Started;
use super::run::bundle;
use super::{Context, Table, Verdict};

/// The table.
pub const CASES: Table =
    ("user", &[("runs_a_bundle_of_their_own_without_root", own_bundle), ("has_a_network_without_root", own_network)]);

/// Somebody whom no password file knows.
const USER: u32 = 61_234;
const LIMIT: Duration = Duration::from_secs(240);
/// The device.
const KVM: &str = "/dev/kvm";

/// `/dev/kvm` as it was, when this is dropped.
pub(super) struct KvmAccess {
    before: Option<(u32, u32)>,
    group: u32,
}

impl KvmAccess {
    /// The group that may open it; in the lab it gets one if it has none.
    pub(super) fn grant() -> Result<Option<Self>> {
        let device = fs::metadata(KVM)?;
        if device.gid() != 0 && device.mode() & 0o060 == 0o060 {
            return Ok(Some(Self { before: None, group: device.gid() }));
        }
        if !is_lab() {
            return Ok(None);
        }
        let access = Self { before: Some((device.gid(), device.mode() & 0o7777)), group: 61_235 };
        chown(KVM, None, Some(access.group))?;
        fs::set_permissions(KVM, fs::Permissions::from_mode(0o660))?;
        Ok(Some(access))
    }

    /// That group.
    pub(super) fn group(&self) -> u32 {
        self.group
    }
}

impl Drop for KvmAccess {
    fn drop(&mut self) {
        if let Some((group, mode)) = self.before {
            let restored =
                chown(KVM, None, Some(group)).and_then(|()| fs::set_permissions(KVM, fs::Permissions::from_mode(mode)));
            restored.unwrap_or_else(|error| println!("cannot give {KVM} its group and mode back: {error}"));
        }
    }
}

/// What of a file's owner can be had, and what cannot.
const SCRIPT: &str = "id -u; stat -c '%u %a' /mine; cat /mine; echo changed >> /mine; \
                      mkdir -m 2750 /new; echo x > /new/file; stat -c '%u %g' /new/file; \
                      chown 33:44 /new/file 2>&1; chown 0:0 /new/file 2>&1; mknod /new/null c 1 3 2>&1; \
                      cat /secret 2>&1; stat -c '%u %g' /new/file; chmod 4711 /new/file; \
                      mkfifo /new/pipe && ln /new/file /new/link && ls /new | tr '\\n' ' '; exit 7";

fn own_bundle(context: &Context) -> Result<Verdict> {
    if !geteuid().is_root() {
        return Ok(Verdict::Skipped("it takes root to become somebody else".into()));
    }
    let Some(access) = KvmAccess::grant()? else {
        return Ok(Verdict::Skipped(format!("{KVM} has no group but root's, and this is no lab")));
    };
    let home = prepare(context, SCRIPT)?;
    let state = home.join("run/katavm");
    let before = Traces::with_state(&home, &state);

    let katavm = as_user(&home, access.group);
    let run = Started::spawn(katavm().args(["run", "--id", "mine"]).arg(home.join("bundle")))?.finish(LIMIT)?;
    context.note("stdout", run.stdout.clone());
    context.note("stderr", run.stderr.clone());
    run.expect(7, &[])?;
    ensure!(run.stderr.is_empty(), "it complains:\n{}", run.stderr);
    // Root in the guest, and on the host whoever runs katavm: that is who owns the files.
    let mine = format!("{USER} {USER}");
    let expected = [
        "0",
        &format!("{USER} 640"),
        "mine",
        &mine,
        "chown: /new/file: Operation not permitted",
        "chown: /new/file: Operation not permitted",
        "mknod: /new/null: Operation not permitted",
        "cat: can't open '/secret': Permission denied",
        &mine,
        "file link pipe ",
    ];
    let lines: Vec<_> = run.stdout.lines().collect();
    ensure!(lines == expected, "{lines:#?} instead of {expected:#?}");
    before.expect_nothing_new()?;

    let rootfs = home.join("bundle/rootfs");
    ensure!(fs::read_to_string(rootfs.join("mine"))? == "mine\nchanged\n", "the file was not changed");
    for (name, mode) in [("new", 0o2750), ("new/file", 0o4711)] {
        let file = fs::metadata(rootfs.join(name))?;
        ensure!((file.uid(), file.gid()) == (USER, USER), "{name} belongs to {}:{}", file.uid(), file.gid());
        ensure!(file.mode() & 0o7777 == mode, "{name} has mode {:o}", file.mode());
    }

    // While it runs, none of its processes is anybody else's, and a kill leaves nothing behind here either.
    let config =
        fs::read_to_string(home.join("bundle/config.json"))?.replace("exit 7", "echo up; cat /dev/zero > /dev/null");
    fs::write(home.join("bundle/config.json"), config)?;
    fs::remove_dir_all(rootfs.join("new"))?;
    let run = Started::spawn(katavm().args(["run", "--id", "mine"]).arg(home.join("bundle")))?;
    run.read_until("up", LIMIT)?;
    let watcher = run.watcher().context("no watcher")?;
    for pid in [run.id(), watcher.as_raw_nonzero().get().cast_unsigned()] {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let ids = format!("{USER}\t{USER}\t{USER}\t{USER}");
        ensure!(field("Uid:") == Some(&ids) && field("Gid:") == Some(&ids), "{status}");
        for set in ["CapPrm:", "CapEff:", "CapInh:", "CapAmb:"] {
            ensure!(field(set) == Some("0000000000000000"), "{status}");
        }
    }
    kill_process(watcher, Signal::KILL)?;
    run.signal(Signal::KILL);
    run.finish(LIMIT)?;
    Started::spawn(katavm().arg("gc"))?.finish(LIMIT)?.expect(0, &[])?;
    before.expect_nothing_new()?;
    Ok(Verdict::Passed)
}

/// An address of the host that leads to the world, as far as the lab has one; and a name server.
struct World {
    resolv_conf: Option<String>,
    server: std::process::Child,
}

const HERE: &str = "198.51.100.2";
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Answers every query with one address, and every connection with a page.
const SERVER: &str = "
import http.server, socket, threading
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header('Content-Length', '1000000'); self.end_headers()
        self.wfile.write(b'x' * 1000000)
    def log_message(self, *_): pass
names = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); names.bind(('127.0.0.1', 53))
def answer():
    while True:
        query, who = names.recvfrom(512)
        known = query[-4:-2] == b'\\0\\1'
        record = b'\\xc0\\x0c\\0\\1\\0\\1\\0\\0\\0\\x3c\\0\\4' + socket.inet_aton('198.51.100.2')
        names.sendto(query[:2] + b'\\x81\\x80\\0\\1\\0' + bytes([known]) + b'\\0\\0\\0\\0' + query[12:] + record * known, who)
threading.Thread(target=answer, daemon=True).start()
http.server.ThreadingHTTPServer(('198.51.100.2', 7080), Page).serve_forever()
";

impl World {
    fn make() -> Result<Self> {
        for line in [
            "link add world0 type dummy",
            &format!("addr add {HERE}/24 dev world0"),
            "link set world0 up",
            "route add default via 198.51.100.1",
        ] {
            let done = Command::new("ip").args(line.split(' ')).output()?;
            ensure!(done.status.success(), "ip {line}: {}", String::from_utf8_lossy(&done.stderr));
        }
        let resolv_conf = fs::read_to_string(RESOLV_CONF).ok();
        fs::write(RESOLV_CONF, "nameserver 127.0.0.1\n")?;
        Ok(Self { resolv_conf, server: Command::new("python3").args(["-c", SERVER]).spawn()? })
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
        let _ = Command::new("ip").args(["link", "del", "world0"]).status();
        let _ = match &self.resolv_conf {
            Some(text) => fs::write(RESOLV_CONF, text),
            None => fs::remove_file(RESOLV_CONF),
        };
    }
}

/// What the guest has and reaches; then it serves.
const NETWORK_SCRIPT: &str = "ip -o -4 addr show eth0 | tr -s ' ' | grep -o 'inet 10.0.2.15/24'; cat /etc/resolv.conf
    ip route | grep -o 'default via 10.0.2.2'
    until wget -q -O /dev/null http://198.51.100.2:7080/; do :; done; wget -q -O - http://198.51.100.2:7080/ | wc -c
    wget -q -O - http://some.name.example:7080/ | wc -c
    nc -w 5 10.0.2.2 7081 </dev/null && echo reached the loopback
    echo hello from the guest >/index.html; httpd -p 80 -h /; trap 'exit 0' TERM; echo up; while :; do sleep 1; done";

fn own_network(context: &Context) -> Result<Verdict> {
    if !geteuid().is_root() || !is_lab() {
        return Ok(Verdict::Skipped("it changes the host's network, so it is for root in the lab".into()));
    }
    let Some(access) = KvmAccess::grant()? else {
        return Ok(Verdict::Skipped(format!("{KVM} has no group but root's")));
    };
    let world = World::make()?;
    // On the host's loopback, which the router's address must not lead to.
    let _loopback = std::net::TcpListener::bind("127.0.0.1:7081")?;
    let home = prepare(context, NETWORK_SCRIPT)?;
    let state = home.join("run/katavm");
    let before = Traces::with_state(&home, &state);
    let katavm = as_user(&home, access.group);
    let run = |arguments: &[&str]| {
        let mut command = katavm();
        command.args(["run", "--id", "mine", "--net=user"]).args(arguments).arg(home.join("bundle"));
        Started::spawn(&mut command)
    };
    let get = |port: u16| Command::new("curl").args(["-sS", "-m", "60", &format!("http://127.0.0.1:{port}/")]).output();

    let first = run(&["-p", "127.0.0.1:18080:80", "-p", "18081:80"])?;
    first.read_until("up", LIMIT)?;
    for port in [18080, 18081] {
        let page = get(port)?;
        ensure!(page.stdout == b"hello from the guest\n", "port {port}: {}", String::from_utf8_lossy(&page.stderr));
    }
    // Whose port it is, nobody else can have.
    let mut second = katavm();
    second.args(["run", "--id", "other", "--net=user", "-p", "18080:80"]).arg(home.join("bundle"));
    let second = Started::spawn(&mut second)?.finish(LIMIT)?;
    ensure!(second.stderr.contains("passt gave up") && second.stderr.contains("18080"), "{}", second.stderr);
    // An orderly end takes passt with it.
    first.signal(Signal::TERM);
    let first = first.finish(LIMIT)?;
    context.note("stdout", first.stdout.clone());
    context.note("stderr", first.stderr.clone());
    let expected = ["inet 10.0.2.15/24", "nameserver 10.0.2.3", "default via 10.0.2.2", "1000000", "1000000", "up"];
    let lines: Vec<_> = first.stdout.lines().map(str::trim).collect();
    ensure!(lines == expected, "{lines:#?} instead of {expected:#?}");
    before.expect_nothing_new()?;

    // So does a kill of everything that katavm has.
    let third = run(&["-p", "127.0.0.1:18080:80"])?;
    third.read_until("up", LIMIT)?;
    kill_process(third.watcher().context("no watcher")?, Signal::KILL)?;
    third.signal(Signal::KILL);
    third.finish(LIMIT)?;
    Started::spawn(katavm().arg("gc"))?.finish(LIMIT)?.expect(0, &[])?;
    before.expect_nothing_new()?;

    let mut missing = katavm();
    missing.args(["run", "--net=user"]).arg(home.join("bundle")).env("PATH", "/nowhere");
    let missing = Started::spawn(&mut missing)?.finish(LIMIT)?;
    ensure!(missing.stderr.contains("--net=user needs the program passt"), "{}", missing.stderr);
    before.expect_nothing_new()?;
    drop(world);
    Ok(Verdict::Passed)
}

/// A folder that belongs to the user: the bundle, a runtime folder, and what of katavm they could not reach otherwise.
fn prepare(context: &Context, script: &str) -> Result<PathBuf> {
    let home = context.scratch().join("home");
    let rootfs = bundle(context, &["sh", "-c", script], |config| {
        let all = json!([
            "CAP_CHOWN",
            "CAP_DAC_OVERRIDE",
            "CAP_FOWNER",
            "CAP_FSETID",
            "CAP_MKNOD",
            "CAP_NET_RAW",
            "CAP_NET_BIND_SERVICE"
        ]);
        config["process"]["capabilities"] = json!({"bounding": all, "effective": all, "permitted": all});
    })?;
    fs::create_dir_all(home.join("bundle"))?;
    for part in ["rootfs", "config.json"] {
        fs::rename(rootfs.join(part), home.join("bundle").join(part))?;
    }
    let rootfs = home.join("bundle/rootfs");
    for applet in ["mknod", "chmod", "mkfifo", "ln", "tr", "ip", "wget", "httpd", "nc", "wc", "grep", "sleep"] {
        let place = rootfs.join("bin").join(applet);
        if !place.exists() {
            std::os::unix::fs::symlink("busybox", place)?;
        }
    }
    fs::write(rootfs.join("mine"), "mine\n")?;
    fs::set_permissions(rootfs.join("mine"), fs::Permissions::from_mode(0o640))?;
    fs::create_dir_all(home.join("run"))?;
    fs::create_dir_all(home.join("image"))?;
    for file in ["vmlinux", "initramfs"] {
        fs::copy(context.image(file)?, home.join("image").join(file))?;
    }
    fs::copy(installed()?, home.join("katavm"))?;
    give(&home, USER)?;
    fs::set_permissions(context.scratch(), fs::Permissions::from_mode(0o755))?;
    // Root's own, which the user cannot read.
    fs::write(rootfs.join("secret"), "secret")?;
    fs::set_permissions(rootfs.join("secret"), fs::Permissions::from_mode(0o600))?;
    Ok(home)
}

/// The program that is tried.
pub(super) fn installed() -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let program = std::env::split_paths(&path).map(|folder| folder.join("katavm")).find(|file| file.is_file());
    program.context("no katavm in PATH")
}

/// Makes everything in a folder a user's.
pub(super) fn give(path: &Path, user: u32) -> Result<()> {
    std::os::unix::fs::lchown(path, Some(user), Some(user))?;
    if path.symlink_metadata()?.is_dir() {
        for entry in fs::read_dir(path)? {
            give(&entry?.path(), user)?;
        }
    }
    Ok(())
}

/// Commands of the user: no capability, not even to be gained, and the one group.
fn as_user(home: &Path, kvm: u32) -> impl Fn() -> Command {
    let home = home.to_path_buf();
    move || {
        let mut command = Command::new("/usr/bin/setpriv");
        command
            .args([format!("--reuid={USER}"), format!("--regid={USER}"), format!("--groups={kvm}")])
            .args(["--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all", "--no-new-privs"])
            .arg(home.join("katavm"))
            .env("KATAVM_GUEST_IMAGE", home.join("image"))
            .env("XDG_RUNTIME_DIR", home.join("run"))
            .env("HOME", &home)
            .current_dir("/");
        command
    }
}
