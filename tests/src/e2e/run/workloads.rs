//! Real programs of a Debian system in one guest: what they compute, write, serve and compile is right.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Result, ensure};

use super::super::{Context, Table, Verdict};
use super::debian::{end, script};

/// The table.
pub const CASES: Table = (
    "workloads",
    &[
        ("every_file_of_the_root_is_there_and_one_in_eight_has_the_hosts_checksum", |context| checksums(context, 8)),
        ("python3_computes", python_cpu),
        ("python3_works_on_files", python_files),
        ("python3_keeps_a_database", python_database),
        ("redis_answers_and_keeps_its_data", redis),
        ("nginx_serves_a_file", nginx),
        ("git_commits_500_files_and_checks_them", git),
        ("gcc_compiles_a_program_that_runs", gcc),
        ("the_shell_ends_with_its_code", end),
    ],
);

/// All files.
pub const LONG_CASES: Table =
    ("workloads", &[("every_file_of_the_root_has_the_hosts_checksum", |context| checksums(context, 1))]);

fn nothing(_: &Path, _: &Path) -> Result<()> {
    Ok(())
}

/// Writes the host's list of all names, and that of the checksums of one file in `step`.
fn manifest(root: &Path, shared: &Path, step: usize) -> Result<()> {
    let script = "cd \"$1\"; find . -xdev -type f -print0 | LC_ALL=C sort -z >\"$2/names\"
                  sed -zn \"1~$3p\" \"$2/names\" | xargs -0 -n 500 -P 2 sha256sum >\"$2/manifest\"";
    let step = step.to_string();
    let list = Command::new("sh").args(["-euc", script, "sh"]).args([root, shared]).arg(step).status()?;
    ensure!(list.success(), "sha256sum on the host: {list}");
    let count = fs::read(shared.join("names"))?.iter().filter(|byte| **byte == 0).count();
    ensure!(count > 5000, "only {count} files in {}", root.display());
    Ok(())
}

fn checksums(context: &Context, step: usize) -> Result<Verdict> {
    let prepare = |root: &Path, shared: &Path| manifest(root, shared, step);
    // Not one file more than the host has, and each as the host has it.
    let check = "cd /; find . -xdev -type f ! -path './dev/*' -print0 | LC_ALL=C sort -z | cmp - /case/names\n\
                 sha256sum --check --quiet --strict /case/manifest && echo all the same";
    script(context, prepare, check, "all the same\n")
}

fn python_cpu(context: &Context) -> Result<Verdict> {
    // 500 digits of pi by a spigot, the number of primes below 200000 by two processes, a known digest.
    let check = r#"python3 - <<'END'
import hashlib
from multiprocessing import Pool

def pi(digits):
    q, r, t, k, n, l = 1, 0, 1, 1, 3, 3
    while digits:
        if 4 * q + r - t < n * t:
            yield n
            digits -= 1
            q, r, n = 10 * q, 10 * (r - n * t), 10 * (3 * q + r) // t - 10 * n
        else:
            q, r, t, k, n, l = q * k, (2 * q + r) * l, t * l, k + 1, (q * (7 * k + 2) + r * l) // (t * l), l + 2

def primes(span):
    return sum(all(n % d for d in range(3, int(n ** 0.5) + 1, 2)) for n in range(span[0] | 1, span[1], 2))

digits = "".join(map(str, pi(500)))
print(digits[:10], digits[-10:])
with Pool(2) as pool:
    print(1 + sum(pool.map(primes, [(3, 30000), (30000, 50000)])))
print(hashlib.sha256(b"katavm" * 1000000).hexdigest())
END"#;
    let digest = Command::new("sh").args(["-c", "yes katavm | head -n 1000000 | tr -d '\\n' | sha256sum"]).output()?;
    let digest = String::from_utf8_lossy(&digest.stdout).replace("  -", "");
    script(context, nothing, check, &format!("3141592653 1830119491\n5133\n{digest}"))
}

fn python_files(context: &Context) -> Result<Verdict> {
    let check = r#"python3 - <<'END'
import hashlib, mmap, os, pathlib, shutil, tempfile
root = pathlib.Path(tempfile.mkdtemp(dir="/var/tmp"))
for number in range(200):
    folder = root / f"{number % 20:02}"
    folder.mkdir(exist_ok=True)
    (folder / f"{number}").write_bytes(number.to_bytes(2, "big") * (number + 1))
assert sum(len(files) for _, _, files in os.walk(root)) == 200
for number in range(0, 200, 2):
    os.replace(root / f"{number % 20:02}" / f"{number}", root / f"moved-{number}")
for number in range(0, 200, 2):
    assert (root / f"moved-{number}").read_bytes() == number.to_bytes(2, "big") * (number + 1)
big = root / "big"
with open(big, "wb") as file:
    file.truncate(1 << 20)
with open(big, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
    for at in range(0, 1 << 20, 4096):
        memory[at:at + 8] = at.to_bytes(8, "big")
    memory.flush()
    os.fsync(file.fileno())
data = big.read_bytes()
assert all(data[at:at + 8] == at.to_bytes(8, "big") for at in range(0, 1 << 20, 4096))
os.link(big, root / "link")
os.symlink("big", root / "symlink")
assert big.stat().st_nlink == 2 and os.readlink(root / "symlink") == "big"
os.setxattr(big, "user.note", b"hello")
assert os.getxattr(root / "link", "user.note") == b"hello"
shutil.rmtree(root)
assert not root.exists()
print("right")
END"#;
    script(context, nothing, check, "right\n")
}

/// SQLite with both of its journals: file locks, fsync, and memory that two processes share by mapping a file.
fn python_database(context: &Context) -> Result<Verdict> {
    let check = r#"python3 - <<'END'
import os, sqlite3, subprocess, sys
for mode in ("delete", "wal"):
    path = f"/var/tmp/{mode}.db"
    first = sqlite3.connect(path, timeout=60)
    assert first.execute(f"pragma journal_mode={mode}").fetchone() == (mode,)
    first.execute("create table t (k integer primary key, v text)")
    with first:
        first.executemany("insert into t values (?, ?)", ((n, "x" * (n % 90)) for n in range(3000)))
    other = f"""import sqlite3
c = sqlite3.connect({path!r}, timeout=60)
for n in range(3000, 3010):
    with c: c.execute("insert into t values (?, 'other')", (n,))"""
    with subprocess.Popen([sys.executable, "-c", other]) as second:
        for n in range(4000, 4010):
            with first:
                first.execute("insert into t values (?, 'first')", (n,))
    assert second.returncode == 0
    print(mode, *first.execute("select count(*), sum(length(v)) from t").fetchone(),
          *first.execute("pragma integrity_check").fetchone())
    first.close()
    os.remove(path)
END"#;
    let length: u32 = (0..3000).map(|n| n % 90).sum::<u32>() + 20 * 5;
    script(context, nothing, check, &format!("delete 3020 {length} ok\nwal 3020 {length} ok\n"))
}

fn redis(context: &Context) -> Result<Verdict> {
    let check = "mkdir /var/tmp/redis; cd /var/tmp/redis; mkfifo log
        start() {
            redis-server --dir /var/tmp/redis --save '' --bind 127.0.0.1 > log & server=$!
            exec 3< log; grep -q -m 1 'Ready to accept connections' <&3; cat <&3 > /dev/null &
        }
        start
        redis-cli ping
        seq 1 2000 | sed 's/.*/SET key:& value-&/' | redis-cli --pipe | tail -n 1
        redis-cli get key:1234
        redis-cli -r 50 incr counter | tail -n 1
        redis-cli save
        redis-cli shutdown nosave; wait $server; exec 3<&-
        ls; rm log; mkfifo log
        start
        redis-cli dbsize
        redis-cli get counter
        redis-cli shutdown nosave; wait $server
        rm -r /var/tmp/redis";
    let expected = "PONG\nerrors: 0, replies: 2000\nvalue-1234\n50\nOK\ndump.rdb\nlog\n2001\n50\n";
    script(context, nothing, check, expected)
}

fn nginx(context: &Context) -> Result<Verdict> {
    let check = r#"mkdir /var/tmp/www; seq 1 200000 > /var/tmp/www/numbers; chmod 755 /var/tmp/www
        cat > /var/tmp/nginx.conf <<'END'
daemon off; worker_processes 2; user www-data; pid /var/tmp/nginx.pid; error_log /var/tmp/nginx.log notice;
events {} http { access_log off; server { listen 127.0.0.1:8080; location / { root /var/tmp/www; } } }
END
        nginx -q -t -c /var/tmp/nginx.conf
        nginx -c /var/tmp/nginx.conf & server=$!
        python3 - <<'END'
import hashlib, time, urllib.error, urllib.request
for attempt in range(600):
    try:
        urllib.request.urlopen("http://127.0.0.1:8080/nothing")
    except urllib.error.HTTPError as error:
        print(error.code)
        break
    except urllib.error.URLError:
        time.sleep(0.1)
served = urllib.request.urlopen("http://127.0.0.1:8080/numbers").read()
print(served == open("/var/tmp/www/numbers", "rb").read(), len(served))
END
        kill -QUIT $server; wait $server
        rm -r /var/tmp/www /var/tmp/nginx.*"#;
    script(context, nothing, check, "404\nTrue 1288895\n")
}

fn git(context: &Context) -> Result<Verdict> {
    let check = "mkdir /var/tmp/git; cd /var/tmp/git
        export GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@b GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@b
        export GIT_AUTHOR_DATE='2026-01-01T00:00:00Z' GIT_COMMITTER_DATE='2026-01-01T00:00:00Z'
        git init -q -b main .
        for n in $(seq 1 500); do echo \"file number $n\" > \"$n\"; done
        git add . && git commit -q -m 'five hundred files'
        git fsck --strict --no-progress
        git rev-parse HEAD^{tree}
        git status --short | wc -l
        rm -r /var/tmp/git";
    // The name of a tree is the checksum of all that is in it.
    let host = "cd \"$(mktemp -d)\"; git init -q -b main .
        for n in $(seq 1 500); do echo \"file number $n\" > \"$n\"; done
        git add . && git write-tree; rm -r \"$PWD\"";
    let tree = Command::new("sh").args(["-euc", host]).stderr(Stdio::inherit()).output()?;
    ensure!(tree.status.success() && tree.stdout.len() == 41, "git on the host: {}", tree.status);
    script(context, nothing, check, &format!("{}0\n", String::from_utf8_lossy(&tree.stdout)))
}

fn gcc(context: &Context) -> Result<Verdict> {
    let check = r#"mkdir /var/tmp/gcc; cd /var/tmp/gcc
        cat > sum.c <<'END'
unsigned long sum(unsigned long last) { unsigned long all = 0; while (last) all += last--; return all; }
END
        cat > main.c <<'END'
#include <pthread.h>
#include <stdio.h>
unsigned long sum(unsigned long);
static void *half(void *last) { return (void *)sum((unsigned long)last); }
int main(int count, char **words) {
    pthread_t thread;
    void *other;
    if (pthread_create(&thread, NULL, half, (void *)1000000)) return 1;
    unsigned long own = sum(2000000);
    if (pthread_join(thread, &other)) return 1;
    printf("%s %lu %lu\n", words[count - 1], own, (unsigned long)other);
    return 42;
}
END
        gcc -O1 -Wall -Werror -c sum.c && gcc -O1 -Wall -Werror -pthread -o program main.c sum.o
        code=0; ./program it is || code=$?; echo $code
        rm -r /var/tmp/gcc"#;
    script(context, nothing, check, "is 2000001000000 500000500000\n42\n")
}
