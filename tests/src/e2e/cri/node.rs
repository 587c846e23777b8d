//! A node: containerd with its CRI plugin, a bridge for its pods, and images.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
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
/// The RAM of a guest whose pod has no limits, by the configuration that containerd's names.
pub const DEFAULT_MIB: u64 = 448;
/// The bridge of the pods.
const BRIDGE: &str = "cni0";
/// How long containerd may take to be ready, and to end.
const LIMIT: Duration = Duration::from_secs(60);

/// busybox, as containers run it.
pub const BUSYBOX: &str = "localhost/busybox:1";
/// The first container of each pod.
const PAUSE: &str = "localhost/pause:1";

/// Which containerd a node has.
#[derive(Clone, Copy, Debug, Default)]
pub enum Flavour {
    /// Debian 13's, 1.7: a pod begins with a container that pauses.
    #[default]
    Pause,
    /// Debian testing's, 2.x, which makes pods by the Sandbox API.
    Sandboxer,
}

impl Flavour {
    /// One of containerd's programs.
    fn program(self, name: &str) -> Result<PathBuf> {
        match self {
            Self::Pause => Ok(name.into()),
            Self::Sandboxer => {
                let entries = fs::read_dir("/opt").context("the lab has other versions of containerd in /opt")?;
                let paths = entries.flatten().map(|entry| entry.path());
                let is_second = |path: &PathBuf| path.to_string_lossy().starts_with("/opt/containerd-2");
                Ok(paths.into_iter().find(is_second).context("the lab has no containerd 2")?.join(name))
            }
        }
    }

    /// The configuration that docs/kubernetes.md tells of, with the places of Debian and of this test.
    fn config(self, folder: &Path) -> String {
        const OPTIONS: &str = "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.katavm.options]\n";
        let (head, runtime, more, cni) = match self {
            Self::Pause => (
                format!("version = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = \"{PAUSE}\"\n"),
                "io.containerd.grpc.v1.cri",
                OPTIONS.to_owned() + &format!("ConfigPath = \"{}/katavm.toml\"", folder.display()),
                "bin_dir = \"/usr/lib/cni\"",
            ),
            Self::Sandboxer => (
                format!(
                    "version = 3\n[plugins.\"io.containerd.cri.v1.images\".pinned_images]\nsandbox = \"{PAUSE}\"\n"
                ),
                "io.containerd.cri.v1.runtime",
                // With other options than runc's this version's plugin starts no container.
                "sandboxer = \"shim\"".to_owned(),
                "bin_dirs = [\"/usr/lib/cni\"]",
            ),
        };
        format!(
            r#"{head}
[plugins."{runtime}".containerd]
default_runtime_name = "runc"
[plugins."{runtime}".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."{runtime}".containerd.runtimes.katavm]
runtime_type = "io.containerd.katavm.v2"
privileged_without_host_devices = true
{more}
[plugins."{runtime}".cni]
{cni}
conf_dir = "{}/net.d"
"#,
            folder.display()
        )
    }
}

/// containerd as Kubernetes uses it, with katavm as a runtime beside runc. All of it goes when this is dropped.
pub struct Node {
    folder: TempDir,
    flavour: Flavour,
    containerd: Child,
    /// The interface that the kubelet uses.
    pub cri: Cri,
}

impl Node {
    /// Starts it and gives it its images.
    pub fn start(context: &Context, flavour: Flavour) -> Result<Self> {
        let folder = TempDir::with_prefix("katavm-e2e-node-")?;
        let path = folder.path();
        fs::create_dir(path.join("net.d"))?;
        fs::write(path.join("net.d/10-bridge.conflist"), network().to_string())?;
        fs::write(path.join("config.toml"), flavour.config(path))?;
        fs::write(path.join("katavm.toml"), format!("[guest]\nmemory = \"{DEFAULT_MIB}M\"\n"))?;
        image::run(Command::new("ip").args(["link", "add", BRIDGE, "type", "bridge"]))?;
        let containerd = spawn(flavour, path)?;
        let node = Self { folder, flavour, containerd, cri: Cri::at(Path::new(SOCKET)) };
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
        image::run(Command::new(self.flavour.program("ctr")?).args(["-n", "k8s.io", "image", "import"]).arg(&archive))?;
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

fn spawn(flavour: Flavour, folder: &Path) -> Result<Child> {
    let log = File::options().create(true).append(true).open(folder.join("containerd.log"))?;
    let mut containerd = Command::new(flavour.program("containerd")?);
    containerd.arg("--config").arg(folder.join("config.toml")).stdin(Stdio::null());
    containerd.stdout(log.try_clone()?).stderr(log).spawn().context("the lab needs containerd")
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
