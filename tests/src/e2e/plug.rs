//! Disks and network interfaces that come and go, beside a disk that works all the time.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use katavm_devices::block::{Block, EngineKind};
use katavm_devices::net::Stream;
use katavm_protocol::agent::{ConfigureNetworkRequest, Interface};
use katavm_runtime::network::slot;

use super::disk::{attach, by, detach, disk, finish, image, run, start, work};
use super::guest::Guest;
use super::{Context, Table, Verdict};

/// The table.
pub const CASES: Table = ("plug", &[("disks_and_interfaces_come_and_go", |context| rounds(context, 3))]);
/// Often.
pub const LONG: Table = ("plug", &[("disks_and_interfaces_come_and_go_200_times", |context| rounds(context, 200))]);

/// More than there are interrupt lines, so that some are shared.
const DISKS: usize = 16;
const INTERFACES: usize = 4;
/// How long a frame of the guest may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// All of them come, are used, and go.
fn rounds(context: &Context, rounds: usize) -> Result<Verdict> {
    let worker = image(context, "worker", 32)?;
    let nets = (0..INTERFACES).map(|_| slot(1)).collect::<Result<Vec<_>, _>>()?;
    let macs: Vec<_> = nets.iter().map(|net| net.mac()).collect();
    let devices = |builder| {
        let mut builder = nets.into_iter().fold(builder, katavm_vmm::MicrovmBuilder::net);
        builder = builder.block(Block::new(disk(&worker, by(EngineKind::Automatic))?)?);
        (0..DISKS).try_fold(builder, |builder, _| Ok(builder.block(Block::slot(1)?)))
    };
    let guest = Guest::boot_on(context, devices, |config| config.memory_mib = 512)?;
    guest.sandbox()?;
    let mut works = start(&guest, "work", &work("/dev/vda"))?;
    works.read_until(b"works")?;
    for round in 0..rounds {
        let disks = plug_disks(context, &guest, round)?;
        let hosts = plug_interfaces(&guest, &macs)?;
        look(&guest, round, &disks)?;
        hosts.iter().try_for_each(hear)?;
        disks.iter().try_for_each(|(place, _)| detach(&guest, *place))?;
        for index in 0..INTERFACES {
            guest.vm.detach_net(index)?;
        }
        guest.ask(guest.agent.configure_network(Guest::soon(), &ConfigureNetworkRequest::new()))?;
        drop(hosts);
        let held = of_disks()?;
        ensure!(held.len() == 2, "round {round}: beside those of the disk that works there are {held:?}");
    }
    let left = run(&guest, "left", "ls /sys/block | grep -c ^vd; ls /sys/class/net")?;
    ensure!(left == "1\nlo\n", "this is left: {left}");
    finish(&guest, [works])?;
    guest.end()?;
    Ok(Verdict::Passed)
}

/// Descriptors of this process that belong to disks: files, and a ring each.
fn of_disks() -> Result<Vec<PathBuf>> {
    let links = fs::read_dir("/proc/self/fd")?.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    let is_of_disk = |link: &PathBuf| {
        let link = link.to_string_lossy();
        link.contains("/plugged-") || link.contains("/worker") || link.contains("io_uring")
    };
    Ok(links.filter(is_of_disk).collect())
}

/// The byte that a disk begins with in a round.
fn mark(round: usize, number: usize) -> u8 {
    (round * 32 + number) as u8
}

/// Puts a disk into each place: the places, and the names of the devices in the guest.
fn plug_disks(context: &Context, guest: &Guest, round: usize) -> Result<Vec<(u32, String)>> {
    let plug = |number| {
        let path = image(context, &format!("plugged-{number}"), 1)?;
        File::options().write(true).open(&path)?.write_all_at(&[mark(round, number); 4096], 0)?;
        attach(guest, disk(&path, by(EngineKind::Automatic))?)
    };
    (0..DISKS).map(plug).collect()
}

/// Reads from each disk what the host has written there.
fn look(guest: &Guest, round: usize, disks: &[(u32, String)]) -> Result<()> {
    let read = |(_, device): &(u32, String)| {
        format!("dd if={device} bs=4k count=1 iflag=direct status=none | od -An -tu1 -N1; ")
    };
    let output = run(guest, &format!("look-{round}"), &disks.iter().map(read).collect::<String>())?;
    let found: Vec<u8> = output.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    let expected = (0..disks.len()).map(|number| mark(round, number));
    ensure!(found.iter().copied().eq(expected), "round {round}: {output}");
    Ok(())
}

/// Gives each interface of the guest a stream; the host's ends.
fn plug_interfaces(guest: &Guest, macs: &[[u8; 6]]) -> Result<Vec<UnixStream>> {
    let mut request = ConfigureNetworkRequest::new();
    let mut hosts = Vec::new();
    for (index, mac) in macs.iter().enumerate() {
        let (ours, theirs) = UnixStream::pair()?;
        guest.vm.attach_net(index, [Stream::new(theirs)?])?;
        hosts.push(ours);
        let (name, device_mac) = (format!("eth{index}"), mac.to_vec());
        request.interfaces.push(Interface { device_mac, name, up: true, ipv6: true, ..Default::default() });
    }
    guest.ask(guest.agent.configure_network(Guest::soon(), &request))?;
    Ok(hosts)
}

/// Waits for a frame of the guest, which tells its neighbours that it is there (RFC 4862).
fn hear(host: &UnixStream) -> Result<()> {
    host.set_read_timeout(Some(PATIENCE))?;
    let mut length = [0; 4];
    let mut host = host;
    host.read_exact(&mut length).context("the guest sends nothing")?;
    let mut frame = vec![0; u32::from_be_bytes(length) as usize];
    host.read_exact(&mut frame)?;
    let ethertype = frame.get(12..14).context("a short frame")?;
    ensure!(ethertype == [0x86, 0xdd], "a frame of another protocol: {frame:02x?}");
    Ok(())
}
