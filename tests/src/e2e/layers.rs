//! Root file systems of EROFS layers, as containerd's snapshotter erofs makes them: the layers are disks of the guest, and what
//! it writes is where containerd commits it from.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::json;

use super::agent::whole_rootfs;
use super::containerd::containerd;
use super::cri::image;
use super::files::{CHANGES, LOOK};
use super::leftovers::Traces;
use super::shell::expect;
use super::{Context, Table, Verdict};

/// The table; of the versions in the lab, only Debian 14's containerd has this snapshotter.
pub const CASES: Table = (
    "layers",
    &[
        ("are_disks_of_the_guest_and_changes_are_as_the_hosts_own_would_be", changed),
        ("belong_to_each_container_of_a_pod_and_a_killed_shim_leaves_none", members),
    ],
);

/// For scripts: `root` prints which disks the guest of a container has, how many EROFS it knows, and what the container's root
/// is; `of_host` how many root file systems are mounted on the host; `upper` and `at` are where a snapshot's changes are and how
/// it is mounted at `m`; `own` is what a user does who is not root.
const WORDS: &str = r#"
    root() { ctr task exec --exec-id e$RANDOM $1 sh -c 'for disk in /sys/block/vd*; do echo $(cat $disk/serial); done; ls /sys/fs/erofs | grep -c vd; awk "\$2 == \"/\" { print \$3 }" /proc/mounts' </dev/null | tr '\n' ' '; echo; }
    of_host() { cat /proc/[0-9]*/mounts 2>/dev/null | grep ' /run/containerd/[^ ]*/rootfs ' | sort -u | wc -l; }
    at() { ctr snapshots $erofs mounts $PWD/m $1; }
    upper() { at $1 | grep -o 'upperdir=[^, ]*' | cut -d = -f 2; }
    wait_for() { until ctr task exec --exec-id e$RANDOM $1 test -e $2 </dev/null 2>p; do sleep 0.2; done; }
    own='cd tried/open; rm theirs; echo mine >theirs; stat -c %u theirs'
    # By fsconfig(2) an option has 256 bytes at most, too few for a list of layers.
    export LIBMOUNT_FORCE_MOUNT2=always
    erofs='--snapshotter erofs' many=localhost/many:latest; mkdir m; ctr image import many.tar >p 2>&1
"#;

/// Runs a script with an image of `count` layers, each of which has something of its own and takes away from those below.
fn with_layers(context: &Context, count: usize, text: &str) -> Result<String> {
    let mut layers = vec![whole_rootfs(context)?];
    for number in 1..count {
        layers.push(layer(context.scratch(), number)?);
    }
    fs::write(context.scratch().join("look.py"), LOOK)?;
    let config = json!({ "Env": ["PATH=/bin"] });
    image::of_layers("localhost/many:latest", &layers, &config, &context.scratch().join("many.tar"))?;
    containerd::<2>(context, &format!("{WORDS}\n{text}"))
}

fn layer(scratch: &Path, number: usize) -> Result<PathBuf> {
    let layer = scratch.join(format!("layer-{number}"));
    let tried = layer.join("tried");
    for folder in ["folder", "emptied", "open"] {
        fs::create_dir_all(tried.join(folder))?;
    }
    fs::set_permissions(tried.join("open"), Permissions::from_mode(0o777))?;
    for (name, text) in [
        ("folder/old", ""),
        ("emptied/1", ""),
        ("emptied/2", ""),
        ("gone", ""),
        ("open/theirs", ""),
        ("mode", ""),
        ("moved", ""),
        ("changed", "much\n"),
        (&format!("only-{number}"), ""),
        // How an image's layer takes a name away.
        (&format!(".wh.only-{}", number - 1), ""),
    ] {
        fs::write(tried.join(name), text)?;
    }
    fs::write(layer.join("changes"), CHANGES)?;
    Ok(layer)
}

fn changed(context: &Context) -> Result<Verdict> {
    let output = with_layers(
        context,
        3,
        r#"run -d $erofs $many c1 sh -c '[ -e /done ] || { cd /tried; . /changes; touch /done; }; exec sleep 1000' </dev/null; wait_for c1 /done
        ctr task exec --exec-id e2 --user 1000:1000 c1 sh -c "$own" </dev/null
        root c1; of_host; ctr task exec --exec-id e1 c1 sh -c 'cd /tried; ls -d only*; cat changed; stat -c %h linked; ls emptied folder' </dev/null
        # What stands for it on the host has nothing in its place.
        pid=$(ctr task ls | awk '$1 == "c1" { print $2 }'); ls -A /proc/$pid/root | wc -l; stop c1
        # The same process once more, over what it wrote.
        ctr task start -d c1 </dev/null; root c1; stop c1
        # The same by the host's own overlay, with its own snapshot.
        ctr snapshots $erofs prepare h1 $(ctr snapshots $erofs info c1 | jq -r .Parent) >p
        eval "$(at h1)"; (cd m/tried; . ../changes); (cd m; setpriv --reuid 1000 --regid 1000 --clear-groups sh -c "$own"); umount m
        for id in h1 c1; do python3 look.py $(upper $id)/tried | sort >upper-$id; done; diff upper-h1 upper-c1 && echo written alike
        for id in h1 c1; do eval "$(at $id)"; python3 look.py m/tried | sort >read-$id; umount m; done; diff read-h1 read-c1 && echo read alike
        # A layer is made of what the guest wrote.
        ctr snapshots $erofs commit kept c1; ctr snapshots $erofs prepare c9 kept >p
        eval "$(at c9)"; python3 look.py m/tried | sort | diff - read-c1 && echo committed; umount m
        ctr container rm --keep-snapshot c1; for id in c9 kept h1; do ctr snapshots $erofs rm $id; done
        of='awk "\$2 == \"/\" { print \$3 }" /proc/mounts'
        run --rm --read-only $erofs $many c2 sh -c "$of"' ; touch /x 2>&1 | grep -o Read-only.*'
        run --rm $erofs $many c3 sh -c "$of"'; dd if=/dev/urandom of=/large bs=1M count=8 2>/dev/null; cp /large /again; sync; cmp /large /again && echo whole; exit 3' || echo code $?
        ctr snapshots $erofs ls | grep -c '^c[0-9] ' || true; gone; of_host"#,
    )?;
    let expected = [
        "1000",
        "layer-0 layer-1 layer-2 3 overlay ",
        "0",
        "only-2",
        "much",
        "more",
        "2",
        "emptied:",
        "",
        "folder:",
        "new",
        "there",
        "0",
        "layer-0 layer-1 layer-2 3 overlay ",
        "1000",
        "written alike",
        "read alike",
        "committed",
        "overlay",
        "Read-only file system",
        "overlay",
        "whole",
        "code 3",
        "0",
        "0",
    ];
    expect(&output, &expected)?;
    Ok(Verdict::Passed)
}

fn members(context: &Context) -> Result<Verdict> {
    let traces = Traces::of(Path::new("/nonexistent"));
    let output = with_layers(
        context,
        14,
        r#"in_pod() { pod=$1 id=$2 of=$3; run -d --annotation io.kubernetes.cri.sandbox-id=$pod $erofs $of $id sh -c 'echo $0 >/mine; exec sleep 1000' $id </dev/null; wait_for $id /mine; }
        for id in c1 c2; do in_pod c1 $id $image; done; root c1; root c2
        # More layers than there are disks for: all of them on the host, and shared.
        in_pod c1 c3 $many; root c3; of_host; ctr task exec --exec-id e1 c3 sh -c 'ls -d /tried/only*' </dev/null
        stop c2; cat $(upper c2)/mine; ctr container rm c2; in_pod c1 c4 $image; root c4
        # One that cannot be made leaves nothing in the guest.
        run -d --annotation io.kubernetes.cri.sandbox-id=c1 $erofs $image c6 nosuch </dev/null >p 2>&1 || echo code $?; ctr container rm c6
        root c1; ctr task exec --exec-id e1 c1 cat /mine </dev/null; pgrep -xc katavm-sandbox
        for id in c4 c3 c1; do stop $id; ctr container rm $id; done; gone; of_host
        run -d $erofs $image c5 sh -c 'echo written >/x; touch /done; while :; do date >>/y; done' </dev/null; wait_for c5 /done
        written=$(upper c5); pkill -KILL -x 'katavm-sandbox|katavm-watcher'; until [ -z "$(status c5)" ]; do sleep 0.1; done
        cat $written/x; test -s $written/y && echo and more
        ctr task start -d c5 </dev/null; root c5; stop c5; ctr container rm c5; ctr snapshots $erofs ls | grep -o '^c[0-9] ' || echo no snapshot is left; gone; of_host"#,
    )?;
    let expected = [
        "layer-0 layer-0 2 overlay ",
        "layer-0 layer-0 2 overlay ",
        "layer-0 layer-0 2 virtiofs ",
        "1",
        "/tried/only-13",
        "c2",
        "layer-0 layer-0 2 overlay ",
        "code 1",
        "layer-0 layer-0 2 overlay ",
        "c1",
        "1",
        "0",
        "written",
        "and more",
        "layer-0 1 overlay ",
        "no snapshot is left",
        "0",
    ];
    expect(&output, &expected)?;
    traces.expect_nothing_of_katavm()?;
    Ok(Verdict::Passed)
}
