//! State structs are no decoration: a guest under load is serialised, torn down, and rebuilt from the bytes.

use std::fs::{self, File};

use anyhow::{Context as _, Result, ensure};
use katavm_devices::fs::{ExportOptions, Fs};
use katavm_devices::net::Net;
use katavm_devices::rng::Rng;
use katavm_devices::vsock::Vsock;
use katavm_vmm::snapshot::{DeviceState, MicrovmState};
use katavm_vmm::{Microvm, MicrovmConfig};

use super::agent::rootfs;
use super::guest::{CID, Guest};
use super::{Context, Row, Verdict};

/// The table.
pub const CASES: (&str, &[Row]) =
    ("snapshot", &[("a_busy_guest_is_rebuilt_from_bytes", rebuilt), ("a_running_guest_is_not_saved", running)]);

/// Writes files, reads them back, and tells each checksum; 40 of them.
const WORK: &str = "i=0; while [ $i -lt 40 ]; do i=$((i+1)); head -c 200000 /dev/urandom > /f$i; \
                    a=$(sha256sum < /f$i); b=$(cat /f$i | sha256sum); [ \"$a\" = \"$b\" ] || exit 9; echo $i $a; done; exit 5";

fn rebuilt(context: &Context) -> Result<Verdict> {
    let root = rootfs(context)?;
    let mut guest = Guest::boot(context, |_| ())?;
    guest.sandbox()?;
    let mut running = guest.start("c1", &root, &["/bin/sh", "-c", WORK])?;
    running.read_until(b"5 ")?;
    for _ in 0..3 {
        guest = rebuild(context, guest, &[("c1", &root)])?;
        running.read_more()?;
    }
    let (stdout, exit) = running.wait(&guest)?;
    ensure!(exit.status == 5, "status {}; output:\n{}", exit.status, String::from_utf8_lossy(&stdout));
    let lines: Vec<&str> = std::str::from_utf8(&stdout)?.lines().collect();
    ensure!(lines.len() == 40, "{} lines", lines.len());
    for (line, number) in lines.iter().zip(1..) {
        let sum = line.split_whitespace().nth(1).context("no checksum")?;
        let host = std::process::Command::new("sha256sum").arg(root.join(format!("f{number}"))).output()?.stdout;
        ensure!(String::from_utf8_lossy(&host).starts_with(sum), "file {number} differs");
    }
    guest.end()?;
    Ok(Verdict::Passed)
}

/// Serialises the guest, drops it, and builds another from nothing but bytes, a memory file, and its streams. Network
/// interfaces are without their taps then.
pub(super) fn rebuild(context: &Context, guest: Guest, exports: &[(&str, &std::path::Path)]) -> Result<Guest> {
    guest.vm.pause()?;
    let bytes = postcard::to_stdvec(&guest.vm.save()?)?;
    let path = context.scratch().join("memory");
    guest.vm.save_memory(&mut File::create(&path)?)?;
    let streams = guest.vm.detach_streams()?;
    let Guest { vm, sockets, share, ready, agent, runtime, .. } = guest;
    let memory_mib = MicrovmConfig::default().memory_mib;
    drop(vm);
    drop(share);

    let state: MicrovmState = postcard::from_bytes(&bytes)?;
    let share = katavm_devices::fs::FsShare::new();
    for (name, root) in exports {
        share.add_export(name, File::open(root)?.into(), ExportOptions::default())?;
    }
    let mut builder = Microvm::builder(MicrovmConfig { memory_mib, ..Default::default() });
    let mut streams = Some(streams);
    for device in &state.devices {
        builder = match device {
            DeviceState::Vsock(saved) => {
                builder.vsock(Vsock::restore(&sockets, CID, saved, streams.take().unwrap_or_default())?)
            }
            DeviceState::Fs(saved) => {
                let fs = Fs::new("katavm", share.clone())?;
                share.restore(saved);
                builder.fs(fs)
            }
            DeviceState::Rng(saved) => builder.rng(Rng::restore(saved)?),
            DeviceState::Net(saved) => builder.net(Net::restore(saved)?),
            DeviceState::Block(_) => anyhow::bail!("this guest has no disk"),
        };
    }
    let vm = builder.build_from(&state, &File::open(&path)?)?;
    fs::remove_file(&path)?;
    vm.resume()?;
    Ok(Guest { vm, sockets, share, ready, agent, runtime, rebuilt: true })
}

fn running(context: &Context) -> Result<Verdict> {
    let guest = Guest::boot(context, |_| ())?;
    let error = guest.vm.save().err().context("it was saved")?;
    ensure!(error.to_string().contains("paused first"), "{error}");
    guest.end()?;
    Ok(Verdict::Passed)
}
