//! Files that a guest shares behave as on the host.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use katavm_protocol::agent::{CheckRequest, Exit};
use serde_json::json;

use super::agent::{rootfs, whole_rootfs};
use super::guest::Guest;
use super::leftovers::Traces;
use super::run::bundle;
use super::shell::{expect, script};
use super::{Context, Row, Table, Verdict};
use crate::files::{FSX, TABLE, compare, digest};

/// The table.
pub const CASES: Table = (
    "files",
    &[
        ("behave_as_on_the_host", behave),
        ("are_what_was_written", written),
        ("one_that_the_host_holds_back_is_in_nobodys_way", held_back),
        ("an_overlay_of_the_guest_is_as_the_hosts_own_makes_it", overlay),
    ],
);

/// All cases of the table, and an hour of random operations.
pub const LONG: (&str, &[Row]) =
    ("files_for_long", &[("behave_as_on_the_host", behave_in_all), ("are_what_was_written", written_for_long)]);

/// Where a guest's program is, and what it tries.
const PROGRAM: &str = "/program";
const FOLDER: &str = "/tried";
/// Of the table's cases, one in so many is tried in a short run: others with each caller, operation and kind of file.
const STEP: &str = "19";
/// Of random operations in a file, in seconds; there are two files at a time.
const SHORT_TIME: u64 = 8;
const LONG_TIME: u64 = 3600;

/// A root file system with this program and the libraries that it has loaded.
fn root_with_program(context: &Context) -> Result<PathBuf> {
    let root = rootfs(context)?;
    fs::copy(std::env::current_exe()?, root.join(PROGRAM.trim_start_matches('/')))?;
    let maps = fs::read_to_string("/proc/self/maps")?;
    let mapped = maps.lines().filter_map(|line| line.split_ascii_whitespace().nth(5));
    let libraries: BTreeSet<&str> = mapped.filter(|path| path.contains(".so")).collect();
    for library in libraries {
        copy_into(&root, library, library)?;
        if library.contains("/ld-linux") {
            copy_into(&root, library, "/lib64/ld-linux-x86-64.so.2")?;
        }
    }
    fs::create_dir(root.join(FOLDER.trim_start_matches('/')))?;
    Ok(root)
}

fn copy_into(root: &Path, from: &str, to: &str) -> Result<()> {
    let to = root.join(to.trim_start_matches('/'));
    fs::create_dir_all(to.parent().context("a file at the root")?)?;
    fs::copy(from, &to).with_context(|| format!("cannot copy {from}"))?;
    Ok(())
}

fn done(output: &[u8], exit: &Exit) -> Result<String> {
    let said = String::from_utf8_lossy(output).into_owned();
    ensure!(exit.status == 0, "the program in the guest ended with {exit:?}:\n{}", tail(&said));
    Ok(said)
}

fn tail(said: &str) -> String {
    let lines: Vec<&str> = said.lines().collect();
    lines.get(lines.len().saturating_sub(40)..).unwrap_or_default().join("\n")
}

fn behave(context: &Context) -> Result<Verdict> {
    behave_in(context, STEP)
}

fn behave_in_all(context: &Context) -> Result<Verdict> {
    behave_in(context, "1")
}

fn behave_in(context: &Context, step: &str) -> Result<Verdict> {
    let root = root_with_program(context)?;
    let on_host = root.join("on-host");
    fs::create_dir(&on_host)?;
    // Where devices may be opened, as in a guest: the lab's folder for temporary files says no.
    let with_devices = "mount --bind \"$3\" \"$3\"; mount -o remount,bind,dev \"$3\"; exec \"$@\"";
    let program = std::env::current_exe()?;
    let host = Command::new("unshare")
        .args(["-m", "sh", "-ec", with_devices, "sh"])
        .args([program.as_os_str(), TABLE.as_ref(), on_host.as_os_str(), step.as_ref()])
        .output()?;
    ensure!(
        host.status.success(),
        "on the host: {}{}",
        tail(&String::from_utf8_lossy(&host.stdout)),
        tail(&String::from_utf8_lossy(&host.stderr))
    );
    let guest = Guest::boot(context, |_| ())?;
    guest.sandbox()?;
    let (output, exit) = guest.start_privileged("files", &root, &[PROGRAM, TABLE, FOLDER, step])?.wait(&guest)?;
    context.note("host", host.stdout.clone());
    context.note("guest", output.clone());
    let cases = compare(&String::from_utf8_lossy(&host.stdout), &done(&output, &exit)?)?;
    ensure!(cases >= 300, "only {cases} cases");
    println!("{cases} cases are the same on host and guest");
    guest.end()?;
    Ok(Verdict::Passed)
}

fn written(context: &Context) -> Result<Verdict> {
    at_random(context, SHORT_TIME)
}

fn written_for_long(context: &Context) -> Result<Verdict> {
    at_random(context, LONG_TIME)
}

fn at_random(context: &Context, seconds: u64) -> Result<Verdict> {
    let root = root_with_program(context)?;
    let guest = Guest::boot(context, |_| ())?;
    guest.sandbox()?;
    let script = format!(
        "{PROGRAM} {FSX} {FOLDER}/one 1 {seconds} >{FOLDER}/said & {PROGRAM} {FSX} {FOLDER}/other 2 {seconds}; code=$?
         wait $! && cat {FOLDER}/said && exit $code"
    );
    let output = guest.run("random", &root, &["/bin/sh", "-c", &script])?;
    let said = done(&output.stdout, &output.exit)?;
    println!("{}", said.trim_end());
    for file in ["one", "other"] {
        let digest = format!("digest {:016x}", digest(&fs::read(root.join("tried").join(file))?));
        ensure!(said.contains(&digest), "the host has another {file} than the guest: {digest} is not in\n{said}");
    }
    guest.ask(guest.agent.check(Guest::soon(), &CheckRequest::default()))?;
    guest.end()?;
    Ok(Verdict::Passed)
}

/// Holds leases on files (fcntl(2), F_SETLEASE) until its standard input ends: who opens one of them waits.
const LEASES: &str = "import fcntl, os, signal, sys
signal.signal(signal.SIGIO, signal.SIG_IGN)
for path in sys.argv[1:]:
    fcntl.fcntl(os.open(path, os.O_RDWR), fcntl.F_SETLEASE, fcntl.F_WRLCK)
print('held', flush=True)
sys.stdin.read()";

fn held_back(context: &Context) -> Result<Verdict> {
    whole_rootfs(context)?;
    bundle(context, &["sleep", "100000"], |_| ())?;
    let traces = Traces::of(context.scratch());
    fs::write(context.scratch().join("leases.py"), LEASES)?;
    let output = script(
        context,
        "katavm run -d c1 </dev/null >out 2>&1
         for n in 1 2 3; do echo held back $n >rootfs/held$n; echo free $n >rootfs/free$n; done
         coproc python3 leases.py rootfs/held1 rootfs/held2 rootfs/held3; read -ru ${COPROC[0]} word; echo $word
         for n in 1 2 3; do katavm exec c1 cat /held$n </dev/null >late$n & late[$n]=$!; done; sleep 2
         for n in 1 2 3; do katavm exec c1 cat /free$n </dev/null; done; cat late?; echo nothing yet
         exec {COPROC[1]}>&-; wait ${late[*]}; cat late?
         katavm delete --force c1; rm rootfs/held? rootfs/free?",
    )?;
    let free = ["held", "free 1", "free 2", "free 3", "nothing yet"];
    let late = ["held back 1", "held back 2", "held back 3"];
    expect(&output, &[&free[..], &late[..]].concat())?;
    traces.expect_nothing_new()?;
    Ok(Verdict::Passed)
}

/// What is done to a file system that lies over another.
pub(super) const CHANGES: &str = "set -e
rm gone; rm -r folder; mkdir folder; echo new >folder/new; echo more >>changed; chmod 750 mode
mv moved folder/there; rm -r emptied/*; ln -s changed link; ln changed linked; mkfifo fifo";

/// What is in a folder, with the marks by which overlayfs knows what it hides.
pub(super) const LOOK: &str = "import os, stat, sys
os.chdir(sys.argv[1])
marks = ['trusted.overlay.' + mark for mark in ('opaque', 'redirect', 'metacopy', 'whiteout')]
for folder, folders, files in os.walk('.'):
    for path in (os.path.join(folder, name) for name in folders + files):
        node, has = os.lstat(path), os.listxattr(path, follow_symlinks=False)
        text = open(path).read() if stat.S_ISREG(node.st_mode) else ''
        # A whiteout is linked as often as overlayfs likes.
        links = 0 if stat.S_ISCHR(node.st_mode) else node.st_nlink
        found = [(mark, os.getxattr(path, mark, follow_symlinks=False)) for mark in marks if mark in has]
        print(path, oct(node.st_mode), node.st_uid, node.st_gid, node.st_rdev, links, repr(text), found)";

/// overlayfs in a guest, its upper folder shared by the host, leaves there what the host's would have: an engine that takes
/// the folder for a layer need not know who wrote it. Of the host's file systems not all can be written so (RENAME_WHITEOUT):
/// its own overlayfs cannot, tmpfs can.
fn overlay(context: &Context) -> Result<Verdict> {
    whole_rootfs(context)?;
    let over = "mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work merged";
    let steps = format!("cd /tried; {over}; cd merged; . /tried/changes; cd ..; umount merged");
    bundle(context, &["sh", "-ec", &steps], |config| {
        let all = json!(["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_MKNOD", "CAP_SYS_ADMIN"]);
        config["process"]["capabilities"] = json!({"bounding": all, "effective": all, "permitted": all});
        let guest = json!({"destination": "/tried", "type": "bind", "source": "guest", "options": ["rbind"]});
        config["mounts"].as_array_mut().into_iter().for_each(|mounts| mounts.push(guest.clone()));
    })?;
    let traces = Traces::of(context.scratch());
    for (name, text) in [("changes", CHANGES), ("look.py", LOOK)] {
        fs::write(context.scratch().join(name), text)?;
    }
    let output = script(
        context,
        &format!(
            "over() {{ (cd $1; {over}); }}
             for who in host guest; do
                 mkdir $who; mount -t tmpfs tmpfs $who; cp changes $who; cd $who; mkdir lower upper work merged; cd lower
                 mkdir folder emptied; touch folder/old emptied/1 emptied/2 gone mode moved; echo much >changed; cd ../..
             done
             over host; (cd host/merged; . ../changes); umount host/merged
             katavm run c1 </dev/null
             python3 look.py host/upper | sort >by-host; python3 look.py guest/upper | sort >by-guest; diff by-host by-guest && echo written alike
             grep -c \"'trusted.overlay.opaque', b'y'\" by-guest; grep -c ' 0o20000 0 0 0 ' by-guest
             for who in host guest; do over $who; python3 look.py $who/merged | sort >read-$who; umount $who/merged $who; done
             diff read-host read-guest && echo read alike; grep -c new read-guest; rmdir host guest"
        ),
    )?;
    expect(&output, &["written alike", "1", "4", "read alike", "1"])?;
    traces.expect_nothing_new()?;
    Ok(Verdict::Passed)
}
