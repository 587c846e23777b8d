//! Root file systems on block devices and in images: disks of the guest, which the host does not mount.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use containerd_shim_protos::api::{
    CreateTaskRequest, DeleteRequest, Mount, ShutdownRequest, StartRequest, WaitRequest,
};
use containerd_shim_protos::shim_async::{Client, TaskClient};
use tokio::runtime::Runtime;

use super::bootstrap::{ID, bundle, soon, start, wait_until_gone};
use super::containerd::containerd;
use super::leftovers::Traces;
use super::shell::{expect, script};
use super::{Context, Row, Table, Verdict};

/// The table.
pub const CASES: Table = ("block_root", &[("a_block_device_is_taken_and_what_cannot_be_mounted_is_named", devices)]);
/// With Debian 13's containerd.
pub const OWN: Table = ("block_root-1.7", &rows::<1>());
/// With Debian 14's.
pub const LONG: Table = ("block_root-2", &rows::<2>());

const fn rows<const V: usize>() -> [Row; 3] {
    [
        ("the_guest_alone_has_it_and_a_commit_has_all_that_was_written", committed::<V>),
        ("members_of_a_pod_have_theirs_as_long_as_there_are_places", members::<V>),
        ("the_snapshot_of_a_killed_shim_can_be_removed", killed::<V>),
    ]
}

/// For scripts: `root` prints what a container's root is on, `on_host` how many images the host has as loop devices and whether
/// it has mounted any, `image_of` the image of a snapshot.
const WORDS: &str = r#"
    root() { ctr task exec --exec-id e$RANDOM $1 awk '$2 == "/" { print $1, $3 }' /proc/mounts </dev/null; }
    on_host() { echo $(losetup -a | grep -c blockfile) $(cat /proc/[0-9]*/mounts 2>/dev/null | grep -q ' ext4 ' && echo mounted); }
    image_of() { ctr snapshots --snapshotter blockfile mounts /mnt $1 | grep -o '/var/lib/[^ ]*'; }
    block='--snapshotter blockfile'
"#;

fn with_containerd<const V: usize>(context: &Context, text: &str) -> Result<String> {
    containerd::<V>(context, &format!("{WORDS}\n{text}"))
}

fn committed<const V: usize>(context: &Context) -> Result<Verdict> {
    let output = with_containerd::<V>(
        context,
        r#"mkdir data two; echo shared >data/x; echo two >two/x
        run -d $block --mount type=bind,src=$PWD/data,dst=/made/here,options=rbind:ro $image c1 sh -c '
            [ -e /kept ] || { dd if=/dev/urandom of=/many bs=64k count=64; sha256sum /many >/sum; echo kept >/kept; cat /made/here/x >/seen; }; exec sleep 1000' </dev/null
        ctr task exec --exec-id e1 c1 sh -c 'until [ -s /seen ]; do sleep 0.1; done' </dev/null; root c1; on_host
        # What stands for it on the host has nothing in its place, and takes nothing.
        pid=$(ctr task ls | awk '$1 == "c1" { print $2 }'); ls -A /proc/$pid/root | wc -l
        touch /proc/$pid/root/x 2>&1 | grep -o 'Read-only file system'
        file=$(image_of c1); run --rm --mount type=ext4,src=$file,dst=/x $image c2 true 2>&1 | grep -o 'it is in use as another disk'
        stop c1; e2fsck -fn $file >fsck 2>&1 && echo whole; dumpe2fs -h $file 2>p | grep -c needs_recovery || true
        # The same process once more, which finds what it wrote.
        ctr task start -d c1 </dev/null; root c1; stop c1
        # An image whose only layer is what the snapshot is committed as.
        tar -C two -c . | podman import -q - localhost/two:latest >p 2>&1
        layer=$(podman image inspect -f '{{ index .RootFS.Layers 0 }}' localhost/two:latest)
        podman save -q --format oci-archive -o two.tar localhost/two:latest; podman rmi -f localhost/two:latest >p 2>&1
        ctr image import --no-unpack two.tar >p 2>&1; ctr snapshots --snapshotter blockfile commit $layer c1
        ctr snapshots --snapshotter blockfile label $layer containerd.io/gc.root=kept >p; ctr container rm --keep-snapshot c1
        run --rm $block localhost/two:latest c2 sh -c 'cat /kept /seen; sha256sum -c /sum; test -e /x || echo without the other image'
        run --rm --read-only $block $image c3 sh -c 'touch /x 2>&1 | grep -o Read-only.*'
        ctr snapshots --snapshotter blockfile ls | grep -c '^c[0-9] ' || true; gone; on_host"#,
    )?;
    expect(
        &output,
        &[
            "/dev/vda ext4",
            "0",
            "0",
            "Read-only file system",
            "it is in use as another disk",
            "whole",
            "0",
            "/dev/vda ext4",
            "kept",
            "shared",
            "/many: OK",
            "without the other image",
            "Read-only file system",
            "0",
            "0",
        ],
    )?;
    Ok(Verdict::Passed)
}

fn members<const V: usize>(context: &Context) -> Result<Verdict> {
    let output = with_containerd::<V>(
        context,
        r#"in_pod() { pod=$1 id=$2; shift 2; run -d --annotation io.kubernetes.cri.sandbox-id=$pod "$@" $image $id sh -c 'echo $0 >/mine; exec sleep 1000' $id </dev/null; }
        of() { root $1 | sed 's/.* //'; }
        # Four places, as nothing said that there would be disks.
        in_pod c1 c1; for id in c2 c3 c4 c5 c6; do in_pod c1 $id $block; done
        for id in c1 c2 c3 c4 c5 c6; do of $id; done | tr '\n' ' '; echo
        run --rm --annotation io.kubernetes.cri.sandbox-id=c1 $block $image c8 echo the output is there; ctr container ls -q | grep -c c8 || true
        while [ $(losetup -a | grep -c blockfile) -gt 1 ]; do sleep 0.1; done; on_host; grep -c 'mounted here and shared' containerd.log; pgrep -xc katavm-sandbox
        for id in c2 c3; do stop $id; debugfs -R 'cat mine' $(image_of $id) 2>p; ctr container rm $id; done
        in_pod c1 c7 $block; of c7
        for id in c7 c6 c5 c4 c1; do stop $id; ctr container rm $id; done; gone
        # A pod that begins with a disk has places for more.
        for id in c1 c2 c3 c4 c5 c6; do in_pod c1 $id $block; done
        for id in c1 c2 c3 c4 c5 c6; do root $id; done; on_host
        for id in c6 c5 c4 c3 c2 c1; do stop $id; ctr container rm $id; done; gone
        while losetup -a | grep -q blockfile; do sleep 0.1; done; on_host"#,
    )?;
    let letters = ["a", "b", "c", "d", "e", "f"].map(|letter| format!("/dev/vd{letter} ext4"));
    let mut expected = vec![
        "virtiofs ext4 ext4 ext4 ext4 virtiofs ",
        "the output is there",
        "0",
        "1 mounted",
        "2",
        "1",
        "c2",
        "c3",
        "ext4",
    ];
    expected.extend(letters.iter().map(String::as_str));
    expected.extend(["0", "0"]);
    expect(&output, &expected)?;
    Ok(Verdict::Passed)
}

fn killed<const V: usize>(context: &Context) -> Result<Verdict> {
    let traces = Traces::of(Path::new("/nonexistent"));
    let output = with_containerd::<V>(
        context,
        r#"for victims in katavm-sandbox 'katavm-sandbox|katavm-watcher'; do
            run -d $block $image c1 sh -c 'while :; do date >>/x; sync; done' </dev/null; root c1
            pkill -KILL -x "$victims"; until [ -z "$(status c1)" ]; do sleep 0.1; done
            ctr container rm c1; ctr snapshots --snapshotter blockfile ls | grep -c '^c1 ' || true; on_host
        done; gone"#,
    )?;
    expect(&output, &["/dev/vda ext4", "0", "0", "/dev/vda ext4", "0", "0"])?;
    traces.expect_nothing_of_katavm()?;
    Ok(Verdict::Passed)
}

/// What a snapshotter of block devices gives, given by this program.
fn devices(context: &Context) -> Result<Verdict> {
    let traces = Traces::of(Path::new("/nonexistent"));
    let folder = bundle(context)?;
    let device = script(
        context,
        "jq '.process.args[2] = \"echo written >/answer; exit 7\" | .root.readonly = false' config.json >c; mv c config.json
         truncate -s 64M root.img; mkfs.ext4 -qd rootfs root.img; rm -rf rootfs; mkdir rootfs there; losetup -f --show root.img",
    )?;
    let device = device.trim();
    let shell = |text: &str| script(context, text);
    let outcome = with_device(&folder, device, &shell);
    shell(&format!("losetup -d {device}"))?;
    outcome?;
    ensure!(
        shell("debugfs -R 'cat answer' root.img 2>p; e2fsck -fn root.img >p 2>&1 && echo whole")? == "written\nwhole\n"
    );
    traces.expect_nothing_of_katavm()?;
    Ok(Verdict::Passed)
}

fn with_device(folder: &Path, device: &str, shell: &dyn Fn(&str) -> Result<String>) -> Result<()> {
    let refused = created(folder, device, "nosuch")?.err().context("an option that is none")?;
    ensure!(refused.contains(&format!("the root file system: the guest cannot use {device}")), "{refused}");
    ensure!(refused.contains("nosuch") && refused.contains("is none of it"), "{refused}");
    shell(&format!("mount {device} there"))?;
    let refused = created(folder, device, "rw")?;
    shell("umount there")?;
    let refused = refused.err().context("a device that is in use")?;
    ensure!(refused.contains(&format!("cannot open {device} for the guest: Device or resource busy")), "{refused}");
    created(folder, device, "noatime")?.map_err(anyhow::Error::msg)?;
    ensure!(fs::read_dir(folder.join("rootfs"))?.next().is_none(), "something was written to the folder on the host");
    Ok(())
}

/// A container's life on the device, by a server of its own; or why it was not made.
fn created(folder: &Path, device: &str, option: &str) -> Result<Result<(), String>> {
    let address = String::from_utf8(start(folder, Stdio::null())?)?;
    let rootfs =
        Mount { type_: "ext4".into(), source: device.into(), options: vec![option.into()], ..Default::default() };
    let (id, bundle) = (ID.to_owned(), folder.display().to_string());
    let create = CreateTaskRequest { id: id.clone(), bundle, rootfs: vec![rootfs], ..Default::default() };
    let outcome = Runtime::new()?.block_on(async {
        let task = TaskClient::new(Client::connect(&address).await?);
        let created = task.create(soon(), &create).await.map(drop).map_err(|error| error.to_string());
        if created.is_ok() {
            task.start(soon(), &StartRequest { id: id.clone(), ..Default::default() }).await?;
            let exit = task.wait(soon(), &WaitRequest { id: id.clone(), ..Default::default() }).await?;
            ensure!(exit.exit_status == 7, "{exit}");
            // The end is told when the guest has let go of it.
            let exclusive = "import os, sys; os.open(sys.argv[1], os.O_RDWR | os.O_EXCL)";
            let opened = Command::new("python3").args(["-c", exclusive, device]).output()?;
            ensure!(opened.status.success(), "{}", String::from_utf8_lossy(&opened.stderr));
            task.delete(soon(), &DeleteRequest { id: id.clone(), ..Default::default() }).await?;
        }
        task.shutdown(soon(), &ShutdownRequest { id, ..Default::default() }).await?;
        Ok(created)
    })?;
    wait_until_gone(Path::new(address.trim_start_matches("unix://")))?;
    Ok(outcome)
}
