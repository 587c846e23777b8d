//! A container that is root with every capability looks for somebody who answers on vsock, and finds nobody.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use katavm_protocol::ports::{HOST_CID, RPC, STREAM};
use serde::Deserialize;
use serde_json::json;

use super::agent::rootfs;
use super::guest::{CID, Guest, privilege};
use super::process::Started;
use super::run::debian;
use super::{Context, Table, Verdict};

/// The table.
pub const CASES: Table = (
    "hostile",
    &[
        ("a_container_that_dials_everything_gets_nowhere", |context| nowhere(context, 2048)),
        ("a_port_that_was_opened_is_all_that_answers", opened),
    ],
);

/// For `katavm-e2e --long`.
pub const LONG: Table =
    ("hostile", &[("a_container_that_dials_65536_ports_gets_nowhere", |context| nowhere(context, 1 << 16))]);

/// What runs in the container.
const PROGRAM: &str = include_str!("hostile.py");
const LIMIT: Duration = Duration::from_secs(3600);

/// What the program found.
#[derive(Debug, Deserialize)]
struct Found {
    /// Context identifiers and ports that accepted a connection.
    open: Vec<(u32, u32)>,
    /// How often each outcome came.
    outcomes: BTreeMap<String, u32>,
    /// How many sockets it could listen on.
    listening: u32,
    /// Addresses that it could not bind, and why.
    refused: BTreeMap<String, String>,
    /// How many of its sockets somebody connected to.
    came: u32,
    flooded: u32,
    cid: Option<u32>,
}

impl Found {
    fn parse(context: &Context, output: &str) -> Result<Self> {
        context.note("found", output);
        serde_json::from_str(output.trim()).with_context(|| format!("no report: {output:?}"))
    }

    /// Whether it tried in earnest, and was refused as it must be; what was open is for the case to judge.
    fn judge(&self, ports: u32) -> Result<()> {
        let tried: u32 = self.outcomes.values().sum();
        ensure!(tried > ports + 400 && self.flooded == 600, "it did not try much: {self:?}");
        // Nothing hangs: each dial is answered at once.
        for outcome in ["TIMEDOUT", "ETIMEDOUT", "timed out"] {
            ensure!(!self.outcomes.contains_key(outcome), "dials were not answered: {self:?}");
        }
        let refused = self.outcomes.get("ECONNRESET").copied().unwrap_or_default();
        ensure!(refused > ports + 200, "the device refused {refused} of {tried}: {self:?}");
        // The agent's ports are the agent's, under either of the guest's addresses.
        for cid in [u32::MAX, CID as u32] {
            for port in [RPC, STREAM] {
                let why = self.refused.get(&format!("{cid}:{port}")).map(String::as_str);
                ensure!(why == Some("EADDRINUSE"), "binding {cid}:{port} gave {why:?}");
            }
        }
        ensure!(self.listening > 10 && self.came == 0, "somebody came: {self:?}");
        ensure!(self.cid.is_none_or(|cid| cid == CID as u32), "its own identifier is {:?}", self.cid);
        Ok(())
    }
}

/// By `katavm run`, as a user would: nothing answers, and the container's own streams and files are as good as ever.
fn nowhere(context: &Context, ports: u32) -> Result<Verdict> {
    let Some(debian) = debian::bundle() else { return Ok(debian::no_bundle()) };
    let bundle = context.scratch();
    fs::create_dir(bundle.join("data"))?;
    fs::write(bundle.join("data/hostile.py"), PROGRAM)?;
    // Whoever has a report has it written and read back through the shared file system as well.
    let script = format!("set -e; python3 /data/hostile.py 0 {ports} > /data/report; uname -r; cat /data/report");
    let data = json!({"destination": "/data", "type": "bind", "source": "data", "options": ["rbind"]});
    debian::write_changed_config(&debian, bundle, &["sh", "-c", &script], &[data], privilege)?;

    let run = Started::katavm(&["run".as_ref(), bundle.as_os_str()])?.finish(LIMIT)?;
    context.note("stderr", run.stderr.clone());
    run.expect(0, &[])?;
    let (release, report) = run.stdout.split_once('\n').context("no output")?;
    ensure!(release == context.kernel_release()?, "it ran on {release}");
    ensure!(fs::read_to_string(bundle.join("data/report"))? == report, "the report on disk differs");
    let found = Found::parse(context, report)?;
    found.judge(ports)?;
    ensure!(found.open.is_empty(), "it got through to {:?}", found.open);
    Ok(Verdict::Passed)
}

/// The program would find an open port: one that the host opens is found, and no other. The guest works on after it.
fn opened(context: &Context) -> Result<Verdict> {
    const OPEN: u32 = 4711;
    let Some(debian) = debian::bundle() else { return Ok(debian::no_bundle()) };
    let guest = Guest::boot(context, |_| ())?;
    guest.sandbox()?;
    let listener = guest.sockets.listen(OPEN)?;
    let mut hostile = guest.start_privileged(
        "hostile",
        &debian.join("rootfs"),
        &["/usr/bin/python3", "-c", PROGRAM, "4600", "4800"],
    )?;
    // While it dials, the host has its own conversation: another container, from its making to its removal.
    let busybox = rootfs(context)?;
    let beside = guest.run("beside", &busybox, &["/bin/sh", "-c", "echo undisturbed"])?;
    ensure!(beside.stdout == b"undisturbed\n" && beside.exit.status == 0, "the other container was disturbed");
    hostile.read_until(b"}\n")?;
    let (output, exit) = hostile.wait(&guest)?;
    ensure!(exit.status == 0, "status {}", exit.status);
    let found = Found::parse(context, &String::from_utf8_lossy(&output))?;
    found.judge(200)?;
    ensure!(found.open == [(HOST_CID, OPEN)], "open is {:?}", found.open);
    listener.accept(Some(Duration::from_secs(60))).context("its connection did not reach the host")?;
    let after = guest.run("after", &busybox, &["/bin/sh", "-c", "echo alive"])?;
    ensure!(after.stdout == b"alive\n" && after.exit.status == 0, "the guest does not work any more");
    guest.end()?;
    Ok(Verdict::Passed)
}
