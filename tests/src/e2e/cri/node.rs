//! A node: containerd with its CRI plugin, a bridge for its pods, and images.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use tempfile::TempDir;

use super::image;
use crate::cri::Cri;
use crate::e2e::Context;
use crate::e2e::agent::whole_rootfs;

/// containerd's socket.
const SOCKET: &str = "/run/containerd/containerd.sock";
/// The bridge of the pods.
const BRIDGE: &str = "cni0";
/// How long containerd may take to be ready, and to end.
const LIMIT: Duration = Duration::from_secs(60);

/// busybox, as containers run it.
pub const BUSYBOX: &str = "localhost/busybox:1";
/// The first container of each pod.
const PAUSE: &str = "localhost/pause:1";

/// containerd as Kubernetes uses it, with katavm as a runtime beside runc. All of it goes when this is dropped.
pub struct Node {
    folder: TempDir,
    containerd: Child,
    /// The interface that the kubelet uses.
    pub cri: Cri,
}

impl Node {
    /// Starts it and gives it its images.
    pub fn start(context: &Context) -> Result<Self> {
        let folder = TempDir::with_prefix("katavm-e2e-node-")?;
        let path = folder.path();
        fs::create_dir(path.join("net.d"))?;
        fs::write(path.join("net.d/10-bridge.conflist"), network().to_string())?;
        fs::write(path.join("config.toml"), config(path))?;
        image::run(Command::new("ip").args(["link", "add", BRIDGE, "type", "bridge"]))?;
        let containerd = spawn(path)?;
        let node = Self { folder, containerd, cri: Cri::at(Path::new(SOCKET)) };
        node.await_ready()?;
        let root = node.folder.path().join("pause");
        image::pause(&root)?;
        node.import(PAUSE, &root, &json!({ "Entrypoint": ["/pause"] }))?;
        node.restore_busybox(context)?;
        Ok(node)
    }

    /// Gives it the image of busybox, if it has none.
    pub fn restore_busybox(&self, context: &Context) -> Result<()> {
        if self.cri.image_status(BUSYBOX)?.is_some() {
            return Ok(());
        }
        let busybox = json!({ "Cmd": ["sh"], "Env": ["PATH=/bin"] });
        self.import(BUSYBOX, &whole_rootfs(context)?, &busybox)
    }

    /// Where the node keeps its files.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// What containerd has logged.
    pub fn log(&self) -> Vec<u8> {
        fs::read(self.folder.path().join("containerd.log")).unwrap_or_default()
    }

    /// Makes an image of a folder known to the CRI.
    fn import(&self, name: &str, root: &Path, config: &serde_json::Value) -> Result<()> {
        let archive = self.folder.path().join("image.tar");
        image::archive(name, root, config, &archive)?;
        image::run(Command::new("ctr").args(["-n", "k8s.io", "image", "import"]).arg(&archive))?;
        fs::remove_file(&archive)?;
        until(&format!("the CRI does not see the image {name}"), || Ok(self.cri.image_status(name)?.is_some()))
    }

    fn await_ready(&self) -> Result<()> {
        until("containerd does not get ready", || Ok(self.cri.is_ready().unwrap_or_default()))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // A failed case leaves its pods.
        for pod in self.cri.pods().unwrap_or_default() {
            drop(self.cri.stop_pod(&pod.id));
            drop(self.cri.remove_pod(&pod.id));
        }
        let pid = self.containerd.id().to_string();
        drop(Command::new("kill").arg(&pid).status());
        drop(self.containerd.wait());
        drop(Command::new("ip").args(["link", "del", BRIDGE]).status());
    }
}

/// Waits until something holds.
pub fn until(failure: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !holds()? {
        ensure!(start.elapsed() < LIMIT, "{failure}");
        // Nothing to wait for: the other side is asked again and again.
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn spawn(folder: &Path) -> Result<Child> {
    let log = File::options().create(true).append(true).open(folder.join("containerd.log"))?;
    let mut containerd = Command::new("containerd");
    containerd.arg("--config").arg(folder.join("config.toml")).stdin(Stdio::null());
    containerd.stdout(log.try_clone()?).stderr(log).spawn().context("the lab needs containerd")
}

/// The configuration that docs/kubernetes.md tells of, with the places of Debian and of this test.
fn config(folder: &Path) -> String {
    format!(
        r#"version = 2
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE}"
[plugins."io.containerd.grpc.v1.cri".containerd]
default_runtime_name = "runc"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.katavm]
runtime_type = "io.containerd.katavm.v2"
privileged_without_host_devices = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "{}/net.d"
"#,
        folder.display()
    )
}

fn network() -> serde_json::Value {
    json!({
        "cniVersion": "1.0.0", "name": "pods",
        "plugins": [
            {
                "type": "bridge", "bridge": BRIDGE, "isGateway": true, "ipMasq": false, "hairpinMode": true,
                "ipam": {
                    "type": "host-local",
                    "ranges": [[{ "subnet": "10.88.0.0/16" }], [{ "subnet": "fd00:88::/64" }]],
                    "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
                },
            },
            { "type": "portmap", "capabilities": { "portMappings": true } },
        ],
    })
}
