//! A pod's network as others see it.

use std::process::Command;

use anyhow::{Result, ensure};
use serde_json::json;

use super::image::run;
use super::node::until;
use super::{Context, Pod, Verdict, on_node};
use crate::cri::stream::forward;

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

/// The CRI plugin dials localhost in the pod's namespace on the host.
pub fn forwarded(context: &Context) -> Result<Verdict> {
    on_node(context, |node| {
        let pod = Pod::run(node, "forwarded", |_| ())?;
        let serve = "head -c 3000000 /dev/zero | tr '\\0' x >/tmp/index.html; exec httpd -f -p 127.0.0.1:8080 -h /tmp";
        let id = pod.start("server", &["sh", "-c", serve], |_| ())?;
        pod.sh(&id, "until wget -qO /dev/null http://127.0.0.1:8080/; do sleep 0.1; done")?;
        let ask = |port: u16| -> Result<(Vec<u8>, String)> {
            let url = node.cri.port_forward(&pod.id, port.into())?;
            Ok(forward(&url, port, b"GET / HTTP/1.0\r\n\r\n")?)
        };
        let (answer, error) = ask(8080)?;
        let head = String::from_utf8_lossy(answer.get(..15).unwrap_or_default()).into_owned();
        let body = answer.iter().rev().take_while(|byte| **byte == b'x').count();
        ensure!(head == "HTTP/1.1 200 OK" && body == 3_000_000 && error.is_empty(), "{head:?}, {body} bytes: {error}");
        let (answer, error) = ask(8081)?;
        ensure!(answer.is_empty() && error.contains("refused"), "{} bytes: {error}", answer.len());
        pod.remove()
    })
}
