//! What the emulated CPUs of a machine that hangs are at, asked over QEMU's monitor (QMP): it tells a kernel that waits
//! with interrupts off from a CPU that lost an interrupt and from an emulator that stands still.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// How long an answer may take. A CPU that does not leave its loop any more holds up `stop` for good.
const PATIENCE: Duration = Duration::from_secs(10);

/// The CPUs' registers and interrupt controllers as they run, and once more stopped; as far as QEMU answers.
pub fn look(stream: &UnixStream, cpus: u32) -> String {
    let mut told = String::new();
    if let Err(error) = ask_all(stream, cpus, &mut told) {
        told.push_str(&format!("QEMU's monitor: {error:#}\n"));
    }
    told
}

fn ask_all(stream: &UnixStream, cpus: u32, told: &mut String) -> Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut monitor = Monitor { reader: BufReader::new(stream), stream };
    monitor.line().context("no greeting")?;
    monitor.ask(&json!({ "execute": "qmp_capabilities" }))?;
    for running in [true, false] {
        if !running {
            monitor.ask(&json!({ "execute": "stop" })).context("the CPUs do not stop")?;
            told.push_str("stopped:\n");
        }
        told.push_str(&kept(&monitor.human("info registers -a")?, &REGISTERS));
        for cpu in 0..cpus {
            told.push_str(&format!("CPU#{cpu}'s local APIC\n"));
            told.push_str(&kept(&monitor.human(&format!("info lapic {cpu}"))?, &APIC));
        }
    }
    Ok(())
}

struct Monitor<'a> {
    reader: BufReader<&'a UnixStream>,
    stream: &'a UnixStream,
}

impl Monitor<'_> {
    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            bail!("it was closed");
        }
        Ok(serde_json::from_str(&line)?)
    }

    fn ask(&mut self, command: &Value) -> Result<Value> {
        writeln!(self.stream, "{command}")?;
        loop {
            let mut answer = self.line().with_context(|| format!("no answer to {command}"))?;
            if let Some(error) = answer.get("error") {
                bail!("{command}: {error}");
            }
            // Events come in between.
            if let Some(result) = answer.get_mut("return") {
                return Ok(result.take());
            }
        }
    }

    fn human(&mut self, line: &str) -> Result<String> {
        let answer = self.ask(&json!({ "execute": "human-monitor-command", "arguments": { "command-line": line } }))?;
        Ok(answer.as_str().unwrap_or_default().replace('\r', ""))
    }
}

/// General registers, control registers and segments; not those of floating point, which are most of it.
const REGISTERS: [&str; 10] = ["CPU#", "RAX=", "RSI=", "R8 =", "R12=", "RIP=", "CS =", "GS =", "CR", "EFER="];

/// What is pending and what is in service, the priority, and the timer.
const APIC: [&str; 6] = ["LVTT", "Timer", "ISR", "IRR", "APR", "PPR"];

/// The lines that begin with one of `wanted`.
fn kept(text: &str, wanted: &[&str]) -> String {
    let is_wanted = |line: &&str| wanted.iter().any(|start| line.trim_start().starts_with(start));
    text.lines().filter(is_wanted).map(|line| format!("{}\n", line.trim_end())).collect()
}
