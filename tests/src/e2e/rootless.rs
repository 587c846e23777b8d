//! Podman of an ordinary user: it runs katavm as root of a user namespace.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::agent::rootfs;
use super::context::is_lab;
use super::leftovers::Traces;
use super::shell::{expect, script};
use super::user::{KvmAccess, give, installed};
use super::{Context, Table, Verdict};

/// The table.
pub const CASES: Table = ("rootless", &[("podman_without_root_runs_containers", podman)]);

const USER: u32 = 61_236;
/// The first of the users and groups that it has besides itself.
const FIRST: u32 = 200_000;
/// Whatever opens it may use it: so has udev it.
const TUN: &str = "/dev/net/tun";

fn podman(context: &Context) -> Result<Verdict> {
    if !is_lab() {
        return Ok(Verdict::Skipped("it makes a user with ranges of further users, and this is no lab".into()));
    }
    let access = KvmAccess::grant()?.context("the lab's /dev/kvm is root's")?;
    let home = prepare(context, access.group())?;
    let traces = Traces::with_state(Path::new("/nonexistent"), &home.join("run/katavm"));
    let output = script(
        context,
        "[ -e /etc/resolv.conf ] || echo 'nameserver 192.0.2.1' >/etc/resolv.conf # Podman wants one
         cat >tried <<'END'
podman() { command podman --runtime $HOME/bin/katavm \"$@\"; }
tar -C rootfs -c . | podman import - bb >import 2>&1
podman run --rm bb sh -c 'uname -r; id -u; exit 7' || echo code $?
echo typed | podman run --rm -i --network none --memory 100m --pids-limit 50 bb sh -c 'cat; cat /sys/fs/cgroup/memory.max'
mkdir volume; echo mine >volume/file
podman run --rm --network none -v $PWD/volume:/v bb sh -c 'stat -c %u:%g /v/file; cat /v/file; mkdir /v/new; chown 33:44 /v/new'
stat -c %u:%g volume/file volume/new
podman run --rm --network none --userns keep-id -v $PWD/volume:/v bb sh -c 'id -u; id -g; stat -c %u:%g /v/file; touch /v/kept'
stat -c %u:%g volume/kept
serve='trap \"exit 3\" TERM; echo hello >/tmp/index.html; httpd -p 80 -h /tmp; while :; do sleep 1; done'
podman run -d --name web --network bridge bb sh -c \"$serve\" >id
ip=$(podman inspect web --format '{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}')
podman unshare --rootless-netns timeout 90 sh -c \"until curl -fsS -o page -m 20 http://$ip/; do sleep 1; done\" 2>err; cat page
podman exec web sh -c 'hostname >/dev/null; echo in exec; exit 4' || echo code $?
# By the helpers of both kinds of networks: rootlessport, and pasta.
for network in bridge pasta; do
    podman run -d --name $network --network $network -p 8099:80 bb sh -c \"$serve\" >id
    timeout 90 sh -c \"until curl -fsS -m 20 http://127.0.0.1:8099/ 2>err; do sleep 1; done\"
    podman rm -f -t 0 $network >id
done
podman stop -t 60 web; podman wait web; podman rm web; podman ps -aq
END
         ./as-user bash -eu ../tried
         # A control group that was given to the user, as systemd does with Delegate=yes: cgroups(7).
         given=/sys/fs/cgroup/given; mkdir -p $given/engine; echo '+cpu +memory +pids' >$given/cgroup.subtree_control
         chown -R rootless $given; echo $$ >$given/engine/cgroup.procs
         cat >tried <<'END'
katavm spec; rm -rf out; jq '.process.args = [\"sleep\", \"1000\"] | .process.terminal = false
    | .linux.cgroupsPath = \"/given/c1\" | .linux.resources.memory.limit = 104857600' config.json >new; mv new config.json
\"$HOME/bin/katavm\" run -d c1 </dev/null >out 2>&1; cat out
cut -d: -f3 /proc/$(pgrep -x katavm-sandbox)/cgroup; cat /sys/fs/cgroup/given/c1/memory.max
\"$HOME/bin/katavm\" exec c1 cat /sys/fs/cgroup/memory.max; \"$HOME/bin/katavm\" delete --force c1; ls -d /sys/fs/cgroup/given/*/
END
         ./as-user podman unshare bash -eu ../tried
         echo $$ >/sys/fs/cgroup/cgroup.procs; rmdir $given/engine $given; chgrp 0 /dev/kvm
         ./as-user sh -c 'podman --runtime $HOME/bin/katavm run --rm --network none bb true' 2>&1 | grep -o 'no permission to open /dev/kvm'
         ./as-user podman system migrate",
    )?;
    let kernel = context.kernel_release()?;
    let (user, mine) = (USER.to_string(), format!("{USER}:{USER}"));
    let other = format!("{}:{}", FIRST + 32, FIRST + 43);
    let lines = [
        kernel.as_str(),
        "0",
        "code 7",
        "typed",
        "104857600",
        "0:0",
        "mine",
        &mine,
        &other,
        &user,
        &user,
        &mine,
        &mine,
        "hello",
        "in exec",
        "code 4",
        "hello",
        "hello",
        "web",
        "3",
        "web",
        "/given/c1",
        "325058560",
        "104857600",
        "/sys/fs/cgroup/given/engine/",
        "no permission to open /dev/kvm",
    ];
    expect(&output, &lines)?;
    traces.expect_nothing_of_katavm()?;
    Ok(Verdict::Passed)
}

/// The user: a home, a runtime folder, an entry in the lists of users and of further users, and what of katavm they could not reach
/// otherwise. The lab forgets it with the boot.
fn prepare(context: &Context, kvm: u32) -> Result<PathBuf> {
    rootfs(context)?;
    let home = context.scratch().join("home");
    fs::create_dir(&home)?;
    let bin = context.scratch().join("rootfs/bin");
    for applet in ["httpd", "hostname"] {
        symlink("busybox", bin.join(applet))?;
    }
    fs::write(context.scratch().join("rootfs/etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n")?;
    fs::rename(context.scratch().join("rootfs"), home.join("rootfs"))?;
    fs::create_dir(home.join("run"))?;
    fs::create_dir(home.join("image"))?;
    for file in ["vmlinux", "initramfs"] {
        fs::copy(context.image(file)?, home.join("image").join(file))?;
    }
    fs::create_dir(home.join("bin"))?;
    fs::copy(installed()?, home.join("bin/katavm"))?;
    give(&home, USER)?;
    fs::set_permissions(home.join("run"), fs::Permissions::from_mode(0o700))?;
    fs::set_permissions(context.scratch(), fs::Permissions::from_mode(0o755))?;
    append("/etc/passwd", &format!("rootless:x:{USER}:{USER}::{}:/bin/bash\n", home.display()))?;
    append("/etc/group", &format!("rootless:x:{USER}:\n"))?;
    for list in ["/etc/subuid", "/etc/subgid"] {
        append(list, &format!("rootless:{FIRST}:65536\n"))?;
    }
    fs::set_permissions(TUN, fs::Permissions::from_mode(0o666))?;
    let program = context.scratch().join("as-user");
    let variables =
        format!("HOME={0} USER=rootless XDG_RUNTIME_DIR={0}/run KATAVM_GUEST_IMAGE={0}/image", home.display());
    let text = format!(
        "#!/bin/sh\ncd {} && exec setpriv --reuid={USER} --regid={USER} --groups={kvm} env -i PATH=\"$PATH\" {variables} \"$@\"\n",
        home.display()
    );
    File::create(&program)?.write_all(text.as_bytes())?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    Ok(home)
}

fn append(path: impl AsRef<Path>, line: &str) -> Result<()> {
    let mut file = OpenOptions::new().append(true).create(true).open(path)?;
    Ok(file.write_all(line.as_bytes())?)
}
