"""Does things at random to a few names that somebody else does things to at the same time. Reports in one line of JSON."""

import collections
import errno
import json
import os
import random
import sys
import time


def path():
    folder = random.choice(["d0", "d1", "d2"])
    return os.path.join(folder, random.choice(["a", "b", "c", "d"])) if random.random() < 0.8 else folder


# What a host says to programs that are in each other's way.
USUAL = ("EEXIST", "EINVAL", "EISDIR", "ELOOP", "ENOENT", "ENOTDIR", "ENOTEMPTY", "EPERM")


def check(data):
    """A file has what somebody wrote, or zeroes in its place."""
    assert len(data) <= 6 and all(byte in (0, b"inside"[at]) for at, byte in enumerate(data)), data


def write():
    with open(path(), "wb", buffering=0) as file:
        file.write(b"inside")


def read():
    with open(path(), "rb", buffering=0) as file:
        check(file.read())


def append():
    fd = os.open(path(), os.O_RDWR | os.O_APPEND)
    try:
        os.write(fd, b"")
        os.fstat(fd)
        os.ftruncate(fd, 6)
        check(os.pread(fd, 7, 0))
    finally:
        os.close(fd)


OPERATIONS = {
    "write": write,
    "read": read,
    "append": append,
    "stat": lambda: os.stat(path()),
    "lstat": lambda: os.lstat(path()),
    "listdir": lambda: os.listdir(random.choice(["d0", "d1", "d2"])),
    "scandir": lambda: [entry.stat() for entry in os.scandir(random.choice(["d0", "d1", "d2"]))],
    "rename": lambda: os.rename(path(), path()),
    "unlink": lambda: os.unlink(path()),
    "mkdir": lambda: os.mkdir(path()),
    "rmdir": lambda: os.rmdir(path()),
    "link": lambda: os.link(path(), path()),
    "symlink": lambda: os.symlink(random.choice(["a", "../d1/b", "../d2"]), path()),
    "readlink": lambda: os.readlink(path()),
    "chmod": lambda: os.chmod(path(), 0o700),
    "utime": lambda: os.utime(path()),
}


def run(count):
    seen = collections.Counter()
    done = 0
    while done < count or count == 0:
        done += 1
        if count == 0:
            # It is to be in the way, not to take all of a CPU.
            time.sleep(0.001)
        for folder in ("d0", "d1", "d2"):
            if random.random() < 0.1:
                try:
                    os.mkdir(folder)
                except OSError:
                    pass
        name = random.choice(list(OPERATIONS))
        try:
            OPERATIONS[name]()
            seen["fine"] += 1
        except OSError as error:
            what = errno.errorcode[error.errno]
            seen[what if what in USUAL else f"{what} of {name}"] += 1
    return seen


folder, count = sys.argv[1], int(sys.argv[2])
os.chdir(folder)
random.seed(count)
print(json.dumps(run(count)))
