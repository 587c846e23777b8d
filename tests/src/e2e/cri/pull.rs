//! Images from a registry.

use std::fs::{self, File};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use super::image::run;
use super::node::{BUSYBOX, Node, until};
use super::{Context, Pod, Verdict, on_node};

/// The registry's address; containerd speaks plain HTTP to localhost.
const REGISTRY: &str = "localhost:5000";

/// Debian's docker-registry with its files in the node's folder; it ends when this is dropped.
struct Registry {
    child: Child,
    files: std::path::PathBuf,
}

impl Registry {
    fn start(node: &Node) -> Result<Self> {
        let files = node.folder().join("registry");
        fs::create_dir(&files)?;
        let config = files.join("config.yml");
        let storage = files.join("data");
        let text = format!(
            "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: {REGISTRY}\n",
            storage.display()
        );
        fs::write(&config, text)?;
        let log = File::create(files.join("log"))?;
        let mut registry = Command::new("docker-registry");
        registry.arg("serve").arg(&config).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = registry.spawn().context("the lab needs docker-registry")?;
        let started = Self { child, files };
        let url = format!("http://{REGISTRY}/v2/");
        until("the registry does not answer", || Ok(run(Command::new("curl").args(["-sSf", &url])).is_ok()))?;
        Ok(started)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
        drop(fs::remove_dir_all(&self.files));
    }
}

pub fn pulled(context: &Context) -> Result<Verdict> {
    on_node(context, |node| {
        let _registry = Registry::start(node)?;
        let name = format!("{REGISTRY}/team/tool:1");
        let ctr = |args: &[&str]| run(Command::new("ctr").args(["-n", "k8s.io", "image"]).args(args));
        ctr(&["tag", BUSYBOX, &name])?;
        ctr(&["push", "--plain-http", &name])?;
        node.cri.remove_image(&name)?;
        ensure!(node.cri.image_status(&name)?.is_none(), "the image is still there");
        let missing = node.cri.pull_image(&format!("{REGISTRY}/team/nosuch:1"));
        ensure!(missing.as_ref().is_err_and(|error| error.to_string().contains("not found")), "{missing:?}");
        let reference = node.cri.pull_image(&name)?;
        let image = node.cri.image_status(&name)?.context("the image is not there")?;
        ensure!(image.id == reference && image.size > 0 && image.repo_tags.contains(&name), "{image:?}");
        let pod = Pod::run(node, "pulled", |_| ())?;
        let id = pod.start("tool", &["echo", "pulled"], |config| config["image"]["image"] = name.as_str().into())?;
        ensure!(pod.ended(&id)?.exit_code == 0, "{:?}", pod.ended(&id)?);
        ensure!(pod.log("tool")? == ["stdout F pulled"], "{:?}", pod.log("tool")?);
        pod.remove()?;
        node.cri.remove_image(&name)?;
        // The node's own image of the same layers must go on working: its name may have been taken with the image.
        node.restore_busybox(context)
    })
}
