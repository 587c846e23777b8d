rt() { "$RUNTIME" --root "$PWD/state" "$@"; }
config() { jq "$@" config.json >config.new && mv config.new config.json; }
args() { config --arg script "$1" '.process.args = ["sh", "-c", $script]'; }
is() { until [ "$(rt state "${2:-x}" 2>/dev/null | jq -r .status)" = "$1" ]; do sleep 0.05; done; echo "$1"; }
background() { rt run -d "$@" x </dev/null >out 2>&1; }
terminal() { python3 terminal.py "$@"; }
if [ ! -e rootfs ]; then
    mkdir -p rootfs/bin rootfs/dev rootfs/proc rootfs/sys rootfs/tmp rootfs/etc rootfs/data
    cp /bin/busybox rootfs/bin/
    rootfs/bin/busybox --install rootfs/bin
    echo root:x:0:0:root:/:/bin/sh >rootfs/etc/passwd
    runc spec
    config '.process.terminal = false | .root.readonly = false'
fi
