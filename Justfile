# Recipes forward to the programs that do the work; `./just` installs the command runner itself.

set positional-arguments := true

export CARGO_TARGET_DIR := env("CARGO_TARGET_DIR", justfile_directory() / "target")
bin := CARGO_TARGET_DIR / "lab"
lab := bin / "katavm-lab"

# List the recipes.
@default:
    just --list --justfile "{{ justfile() }}"

# Install and build everything that the other recipes need.
setup: build guest-image
    "{{ lab }}" setup

# Build katavm and its test programs.
build:
    cargo build -q --profile lab -p katavm-runtime -p katavm-tests --bins

# Build the guest's kernel and initramfs, and print their folder.
guest-image:
    cargo run -q -p katavm-guest-image -- build

# Run a real bundle in a microVM.
demo: build guest-image
    #!/bin/sh
    set -eu
    bundle=$(examples/make-bundle debian)
    "{{ lab }}" run -- sh -euc '
        examples/config-with "$1" /tmp/demo -- sh -c "uname -a; python3 -V; python3 -c \"print(sum(range(10**6)))\""
        katavm run --timings /tmp/demo
    ' demo "$bundle"

# Run a bundle: ./just run BUNDLE [OPTIONS OF katavm run]
run bundle *args: build guest-image
    #!/bin/sh
    set -eu
    bundle=$(realpath "$1")
    shift
    tty=; if [ -t 0 ] && [ -t 1 ]; then tty=--tty; fi
    exec "{{ lab }}" run $tty --writable "$bundle" -- katavm run "$@" "$bundle"

# Run a command in the lab: ./just lab [--counting] [--systemd] [--limit SECONDS] 'COMMAND'
@lab *cmd: build
    "{{ lab }}" run "$@"

# Look around in the lab.
@lab-shell *options: build
    "{{ lab }}" shell "$@"

# Lint, unit tests, end-to-end tests.
test: lint test-unit test-e2e

# Tests that need no KVM. The guest image comes first: making it installs the libraries that the agent is linked with.
test-unit: guest-image
    cargo test -q --workspace

# Real guests, in the lab or on this machine's /dev/kvm: ./just test-e2e [CASE...]
test-e2e *cases: build guest-image
    #!/bin/bash
    set -euo pipefail
    KATAVM_E2E_DEBIAN=$(examples/make-bundle debian)
    export KATAVM_E2E_DEBIAN
    told=$(mktemp -d)
    trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$told"' EXIT
    cases() { "{{ bin }}/katavm-e2e" --list --boot "$@"; }
    boot() {
        if [ "$1" = systemd ]; then lab=--systemd; else lab=; fi
        now="$told/.$1"; after=
        until "{{ lab }}" run $lab --limit 4800 -- katavm-e2e $after --boot "$@" 2>&1 | sed -u "s/^/[$1] /" | tee "$now"; do
            cat "$now" >>"$told/$1"
            last=$(sed -n 's/^.* test \([^ ]*\) \.\.\. .*/\1/p' "$now" | tail -n 1)
            ! grep -q ' \.\.\. FAILED ' "$now" || echo "$1" >>"$told/failed"
            # After a case that stood still, those that are left get another machine.
            if [ -z "$last" ] || ! grep -q 'it stood still' "$now"; then
                echo "$1" >>"$told/failed"
                return
            fi
            after="--after $last"
        done
        cat "$now" >>"$told/$1"
    }
    # Each boot of the lab is a machine of its own, two at a time; a host that runs guests itself is one for all.
    if "{{ bin }}/katavm" check >/dev/null 2>&1; then lanes=1; else lanes=2; fi
    for name in plain engines containerd cri systemd; do
        [ -n "$(cases $name "$@")" ] || continue
        while [ "$(jobs -pr | wc -l)" -ge $lanes ]; do wait -n; done
        boot $name "$@" &
    done
    [ -n "$(jobs -p)" ] || { echo "no case has such a name: $*" >&2; exit 1; }
    wait
    cat "$told"/* | awk '$2 == "test" { if ($5 == "ok") p++; if ($5 == "FAILED") f++; if ($5 == "SKIPPED:") s++ } END { printf "%d passed, %d failed, %d skipped\n", p, f, s }'
    [ ! -e "$told/failed" ] || { echo "cases failed:" $(sort -u "$told/failed") >&2; exit 1; }

# Benchmarks beside the peers, in the counting lab: [FIRECRACKER=BINARY] ./just bench boot [--runs N]
bench *args: guest-image
    #!/bin/sh
    set -eu
    # What users run, not what tests run: optimised as a release is.
    cargo build -q --release -p katavm-runtime
    cargo build -q --release -p katavm-tests --bins
    bin=$CARGO_TARGET_DIR/release
    if [ -n "${FIRECRACKER:-}" ]; then
        firecracker=$(realpath "$FIRECRACKER")
        set -- --share "$(dirname "$firecracker")" --env "FIRECRACKER=$firecracker" -- katavm-bench "$@"
    else
        set -- -- katavm-bench "$@"
    fi
    exec "$bin/katavm-lab" run --counting --limit 3600 --bin-dir "$bin" "$@"

# The end-to-end tests again and again, the long ones too: ./just soak [ROUNDS]
soak rounds="20": build guest-image
    #!/bin/sh
    set -eu
    KATAVM_E2E_DEBIAN=$(examples/make-bundle debian)
    export KATAVM_E2E_DEBIAN
    for round in $(seq "$1"); do echo "round $round" && "{{ lab }}" run --limit 14400 -- katavm-e2e --long; done

# The POSIX suite pjdfstest on shared files, beside the host.
pjdfstest: build guest-image
    #!/bin/sh
    set -eu
    KATAVM_E2E_DEBIAN=$(examples/make-bundle debian)
    folder=${KATAVM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/katavm}/pjdfstest
    echo "pjdfstest 0.2.2 is built in $folder, once (about 2 minutes)" >&2
    cargo install -q --locked --version 0.2.2 --root "$folder" pjdfstest
    KATAVM_E2E_PJDFSTEST=$folder/bin/pjdfstest
    export KATAVM_E2E_DEBIAN KATAVM_E2E_PJDFSTEST
    "{{ lab }}" run --limit 4800 -- katavm-e2e --boot plain --long posix::

# Write man pages and the completions of bash, zsh and fish to FOLDER/man1 and FOLDER/completions.
manual folder=(justfile_directory() / "out/manual"):
    cargo run -q -p katavm-runtime --example manual -- "$1"

# Formatting and clippy, warnings refused.
lint:
    cargo fmt --all --check
    cargo clippy -q --workspace --all-targets -- -D warnings

# Remove what was built here; the cache of artefacts stays.
clean:
    cargo clean
    rm -rf "{{ justfile_directory() }}/out"
