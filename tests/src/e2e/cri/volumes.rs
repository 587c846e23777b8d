//! Volumes as the kubelet gives them to containers.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::image::run;
use super::node::{Node, until};
use super::{Context, Pod, Verdict, on_node};

/// A folder of the host for one pod's volumes; unmounted and removed when it is dropped.
struct Volumes {
    folder: PathBuf,
    mounted: Vec<PathBuf>,
}

impl Volumes {
    fn of(node: &Node, pod: &str) -> Result<Self> {
        let folder = node.folder().join("pods").join(pod).join("volumes");
        fs::create_dir_all(&folder)?;
        Ok(Self { folder, mounted: Vec::new() })
    }

    fn folder(&self, name: &str) -> Result<PathBuf> {
        let path = self.folder.join(name);
        fs::create_dir_all(&path)?;
        Ok(path)
    }

    fn tmpfs(&mut self, name: &str, size: &str) -> Result<PathBuf> {
        let path = self.folder(name)?;
        run(Command::new("mount").args(["-t", "tmpfs", "-o"]).arg(format!("size={size}")).arg("tmpfs").arg(&path))?;
        self.mounted.push(path.clone());
        Ok(path)
    }

    /// As the kubelet gives a part of a volume to a container.
    fn sub_path(&mut self, name: &str, of: &Path) -> Result<PathBuf> {
        let path = self.folder(name)?;
        run(Command::new("mount").arg("--bind").arg(of).arg(&path))?;
        self.mounted.push(path.clone());
        Ok(path)
    }
}

impl Drop for Volumes {
    fn drop(&mut self) {
        for mounted in self.mounted.iter().rev() {
            drop(Command::new("umount").arg(mounted).status());
        }
        drop(fs::remove_dir_all(&self.folder));
    }
}

/// Tells of what is moved to, created and deleted in a folder (inotify(7)).
const WATCH: &str = r#"
import ctypes, os, struct
c = ctypes.CDLL(None)
fd = c.inotify_init()
c.inotify_add_watch(fd, b"/etc/config", 0x80 | 0x100 | 0x200)
print("watching", flush=True)
while True:
    data = os.read(fd, 4096)
    while data:
        _, mask, _, length = struct.unpack_from("iIII", data)
        print(hex(mask & 0xfff), data[16:16 + length].rstrip(b"\0").decode(), flush=True)
        data = data[16 + length:]
"#;

fn mount(host: &Path, container: &str, readonly: bool) -> Value {
    json!({ "host_path": host, "container_path": container, "readonly": readonly })
}

pub fn kinds(context: &Context) -> Result<Verdict> {
    on_node(context, |node| {
        let mut volumes = Volumes::of(node, "volumes")?;
        let (disk, memory) = (volumes.folder("disk")?, volumes.tmpfs("memory", "4m")?);
        let whole = volumes.folder("whole")?;
        fs::create_dir(whole.join("part"))?;
        let part = volumes.sub_path("part", &whole.join("part"))?;
        let log = volumes.folder.join("termination-log");
        fs::write(&log, "")?;
        let pod = Pod::run(node, "volumes", |_| ())?;
        let id = pod.start("one", &["sleep", "100000"], |config| {
            config["mounts"] = json!([
                mount(&disk, "/disk", false),
                mount(&disk, "/read-only", true),
                mount(&memory, "/memory", false),
                mount(&part, "/part", false),
                mount(&log, "/dev/termination-log", false),
            ]);
        })?;
        pod.sh(&id, "echo one >/disk/file; echo part >/part/file; echo the end >/dev/termination-log")?;
        ensure!(fs::read_to_string(disk.join("file"))? == "one\n", "the volume on disk");
        ensure!(fs::read_to_string(whole.join("part/file"))? == "part\n", "the part of a volume");
        ensure!(fs::read_to_string(&log)? == "the end\n", "the termination log");
        let refused = pod.sh(&id, "cat /read-only/file; echo x >/read-only/new 2>/dev/null || echo refused")?;
        ensure!(refused == "one\nrefused", "{refused:?}");
        let full =
            pod.sh(&id, "head -c 3000000 /dev/zero >/memory/a; head -c 3000000 /dev/zero >/memory/b || echo full")?;
        ensure!(full == "full", "{full:?}");
        fs::write(disk.join("later"), "from the host\n")?;
        let later = pod.sh(&id, "cat /disk/later")?;
        ensure!(later == "from the host", "{later:?}");
        pod.remove()
    })
}

/// A volume that two containers have is one: sockets, pipes, locks and mapped memory work across it, whichever of them
/// may write to it.
pub fn shared(context: &Context) -> Result<Verdict> {
    on_node(context, |node| {
        let volumes = Volumes::of(node, "shared")?;
        let disk = volumes.folder("disk")?;
        let pod = Pod::run(node, "shared", |_| ())?;
        let reader = pod.start("reader", &["sleep", "100000"], |config| {
            config["mounts"] = json!([mount(&disk, "/data", true)]);
        })?;
        let writer = pod.start("writer", &["sleep", "100000"], |config| {
            config["mounts"] = json!([mount(&disk, "/volume", false)]);
        })?;
        pod.sh(&writer, "mkfifo /volume/fifo; (echo through the pipe >/volume/fifo) >/dev/null 2>&1 &")?;
        let heard = pod.sh(&reader, "timeout 50 cat /data/fifo")?;
        ensure!(heard == "through the pipe", "{heard:?}");
        // syslogd and logger meet at /dev/log.
        pod.sh(
            &writer,
            "ln -s /volume/socket /dev/log; syslogd -O /tmp/messages; until [ -S /volume/socket ]; do sleep 0.1; done",
        )?;
        pod.sh(&reader, "ln -s /data/socket /dev/log; logger through the socket")?;
        pod.sh(&writer, "until grep -q 'through the socket' /tmp/messages; do sleep 0.1; done")?;
        pod.sh(&writer, "touch /volume/lock; (flock /volume/lock sleep 100) >/dev/null 2>&1 & until ! flock -n /volume/lock true; do sleep 0.1; done")?;
        let locked =
            pod.sh(&reader, "flock -n -s /data/lock true || echo locked; touch /data/x 2>/dev/null || echo read-only")?;
        ensure!(locked == "locked\nread-only", "{locked:?}");
        pod.remove()
    })
}

/// The kubelet writes a ConfigMap, a Secret and a projected volume into a new folder and switches `..data` to it.
pub fn config_map(context: &Context) -> Result<Verdict> {
    on_node(context, |node| {
        let volumes = Volumes::of(node, "config")?;
        let map = volumes.folder("map")?;
        let write = |version: &str| -> Result<()> {
            let old = fs::read_link(map.join("..data")).ok();
            let folder = map.join(format!("..{version}"));
            fs::create_dir(&folder)?;
            fs::write(folder.join("key"), format!("{version}\n"))?;
            symlink(format!("..{version}"), map.join("..data_tmp"))?;
            fs::rename(map.join("..data_tmp"), map.join("..data"))?;
            if let Some(old) = old {
                fs::remove_dir_all(map.join(old))?;
            }
            Ok(())
        };
        write("first")?;
        symlink("..data/key", map.join("key"))?;
        let pod = Pod::run(node, "config", |_| ())?;
        // busybox has no program that uses inotify: Debian's Python is lent to it.
        let command = ["/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2", "/usr/bin/python3", "-c", WATCH];
        let id = pod.start("main", &command, |config| {
            config["mounts"] = json!([mount(&map, "/etc/config", true), mount(Path::new("/usr"), "/usr", true)]);
        })?;
        until("nobody watches", || Ok(pod.log("main")?.contains(&"stdout F watching".to_owned())))?;
        let seen = pod.sh(&id, "cat /etc/config/key; ls -A /etc/config | tr '\\n' ' '")?;
        ensure!(seen == "first\n..data ..first key", "{seen:?}");
        write("second")?;
        until("the update is not seen", || Ok(pod.sh(&id, "cat /etc/config/key 2>/dev/null || true")? == "second"))?;
        let seen = pod.sh(&id, "ls -A /etc/config | tr '\\n' ' '")?;
        ensure!(seen == "..data ..second key", "{seen:?}");
        until("programs are not told of the update", || {
            Ok(pod.log("main")?.contains(&"stdout F 0x200 ..first".into()))
        })?;
        let told = pod.log("main")?;
        ensure!(told.contains(&"stdout F 0x80 ..data".into()), "{told:?}");
        // Another container of the pod has the same copy, of today.
        let other = pod.start("other", &["sleep", "100000"], |config| {
            config["mounts"] = json!([mount(&map, "/config", true)]);
        })?;
        let seen = pod.sh(&other, "cat /config/key; echo x 2>/dev/null >/config/new || echo refused")?;
        ensure!(seen == "second\nrefused", "{seen:?}");
        pod.remove()
    })
}

pub fn propagation(context: &Context) -> Result<Verdict> {
    on_node(context, |node| {
        let mut volumes = Volumes::of(node, "mounted")?;
        let folder = volumes.tmpfs("parent", "1m")?;
        run(Command::new("mount").arg("--make-rshared").arg(&folder))?;
        fs::create_dir(folder.join("later"))?;
        let pod = Pod::run(node, "mounted", |_| ())?;
        let id = pod.start("main", &["sleep", "100000"], |config| {
            let mut given = mount(&folder, "/volume", false);
            given["propagation"] = json!("PROPAGATION_HOST_TO_CONTAINER");
            config["mounts"] = json!([given]);
        })?;
        run(Command::new("mount").args(["-t", "tmpfs", "tmpfs"]).arg(folder.join("later")))?;
        fs::write(folder.join("later/file"), "x")?;
        let later = folder.join("later");
        until("a later mount is not seen", || Ok(pod.sh(&id, "ls /volume/later")? == "file"))?;
        pod.sh(&id, "echo by the guest >/volume/later/new; cat /volume/later/file >/dev/null")?;
        run(Command::new("umount").arg(&later))?;
        until("it is seen when it is gone", || Ok(pod.sh(&id, "ls /volume/later")?.is_empty()))?;
        run(Command::new("mount").args(["-t", "tmpfs", "tmpfs"]).arg(&later))?;
        fs::write(later.join("other"), "x")?;
        let seen = until("another mount is not seen", || Ok(pod.sh(&id, "ls /volume/later")? == "other"));
        run(Command::new("umount").arg(&later))?;
        pod.remove()?;
        seen
    })
}
