//! A pod's network as others see it.

use std::process::Command;

use anyhow::{Result, ensure};
use serde_json::json;

use super::image::run;
use super::node::until;
use super::{Context, Pod, Verdict, on_node};

pub fn reached(context: &Context) -> Result<Verdict> {
    on_node(context, |node| {
        let serve = "echo from the pod >/tmp/index.html; exec httpd -f -p 80 -h /tmp";
        let pod = Pod::run(node, "served", |config| {
            config["port_mappings"] = json!([{ "protocol": "TCP", "container_port": 80, "host_port": 12080 }]);
        })?;
        pod.start("server", &["sh", "-c", serve], |_| ())?;
        let ip = pod.ip()?;
        let asked = |url: &str| run(Command::new("curl").args(["-sS", "--max-time", "5", url]));
        until("the pod does not answer", || Ok(asked(&format!("http://{ip}/")).is_ok()))?;
        for url in [format!("http://{ip}/"), "http://10.88.0.1:12080/".to_owned()] {
            let answer = asked(&url)?;
            ensure!(answer == "from the pod\n", "{url}: {answer:?}");
        }
        let other = Pod::run(node, "asking", |_| ())?;
        let id = other.idle("client")?;
        let answer = other.sh(&id, &format!("wget -qO- http://{ip}/"))?;
        ensure!(answer == "from the pod", "{answer:?}");
        let route = other.sh(&id, "ip route | grep default; ip -6 addr show eth0 | grep -c fd00:88")?;
        ensure!(route == "default via 10.88.0.1 dev eth0 \n1", "{route:?}");
        other.remove()?;
        pod.remove()
    })
}
